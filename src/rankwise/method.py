"""Method and Change: what a low-rank training algorithm is, and how it says what it did.

A method sees the model and the step count, never optimizer, scheduler, wrapper or loop. Every
hook defaults to doing nothing; `rankwise.run.Run` is the only caller. Read this file first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from rankwise.errors import LifeCycleError, OptionError

if TYPE_CHECKING:
    from rankwise.accounting import Trace


class GroupOptions(Protocol):
    """What the optimizer's groups say of a parameter."""

    def group(self, parameter: Parameter) -> Mapping[str, Any] | None:
        """The parameter's own group; None if the optimizer does not hold it."""
        ...

    def origin(self, parameter: Parameter) -> Mapping[str, Any] | None:
        """The group that a parameter's role group is a twin of; its own group without a role."""
        ...

    def decoupled_decay(self, parameter: Parameter) -> bool:
        """Whether weight decay acts on the weight itself, as in AdamW."""
        ...

    def state(self, parameter: Parameter) -> dict[str, Any]:
        """The optimizer's live state of a parameter: moments, to be edited in place."""
        ...


class Carry(Protocol):
    """How optimizer moments of a parameter become those of its successors, in their order.

    None stands for a successor without counterpart: its state starts fresh.
    """

    def first(self, moment: Tensor) -> tuple[Tensor | None, ...]:
        """Moments linear in the gradient: momentum, Adam's m."""
        ...

    def second(self, moment: Tensor, first: Tensor | None) -> tuple[Tensor | None, ...]:
        """Moments of squared gradients: Adam's v. `first` is the matching first moment."""
        ...


@dataclass(frozen=True, eq=False)
class Successors:
    """The parameters that take another one's place in the optimizer.

    `role` names an extra parameter group that the method declared (`Method.roles`); None keeps
    them in the group of their predecessor. `anywhere` lets parameters that are added join the
    first group if the optimizer does not hold the one that they stand behind.
    """

    parameters: tuple[Parameter, ...]
    carry: Carry | None = None
    role: str | None = None
    anywhere: bool = False


