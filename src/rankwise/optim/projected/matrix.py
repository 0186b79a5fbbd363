"""One projected matrix: its bases, its proxy, the way down and the way back up."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rankwise import sharding
from rankwise.linalg import working_dtype
from rankwise.onednn import add_product_, matmul
from rankwise.optim.projected.gradient import LowRankGrad, Proxy
from rankwise.optim.projected.int8 import Int8Weight
from rankwise.optim.projected.subspace import LowBitBasis

SIDES = ("short", "left", "right", "both")


_AS_IT_IS = nullcontext()


def _uncast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Products in the tensors' own precision, though backward is called inside autocast."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _AS_IT_IS


class Keeper(Protocol):
    """What a matrix asks of the engine that owns it."""

    def before_projection(self, matrix: ProjectedMatrix, full: Tensor) -> None:
        """Refresh the basis from the accumulated gradient, if it is due."""
        ...

    def after_projection(self, matrix: ProjectedMatrix, full: Tensor, small: Tensor) -> None:
        """Begin a refresh that shares the projection just made."""
        ...

    def sketch(self, matrix: ProjectedMatrix, full: Tensor) -> Tensor | None:
        """What a tracked basis accumulates of a gradient, or None."""
        ...

    def keeps_full(self) -> bool:
        """Whether the dense gradient is needed at the step."""
        ...

    def waits(self, matrix: ProjectedMatrix) -> bool:
        """Whether the dense gradient is held until somebody looks."""
        ...


class ProjectedMatrix:
    """A weight W (M, N...) seen as a matrix (M, N) whose gradient lives in a subspace.

    One side is projected, chosen once from the full shape: of M >= N rows the right one,
    R = G Q (M, R); else the left one, R = P^T G (R, N); or both, R = P^T G Q (R, R). A side no
    longer than the rank has no basis: its projection is the identity.

    Attributes:
        name: of the weight in the model.
        weight: the model's own parameter.
        proxy: what the optimizer steps.
        rank: number of directions.
        shape: (M, N) of the full weight.
        memory: tensors that the form of the update keeps between steps; part of the checkpoint.
        next_refresh: number of finished steps from which on the basis is due.
        period: steps between refreshes.
        failures: how often the gradient was not fit for a new basis.
        power: (D, R), what the next basis is orthonormalised from after the step under way.
    """

    def __init__(
        self, keeper: Keeper, name: str, weight: nn.Parameter, rank: int, side: str
    ) -> None:
        self.keeper, self.name, self.weight = keeper, name, weight
        rows, columns = weight.shape[0], weight.numel() // weight.shape[0]
        self.shape = (rows, columns)
        self.rank = min(rank, rows, columns)
        if side == "short":
            side = "right" if rows >= columns else "left"
        whole = self.rank == min(rows, columns)
        self.sides = tuple(
            one
            for one, size in (("left", rows), ("right", columns))
            if side in (one, "both") and not (whole if side != "both" else size <= rank)
        )
        self._bases: dict[str, Tensor | LowBitBasis] = {}
        self._handle: Any = None
        self.memory: dict[str, Tensor] = {}
        self.next_refresh, self.period, self.failures = 0, 0, 0
        self.similar: list[float] = []
        self.failing = False
        self.power: Tensor | None = None
        local = self.local(weight)
        held = (local.shape[0], columns)  # of many workers, the last ones may hold no row
        self._proxy_shape = self._small_shape(held)
        self.proxy = Proxy(self._rest())
        self.proxy.projector = self

    def _rest(self) -> Tensor:
        local = self.local(self.weight)
        return torch.zeros(1, dtype=local.dtype, device=local.device).expand(self._proxy_shape)

    def wake(self) -> None:
        """Give the proxy memory for the step under way; it starts at zero."""
        local = self.local(self.weight)
        self.proxy.data = torch.zeros(self._proxy_shape, dtype=local.dtype, device=local.device)

    def rest(self) -> None:
        """Free the proxy's memory: between steps it is one zero, seen in the proxy's shape."""
        self.proxy.data = self._rest()

    def _small_shape(self, held: tuple[int, int]) -> tuple[int, int]:
        rows = self.rank if "left" in self.sides else held[0]
        columns = self.rank if "right" in self.sides else held[1]
        return rows, columns

    # ------------------------------------------------------------------ bases

    @property
    def identity(self) -> bool:
        """Whether the rank is full, so that nothing is projected."""
        return not self.sides

    def size(self, side: str) -> int:
        """D: the dimension of the space that a side's basis spans directions of."""
        return self.shape[0] if side == "left" else self.shape[1]

    def basis(self, side: str) -> Tensor:
        """The basis (D, R) of a side, in float32 or better, on the weight's device."""
        held = self._bases[side]
        return held.dequantize() if isinstance(held, LowBitBasis) else held

    def has_basis(self) -> bool:
        """Whether a first basis was found."""
        return len(self._bases) == len(self.sides)

    def set_basis(self, side: str, basis: Tensor, bits: int | None = None) -> None:
        """Use a basis from now on; moments are the caller's."""
        device = self.local(self.weight).device
        basis = basis.to(device, working_dtype(self.weight.dtype))
        self._bases[side] = basis if bits is None else LowBitBasis.of(basis, bits)

    def forget(self) -> None:
        """Be as before the first gradient: the weight's values are others."""
        self._bases.clear()
        self.memory.clear()
        self.similar.clear()
        self.next_refresh, self.period, self.failing = 0, 0, False
        self.weight.grad = None

    def facing(self, side: str, tensor: Tensor) -> Tensor:
        """A matrix turned so that the side's basis multiplies it from the right."""
        return tensor.mT if side == "left" else tensor

    def _factor(self, side: str, dtype: torch.dtype) -> Tensor | None:
        return self.basis(side).to(dtype) if side in self.sides else None

    # ------------------------------------------------------------------ down and up

    def local(self, tensor: Tensor) -> Tensor:
        """The part of a sharded tensor that this worker holds; any other tensor itself."""
        return sharding.local(tensor)

    def as_whole(self, part: Tensor) -> Tensor:
        """What this worker holds of a proxy's state or of `memory`, as a part of the whole.

        Rows of a sharded weight come back as a DTensor; everything else is the same everywhere.
        """
        rows = self.local(self.weight).shape[0]
        if not sharding.is_sharded(self.weight) or part.dim() < 2 or part.shape[0] != rows:
            return part
        return sharding.as_rows(part, self.weight)

    def as_part(self, whole: Tensor) -> Tensor:
        """What this worker holds of a tensor that `as_whole` gave, or that was put together."""
        if not sharding.is_sharded(self.weight) or whole.dim() < 2:
            return whole
        return sharding.local(sharding.cut(whole, self.weight))

    def project(self, full: Tensor) -> Tensor:
        """The projection of a gradient or weight of W's shape."""
        matrix = full.flatten(1)
        left, right = (self._factor(side, matrix.dtype) for side in ("left", "right"))
        if left is not None:
            matrix = matmul(left.mT, matrix)
        return matrix if right is None else matmul(matrix, right)

    def project_into(self, small: Tensor, full: Tensor, alpha: float) -> None:
        """Add alpha times the projection of `full`."""
        matrix = full.flatten(1)
        left, right = (self._factor(side, matrix.dtype) for side in ("left", "right"))
        if left is not None and right is not None:
            matrix, left = matmul(left.mT, matrix), None
        if left is not None:
            add_product_(small, left.mT, matrix, alpha=alpha)
        elif right is not None:
            add_product_(small, matrix, right, alpha=alpha)
        else:
            small.add_(matrix, alpha=alpha)

    def lift(self, small: Tensor) -> Tensor:
        """Back to W's shape, as a new tensor."""
        left, right = (self._factor(side, small.dtype) for side in ("left", "right"))
        with _uncast(small):
            if left is not None:
                small = matmul(left, small)
            if right is not None:
                small = matmul(small, right.mT)
        return small.reshape(self.local(self.weight).shape)

    def lift_into(self, target: Tensor, small: Tensor, alpha: float, keep: float = 1.0) -> None:
        """target <- keep * target + alpha * lifted, in place; target (M, N) of any dtype."""
        small = small.to(target.dtype)
        left, right = (self._factor(side, target.dtype) for side in ("left", "right"))
        if left is not None and right is not None:
            small, left = matmul(left, small), None
        if left is not None:
            add_product_(target, left, small, beta=keep, alpha=alpha)
        elif right is not None:
            add_product_(target, small, right.mT, beta=keep, alpha=alpha)
        else:
            if keep != 1.0:
                target.mul_(keep)
            target.add_(small, alpha=alpha)

    def channels(self) -> int | None:
        """The dimension of the projected gradient to take norms over, one norm per channel.

        A channel is a row or column that projection leaves alone; None: both are projected.
        """
        if len(self.sides) != 1:
            return None
        return 0 if self.sides == ("left",) else 1

    # ------------------------------------------------------------------ the gradient

    def watch(self) -> None:
        """Project the gradient as soon as backward has accumulated it, and free the dense one."""
        self._handle = self.weight.register_post_accumulate_grad_hook(self._on_accumulated)

    def release(self) -> None:
        """Leave the weight's gradient alone from now on."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.weight.grad = None

    @torch.no_grad()
    def _on_accumulated(self, _: Tensor) -> None:
        held = self._wrapped(self.weight.grad)
        if held.small is None and not self.keeper.waits(self):
            self.resolve(held)

    def _wrapped(self, gradient: Any) -> LowRankGrad:
        held = self.local(gradient)
        if isinstance(held, LowRankGrad):
            return held
        held = LowRankGrad(self, None, held)
        self._assign(held)
        return held

    def _assign(self, held: LowRankGrad | None) -> None:
        spec = getattr(self.weight, "_spec", None)
        if held is None or spec is None:
            self.weight.grad = held
        else:  # from_local would take a view, which is dense
            sharded: Any = type(self.weight.data)
            self.weight.grad = sharded(held, spec, requires_grad=False)

    @torch.no_grad()
    def resolve(self, held: LowRankGrad) -> None:
        """Project what is held, after a refresh of the basis if one is due."""
        full = held.full
        assert full is not None
        with _uncast(full):
            self.keeper.before_projection(self, full)
            held.small = full.flatten(1) if self.identity else self.project(full)
            self.keeper.after_projection(self, full, held.small)
            held.sketch = self.keeper.sketch(self, full)
        if self.identity or not self.keeper.keeps_full():
            held.full = None

    @torch.no_grad()
    def accumulate(self, held: LowRankGrad, gradient: Tensor, alpha: float) -> None:
        """Add another dense gradient, times alpha: from the second micro-batch on."""
        if held.small is None:
            assert held.full is not None
            held.full.add_(gradient, alpha=alpha)
            return
        held.settle()
        held.seen = None
        with _uncast(gradient):
            self.project_into(held.small, gradient, alpha)
            sketch = self.keeper.sketch(self, gradient)
        if not self.identity and self.keeper.keeps_full():
            more = gradient * alpha
            held.full = more if held.full is None else held.full.add_(more)
        if sketch is not None:
            sketch.mul_(alpha)
            held.sketch = sketch if held.sketch is None else held.sketch.add_(sketch)

    def take(self) -> Tensor | None:
        """W's projected gradient, for the optimizer."""
        if self.weight.grad is None:
            return None
        return self._wrapped(self.weight.grad).look()

    def give(self, small: Tensor | None) -> None:
        """Make a projected gradient, or none, W's."""
        self._assign(None if small is None else LowRankGrad(self, small))

    def held(self) -> LowRankGrad | None:
        """W's gradient, if it has one."""
        return None if self.weight.grad is None else self._wrapped(self.weight.grad)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Bases, memory and counters: tensors and numbers."""
        bases = {
            side: {"codes": b.codes, "scales": b.scales, "bits": b.bits, "shape": list(b.shape)}
            if isinstance(b, LowBitBasis)
            else b
            for side, b in self._bases.items()
        }
        return {
            "bases": bases,
            "memory": {key: self.as_whole(held) for key, held in self.memory.items()},
            "next_refresh": self.next_refresh,
            "period": self.period,
            "failures": self.failures,
            "failing": self.failing,
            "similar": list(self.similar),
            "weight": self.weight.parts() if isinstance(self.weight, Int8Weight) else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take on a saved state; tensors come to the weight's device, in their own dtype."""
        device = self.local(self.weight).device
        for side, saved in state_dict["bases"].items():
            if isinstance(saved, Tensor):
                self._bases[side] = saved.to(device).clone()
            else:
                rows, columns = saved["shape"]
                self._bases[side] = LowBitBasis(
                    saved["codes"].to(device).clone(),
                    saved["scales"].to(device).clone(),
                    int(saved["bits"]),
                    (int(rows), int(columns)),
                )
        memory: dict[str, Tensor] = state_dict["memory"]
        self.memory = {k: self.as_part(t).to(device).clone() for k, t in memory.items()}
        self.next_refresh, self.period = int(state_dict["next_refresh"]), int(state_dict["period"])
        self.failures, self.failing = int(state_dict["failures"]), bool(state_dict["failing"])
        self.similar = [float(s) for s in state_dict["similar"]]
        if isinstance(self.weight, Int8Weight):
            # Empty if the saved run had floats: then those that were loaded are encoded.
            for part, saved in zip(self.weight.parts(), state_dict["weight"], strict=False):
                part.copy_(saved)
