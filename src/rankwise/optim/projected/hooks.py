"""The hooks that all methods of projected gradients share; each says its `choices`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn
from torch.nn import Parameter

from rankwise.errors import LifeCycleError, SelectionError
from rankwise.layers import adapted_layers
from rankwise.method import NO_CHANGE, Change, Method
from rankwise.optim.projected.engine import ProjectedGradients
from rankwise.optim.projected.selection import select_matrices

M = TypeVar("M", bound=type[Method])

_PROVIDES = frozenset({"low-rank gradients"})
_CONFLICTS: Mapping[str, str] = {
    "low-rank weights": "a switch takes away the weights whose gradients are projected, and the "
    "optimizer holds proxies of them, whose moments no factor can take over",
    "low-rank gradients": "both project the gradients of the same weights",
}


def projected(cls: M) -> M:
    """Give a method the hooks of the engine, and what goes with it; the rest is its own.

    The class has the fields `layers` and `exclude` and a method `choices() -> Choices`. While a
    run is under way, `engine` is the `ProjectedGradients` that serves it.
    """
    cls.provides, cls.conflicts = _PROVIDES, _CONFLICTS
    for name, hook in vars(_Hooks).items():
        if not name.startswith("__"):
            setattr(cls, name, hook)
    return cls


class _Hooks:
    """Copied into a class and not inherited: a method has no base but `Method`.

    `self` is the method.
    """

    def prepare(self: Any, model: nn.Module) -> Change:
        """Choose the weights, watch their gradients, and put proxies into the optimizer."""
        return _begin(self, model, _select(self, model))

    def resume(self: Any, model: nn.Module) -> Change:
        """Choose the weights again, as far as no update that was opened since has frozen them."""
        try:
            return _begin(self, model, _select(self, model))
        except SelectionError:
            if not adapted_layers(model):
                raise
            return _begin(self, model, {})

    def amend(self: Any, model: nn.Module, change: Change) -> Change:
        """Let proxies follow what other methods do to their weights."""
        engine: ProjectedGradients | None = getattr(self, "engine", None)
        return change if engine is None else engine.follow(change)

    def detach(self: Any) -> None:
        """Leave a run that could not be started: nothing watches gradients any more."""
        engine: ProjectedGradients | None = getattr(self, "engine", None)
        if engine is not None:
            engine.finalize()
        Method.detach(self)

    def before_step(self: Any, model: nn.Module, step: int) -> None:
        """Everything that must precede the optimizer's step on the proxies."""
        self.engine.before_step()

    def after_step(self: Any, model: nn.Module, step: int) -> Change:
        """Lift the proxies into the weights."""
        self.engine.after_step(step)
        return NO_CHANGE

    def finalize(self: Any, model: nn.Module) -> Change:
        """The optimizer gets the weights back."""
        return self.engine.finalize()

    def parameter_names(self: Any, model: nn.Module) -> Mapping[Parameter, str]:
        """The proxies, by the names of their weights."""
        engine: ProjectedGradients | None = getattr(self, "engine", None)
        return {} if engine is None else engine.parameter_names()

    def state_dict(self: Any) -> dict[str, Any]:
        """Bases and counters."""
        return self.engine.state_dict()

    def load_state_dict(self: Any, state_dict: Mapping[str, Any]) -> None:
        """Go on from saved bases and counters."""
        if not state_dict:
            raise LifeCycleError("the checkpoint holds no bases; it was written by another method")
        self.engine.load_state_dict(state_dict)

    @property
    def moments_rule(self: Any) -> str:
        """What becomes of moments when a basis changes."""
        return self.choices().moments


def _select(method: Any, model: nn.Module) -> dict[str, Parameter]:
    rank_of, trace = method.choices().rank_of, method.context.trace
    return select_matrices(model, rank_of, method.layers, method.exclude, trace=trace)


def _begin(method: Any, model: nn.Module, weights: Mapping[str, Parameter]) -> Change:
    method.engine = ProjectedGradients(model, weights, method.choices(), method.context)
    return method.engine.begin()