@dataclass(frozen=True, eq=False)
class Change:
    """What a hook did to the parameters, so that the optimizer can be made to follow.

    Attributes:
        replaced: parameter that left the model -> the parameters that stand for it now.
        added: parameter that stays -> new ones that join the optimizer right behind it.
        frozen: parameters that stay in the model but leave the optimizer.
        rewritten: parameters whose values were overwritten -> which of their moments to keep: a
            fraction (the largest), or True where a mask of the parameter's shape says so.
        modules: name -> (old module, new module), for every structural exchange.
        notes: what the record of the run should say (numbers and strings only).
    """

    replaced: Mapping[Parameter, Successors] = field(default_factory=dict)
    added: Mapping[Parameter, Successors] = field(default_factory=dict)
    frozen: tuple[Parameter, ...] = ()
    rewritten: Mapping[Parameter, float | Tensor] = field(default_factory=dict)
    modules: Mapping[str, tuple[nn.Module, nn.Module]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def structural(self) -> bool:
        """Whether wrappers and compiled graphs of the model are out of date."""
        return bool(self.replaced or self.added or self.frozen or self.modules)

    def joined(self) -> list[Parameter]:
        """New parameters that the model holds after the change, in order.

        A successor may be replaced in its turn, as the parts of an attention that is opened are.
        """
        new = (p for s in (*self.replaced.values(), *self.added.values()) for p in s.parameters)
        return [p for p in dict.fromkeys(new) if p not in self.replaced]

    def growth(self) -> int:
        """How many more parameters the model stores after the change; negative when it shrank.

        Parameters that only the optimizer holds, proxies say, are none of the model's.
        """
        between = {p for s in self.replaced.values() for p in s.parameters} & self.replaced.keys()
        old: set[Parameter] = set()
        new: set[Parameter] = set()
        opened: list[str] = []
        for name, (before, after) in self.modules.items():
            # What stands in a module that was exchanged before it is new itself.
            if not name.startswith(tuple(f"{parent}." for parent in opened)):
                old |= set(before.parameters()) - between
            new |= set(after.parameters()) - between
            opened.append(name)
        return sum(p.numel() for p in new - old) - sum(p.numel() for p in old - new)

    def __bool__(self) -> bool:
        return self.structural or bool(self.rewritten)

    def __or__(self, other: Change) -> Change:
        return Change(
            {**self.replaced, **other.replaced},
            {**self.added, **other.added},
            (*self.frozen, *other.frozen),
            {**self.rewritten, **other.rewritten},
            {**self.modules, **other.modules},
            {**self.notes, **other.notes},
        )


NO_CHANGE = Change()


def merge(changes: Iterable[Change]) -> Change:
    """All changes as one, later entries winning."""
    total = NO_CHANGE
    for change in changes:
        total = total | change
    return total


@dataclass
class Context:
    """What a run knows and its methods may ask.

    Attributes:
        steps_per_epoch: optimizer steps in an epoch; None if unknown.
        total_steps: optimizer steps of the run; None if unknown.
        seed: of the methods' own random numbers.
        trace: how the model executes; None until a forward was seen.
        options: what holds for a parameter in the optimizer; None until there is one.
        apart: whether workers train apart, so that nothing may average gradients over them.
        lr_factor: product of all methods' `lr_scale` at the step under way.
        followers: averaged copies of the model that take on its structure.
        report: puts an event (a dict of numbers and strings with an "event") on the run's record.
    """

    steps_per_epoch: int | None = None
    total_steps: int | None = None
    seed: int = 0
    trace: Trace | None = None
    options: GroupOptions | None = None
    apart: bool = False
    lr_factor: float = 1.0
    followers: list[nn.Module] = field(default_factory=list)
    report: Callable[[dict[str, Any]], None] = lambda event: None

    def __post_init__(self) -> None:
        for name in ("steps_per_epoch", "total_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value} must be at least 1; leave it out if unknown")

    def steps(self, epochs: float, asked_by: str) -> int:
        """Convert epochs to optimizer steps.

        Raises:
            OptionError: the run was started without `steps_per_epoch`.
        """
        if self.steps_per_epoch is None:
            raise OptionError(
                f"{asked_by}={epochs:g} is in epochs, but the run does not know how long one is; "
                f"pass rankwise.start(..., steps_per_epoch=len(loader)), or give steps instead"
            )
        return round(epochs * self.steps_per_epoch)

    def learning_rate(self, parameter: Parameter) -> float:
        """The rate at which the step under way moves a parameter; 0 if it is not held."""
        group = None if self.options is None else self.options.group(parameter)
        return 0.0 if group is None else float(group["lr"]) * self.lr_factor

    def weight_decay(self, parameter: Parameter) -> float:
        """The decay asked for this parameter by the user: that of the group it stems from."""
        group = None if self.options is None else self.options.origin(parameter)
        return 0.0 if group is None else float(group.get("weight_decay", 0.0))

    def generator(self, step: int, name: str) -> torch.Generator:
        """Randomness of a hook: a function of (seed, step, name) alone.

        Workers agree on it and a resumed run repeats it, whatever else drew numbers.
        """
        digest = hashlib.blake2b(f"{self.seed}/{step}/{name}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Method:
    """A low-rank training algorithm; subclasses are dataclasses whose fields are their options.

    `provides`, `needs` and `conflicts` are names of features, the latter two with the reason;
    which methods compose is decided from them alone.
    """

    provides: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[Mapping[str, str]] = {}
    conflicts: ClassVar[Mapping[str, str]] = {}

    _context: Context | None = None

    @property
    def trains_apart(self) -> bool:
        """Whether data-parallel workers train by themselves, each with values of its own.

        Then nothing may average gradients over them, and checkpoints hold what every one has.
        """
        return False

    @property
    def context(self) -> Context:
        """The run this method takes part in.

        Raises:
            LifeCycleError: no run has been started with this method.
        """
        if self._context is None:
            raise LifeCycleError(
                f"{type(self).__name__} takes part in no run yet; pass it to rankwise.start(...)"
            )
        return self._context

    def attach(self, context: Context) -> None:
        """Take part in a run; called once, before `prepare`."""
        if self._context is not None and self._context is not context:
            raise LifeCycleError(
                f"{type(self).__name__} already takes part in another run; a method keeps "
                "counters, so give every run its own instance"
            )
        self._context = context

    def leave(self, context: Context) -> None:
        """Take no part in a run that could not be started; in another run all stays as it is."""
        if self._context is context:
            self.detach()

    def detach(self) -> None:
        """Leave a run that could not be started, so that the same instance can be tried again."""
        self._context = None

    def choice(self) -> dict[str, Any]:
        """The layer choice among this method's options, as `rankwise.plan` takes it."""
        names = ("layers", "exclude", "keep_first", "keep_last")
        names += ("norm", "core", "separable", "split")
        options = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return {**options, "trace": self.context.trace}

    def roles(self) -> Mapping[str, Mapping[str, Any]]:
        """Extra parameter groups: role -> options that differ from the group they stem from.

        A value may be a function of that group's own: a rate that is a multiple of its rate, say.
        """
        return {}

    def prepare(self, model: nn.Module) -> Change:
        """Reshape the model before training, before any wrapper."""
        return NO_CHANGE

    def amend(self, model: nn.Module, change: Change) -> Change:
        """Complete a change, its own or another method's, before the optimizer follows it.

        For what a method wants of parameters that others bring: a role for factors, say.
        """
        return change

    def resume(self, model: nn.Module) -> Change:
        """Do again what `prepare` did outside the model: its structure and values are restored.

        Called on a resumed run instead of `prepare`; `load_state_dict` follows.
        """
        return NO_CHANGE

    def parameter_names(self, model: nn.Module) -> Mapping[Parameter, str]:
        """Names of parameters that the optimizer steps in place of the model's: for checkpoints."""
        return {}

    def before_step(self, model: nn.Module, step: int) -> None:
        """Read or edit the gradients of step `step` (1-based): accumulated, reduced, clipped."""

    def after_step(self, model: nn.Module, step: int) -> Change:
        """React to the finished optimizer step `step` (1-based)."""
        return NO_CHANGE

    def on_change(self, model: nn.Module, change: Change) -> None:
        """Another method, or a resume, changed the structure."""

    def finalize(self, model: nn.Module) -> Change:
        """Leave a model that needs nothing of this library's training machinery."""
        return NO_CHANGE

    def lr_scale(self, step: int) -> float:
        """Factor on every group's learning rate at `step`; pure, so that it can be plotted."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """Counters and histories: tensors and numbers only."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state_dict:
            raise OptionError(
                f"{type(self).__name__} keeps no state, but the checkpoint holds "
                f"{sorted(state_dict)}; it was written by another method or version"
            )
