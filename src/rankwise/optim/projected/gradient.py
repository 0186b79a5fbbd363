"""The gradient of a projected matrix, and the proxy that the optimizer steps in its place.

One truth: after backward, W.grad is a `LowRankGrad` of W's full shape that stores the projected
gradient alone, and the gradient of the proxy is a view of it. Accumulation, both zero_grads,
clipping by model or by optimizer, and unscaling therefore act on the same numbers.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_any, tree_leaves, tree_map

from rankwise.errors import LifeCycleError
from rankwise.optim.projected.probe import refuse_unnamed

_aten = torch.ops.aten
_SCALE = {
    _aten.mul_.Tensor,
    _aten.mul_.Scalar,
    _aten.div_.Tensor,
    _aten.div_.Scalar,
    _aten.zero_.default,
}
_SCALE_EACH = {
    _aten._foreach_mul_.Tensor,
    _aten._foreach_mul_.Scalar,
    _aten._foreach_div_.Tensor,
    _aten._foreach_div_.Scalar,
    _aten._foreach_zero_.default,
    _aten._amp_foreach_non_finite_check_and_unscale_.default,
}
_ADD = {_aten.add.Tensor, _aten.add_.Tensor}
_NORM = {_aten.linalg_vector_norm.default, _aten._foreach_norm.Scalar}
_COPIES = {_aten.detach.default, _aten.alias.default, _aten.clone.default}


class Projector(Protocol):
    """What a gradient asks of the matrix it belongs to."""

    name: str
    weight: nn.Parameter

    def local(self, tensor: Tensor) -> Tensor:
        """The part of a sharded tensor that this worker holds; any other tensor itself."""
        ...

    def project(self, full: Tensor) -> Tensor:
        """The projected gradient."""
        ...

    def lift(self, small: Tensor) -> Tensor:
        """Back to W's shape."""
        ...

    def resolve(self, held: LowRankGrad) -> None:
        """Project what is held, after a refresh of the basis if one is due."""
        ...

    def accumulate(self, held: LowRankGrad, gradient: Tensor, alpha: float) -> None:
        """Add another dense gradient, times alpha."""
        ...

    def give(self, small: Tensor | None) -> None:
        """Make this projected gradient W's."""
        ...

    def take(self) -> Tensor | None:
        """W's projected gradient."""
        ...

    def wake(self) -> None:
        """Give the proxy memory."""
        ...

    def rest(self) -> None:
        """Free the proxy's memory."""
        ...

    def as_whole(self, part: Tensor) -> Tensor:
        """What this worker holds of a state of the proxy, as a part of the whole."""
        ...

    def as_part(self, whole: Tensor) -> Tensor:
        """What this worker holds of such a whole."""
        ...


