"""Reading a child of a recurrent layer: its matrix as factors, whatever the child is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import FactorizeError
from rankwise.layers.adapted import AdaptedLayer
from rankwise.layers.linear import LowRankLinear
from rankwise.layers.recurrent.codes import ROWS
from rankwise.layers.recurrent.kept import Made, can_keep, kept, let_go
from rankwise.layers.recurrent.products import encode, form


@dataclass(frozen=True, eq=False)
class Encoded:
    """Hidden states that are known as the codes of the layer above alone: (T, B, R)."""

    codes: Tensor


@dataclass(frozen=True, eq=False)
class Matrix:
    """W (G H, N), as it is or as U V.

    Attributes:
        u: (G H, R); W itself where `v` is None.
        v: (R, N), or (G R, N) where each gate has R codes of its own; None: dense.
        bias: (G H) or None.
        gates: G.
        owner: the child that was read; None: the factors are of no use to a later call.
    """

    u: Tensor
    v: Tensor | None
    bias: Tensor | None
    gates: int
    owner: nn.Module | None = None

    @property
    def apart(self) -> bool:
        """Whether each gate has codes of its own."""
        return self.v is not None and len(self.v) != self.u.shape[1]

    def encode(self, x: Tensor | Encoded) -> Tensor:
        """The codes V x of rows x (..., N); x itself for a dense matrix."""
        if isinstance(x, Encoded):
            return x.codes
        return x if self.v is None else encode(x, self.v)

    def product(self) -> Tensor:
        """W, formed if need be; differentiable."""
        if self.v is None:
            return self.u
        if self.owner is None:
            return self._form()
        return kept(self.owner, self._factors(), self._form, "product")

    @property
    def is_kept(self) -> bool:
        """Whether what is made of the factors need not be made at each call."""
        return self.owner is not None and can_keep(self._factors())

    def let_go(self) -> None:
        """Keep nothing that was made of the factors."""
        if self.owner is not None:
            let_go(self.owner)

    def _factors(self) -> list[Tensor]:
        assert isinstance(self.owner, LowRankLinear)
        return [getattr(self.owner, part).weight for part in self.owner.parts]

    def _form(self) -> Tensor:
        assert self.v is not None
        if not self.apart:
            return form(self.u, self.v)
        u, v = (factor.unflatten(0, (self.gates, -1)) for factor in (self.u, self.v))
        return torch.bmm(u, v).flatten(0, 1)

    def narrow(self) -> Matrix:
        """One matrix to multiply codes by, in place of one for each gate: zeros between gates."""
        return Matrix(torch.block_diag(*self.u.chunk(self.gates)), self.v, self.bias, self.gates)


def read(child: Any, gates: int, name: str = "") -> Matrix:
    """The matrix of a child, differentiable.

    Args:
        child: nn.Linear (a subclass too), LowRankLinear, or the first with a low-rank update, which
            is added to its weight.
        gates: G.
        name: of the child, for messages.

    Raises:
        FactorizeError: any other layer, BatchNorm between the factors, or dropout before them.
    """
    if isinstance(child, nn.Linear):
        return Matrix(child.weight, None, child.bias, gates, child)
    if isinstance(child, AdaptedLayer):
        if child.dropout:
            raise FactorizeError(
                f"{name} drops inputs of its update (dropout={child.dropout:g}); a recurrent layer "
                "reads one matrix for all steps, weight and update together. Use dropout=0"
            )
        return Matrix(child.weight, None, child.base.bias, gates, child)
    if not isinstance(child, LowRankLinear):
        raise FactorizeError(
            f"{name} is a {type(child).__name__}; a recurrent layer reads the weights of its "
            "children in every step and knows nn.Linear, LowRankLinear and this library's updates. "
            "Merge another adapter into the layer first, or leave this layer alone"
        )
    if child.norm is not None:
        raise FactorizeError(
            f"{name} has a BatchNorm between its factors; codes of one sequence are made step by "
            "step and have no statistics over a batch. Factorise it with norm=False"
        )
    bias = child.u.bias
    if child.blocks > 1 and gates % child.blocks:
        return Matrix(child.weight, None, bias, gates, child)
    u = child.to_factor("u", child.u.weight)
    if child.core is not None:
        u = u @ child.to_factor("core", child.core.weight)
    v = child.v.weight
    if child.blocks == 1:
        return Matrix(u, v, bias, gates, child)
    if child.blocks != gates:  # gates in groups with codes of their own: give each gate a copy
        v = v.unflatten(0, (child.blocks, -1)).repeat_interleave(gates // child.blocks, 0)
        v = v.flatten(0, 1)
    return Matrix(u.flatten(0, 1), v, bias, gates, child)


def for_loop(matrices: Sequence[Matrix], zx: Tensor, way: str, make: Callable[[], Made]) -> Made:
    """What a loop makes of the matrices of a layer in one direction, as an earlier call did.

    Args:
        matrices: the input's, the recurrent one's, the projection's if there is one.
        zx: (T, B, K), what it will run over.
        way: the loop is run, see `recurrent.ways`.
        make: makes it for that.
    """
    owners = [matrix.owner for matrix in matrices]
    home = owners[1]
    assert home is not None
    weights = [p for owner in owners if owner is not None for p in owner.parameters()]
    # Prepared for so many rows; longer sequences than a chunk are run in chunks.
    return kept(home, weights, make, way, zx.dtype, zx.shape[1:], min(len(zx), ROWS))


def bias_of(ih: Matrix, hh: Matrix) -> Tensor:
    """Both biases of torch's layers as one; zeros without them."""
    if ih.bias is None or hh.bias is None:
        return ih.u.new_zeros(len(ih.u))
    return ih.bias + hh.bias