class LowRankGrad(torch.Tensor):
    """A gradient of W's shape that holds only what the optimizer needs.

    A matrix that is due for a new basis holds its dense gradient (`full`) until somebody looks
    (unscales, clips, steps), so that the basis sees what was accumulated over micro-batches and
    workers. Methods that need the gradient outside the subspace hold it until after the step.
    Scaling in place acts on all that is held; a 2-norm is that of the gradient it stands for;
    reading anything else sees the dense value; other edits in place are refused.

    Attributes:
        projector: the matrix it belongs to.
        small: the projected gradient; None until somebody looks at a matrix that is due.
        full: the dense gradient while it is needed, else None.
        sketch: a linear function of the gradient that a tracked basis accumulates, or None.
        seen: norm of `small` when it last agreed with `full` and `sketch`; None before a look.
    """

    projector: Projector
    small: Tensor | None
    full: Tensor | None
    sketch: Tensor | None
    seen: Tensor | None

    @staticmethod
    def __new__(  # pyright: ignore
        cls,
        projector: Projector,
        small: Tensor | None = None,
        full: Tensor | None = None,
        sketch: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> LowRankGrad:
        """Hold at least one of `small` and `full`."""
        w = projector.local(projector.weight)
        self = torch.Tensor._make_wrapper_subclass(
            cls, w.shape, strides=w.stride(), dtype=w.dtype, device=w.device
        )
        self.projector, self.small, self.full = projector, small, full
        self.sketch, self.seen = sketch, seen
        return self

    def look(self) -> Tensor:
        """The projected gradient; from now on the optimizer and scalers may edit it in place."""
        if self.small is None:
            self.projector.resolve(self)
        small = self.small
        assert small is not None
        if self.seen is None and not (self.full is None and self.sketch is None):
            self.seen = _norm(small)
        return small

    def settle(self) -> None:
        """Bring `full` and `sketch` to what `small` was scaled to since the first look.

        A GradScaler and clipping by the optimizer's parameters edit `small` alone.
        """
        if self.seen is None or self.small is None:
            return
        now = _norm(self.small)
        ratio = now / self.seen.abs()
        if ratio.is_cuda or float(ratio) != 1:
            for part in (self.full, self.sketch):
                if part is not None:  # what was zeroed may have held infinities
                    part.mul_(ratio).masked_fill_(~(ratio > 0), 0)
        self.seen = now

    def parts(self) -> list[Tensor]:
        """The tensors that are held, for scaling and for reducing over workers."""
        every = (self.small, self.full, self.sketch, self.seen)
        return [part for part in every if part is not None]

    def dense(self) -> Tensor:
        """The value; a reducer that reads must not start a refresh."""
        if self.full is not None:
            self.settle()
            return self.full
        assert self.small is not None
        return self.projector.lift(self.small)

    def norm_source(self) -> Tensor:
        """What has the 2-norm of this gradient: bases are orthonormal, so the factor does."""
        small = self.look()
        if self.full is None:
            return small
        self.settle()
        return self.full

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # pyright: ignore
        held = "due" if self.small is None else f"as {tuple(self.small.shape)}"
        return f"LowRankGrad({tuple(self.shape)}, {held}, of {self.projector.name})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.dense().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().detach().clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What torch's operations do to it."""
        kwargs, first = kwargs or {}, args[0]
        other: Any = args[1] if len(args) > 1 else None
        if func in _SCALE and isinstance(first, cls) and _is_number(other):
            for part in first.parts():
                func(part, *args[1:])
            return first
        if func in _SCALE_EACH and (func is not _aten._foreach_mul_.Tensor or _is_number(other)):
            parts = [p for g in first for p in (g.parts() if isinstance(g, cls) else [g])]
            func(parts, *args[1:])
            return None
        if func in _ADD and isinstance(first, cls) and _is_plain(other, first):
            first.projector.accumulate(first, other, float(kwargs.get("alpha", 1)))
            return first
        if func in _NORM and len(args) < 3 and not kwargs and _is_two(other):
            return func(tree_map(_norm_source, first), *args[1:])
        if func in _COPIES and isinstance(first, cls):
            held = (first.small, first.full, first.sketch, first.seen)
            return cls(first.projector, *(None if t is None else func(t) for t in held))
        if func is _aten.copy_.default and isinstance(first, cls) and _is_plain(other, first):
            # A data-parallel reducer writes its dense mean back.
            if first.small is not None:
                first.small.copy_(first.projector.project(other))
            if first.full is not None:
                first.full.copy_(other)
            first.seen = None
            return first
        if tree_any(lambda x: isinstance(x, LowRankGrad), writes(func, args, kwargs)):
            raise LifeCycleError(_refusal(func, args, kwargs))
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))


def _norm(small: Tensor) -> Tensor:
    return torch.linalg.vector_norm(small, dtype=torch.promote_types(small.dtype, torch.float32))


def _norm_source(value: Any) -> Any:
    return value.norm_source() if isinstance(value, LowRankGrad) else value


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, LowRankGrad) else value


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return type(value) is not LowRankGrad and value.numel() == 1
    return True


def _is_two(order: Any) -> bool:
    return order is None or order == 2


def _is_plain(value: Any, like: Tensor) -> bool:
    return (
        isinstance(value, Tensor) and type(value) is not LowRankGrad and value.shape == like.shape
    )


def writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Which arguments an operation writes into; lists too: foreach functions write theirs."""
    given = [*args, *(kwargs.get(a.name) for a in func._schema.arguments[len(args) :])]
    return [
        value
        for spec, value in zip(func._schema.arguments, given, strict=False)
        if spec.alias_info is not None and spec.alias_info.is_write
    ]


def _refusal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    held = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, LowRankGrad))
    return (
        f"{func.name()} would edit the gradient of {held.projector.name} in place, but only its "
        "projection is kept, in which this edit has no meaning; gradients can be scaled, zeroed "
        "and added to: clip by clip_grad_norm_ or rankwise.start(..., clip_norm=...), or clip the "
        "values of the optimizer's own parameters, which are the projected ones"
    )


class Proxy(nn.Parameter):
    """The parameter that the optimizer steps for a matrix: its projected shape, zero before a step.

    What it has become after the step is the update, still to be lifted. Its gradient is W's.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl
    projector: Projector

    @property
    def grad(self) -> Tensor | None:  # pyright: ignore
        """The projected gradient, the very numbers that W.grad holds."""
        return self.projector.take()

    @grad.setter
    def grad(self, value: Tensor | None) -> None:  # pyright: ignore
        if value is not None:
            refuse_unnamed()
        self.projector.give(value)

    def __repr__(self) -> str:  # pyright: ignore
        name = self.projector.name
        return (
            f"Proxy of {name}, {tuple(self.shape)}; the optimizer holds {name} itself under "
            "rankwise.states_by_weight(run)"
        )

    @property
    def stands_for(self) -> nn.Parameter:
        """The weight of the model that it is stepped for."""
        return self.projector.weight
