"""A dense layer and the low-rank update that is trained in its place.

M, N: the weight as a matrix, R: rank, H: heads. The layer stands for W + s / H (U_1 V_1 + ...).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import LifeCycleError, PlanError
from rankwise.layers.adapted.chunks import Chunks
from rankwise.layers.adapted.initial import draw_update
from rankwise.layers.adapted.products import adapted_linear
from rankwise.layers.base import LowRankLayer
from rankwise.layers.linear import LowRankLinear
from rankwise.layers.transposed_linear import LowRankTransposedLinear
from rankwise.method import Change, Successors
from rankwise.onednn import matmul


class AdaptedLayer(nn.Module):
    """A dense layer with an open update: y = base(x) + s / H (head_1(x) + ... + head_H(x)).

    The base's weight is frozen; a head is the low-rank layer of the same shape, without bias, so
    everything that has a low-rank form can be adapted. Nothing is written by forward, training or
    not; `merge_` folds the update into the base's weight.

    With `chunks` head n sees the n-th chunk of the batch alone while training (2402.16828). Then,
    and where every data-parallel worker has a head of its own, heads part from each other, and what
    of them is in W already stands in `merged`: head n adds s (U_n V_n - U_n' V_n').

    Attributes:
        heads: the low-rank layers.
        merged: what of each head was merged into W last, as layers that do not learn; or None.
        base: the dense layer, its bias trained as before.
        scale: s.
        dropout: probability that an input of the update is dropped while training.
        chunks: how a batch is divided among the heads; None where every head sees all of it.
        own_mean: whether a chunk's head gets the gradient of its chunk's mean loss, which is H
            times as large as its part in that of the batch.
        gain: factor on the gradients of the factors alone.
        evaluates_open: whether evaluation adds what is not merged yet, as the mean of the heads.
        trained: whether the base's weight was trained before it was frozen.
    """

    kind: ClassVar[str] = "adapted"

    def __init__(
        self,
        base: nn.Module,
        heads: list[LowRankLayer],
        scale: float,
        *,
        anchored: bool = False,
        dropout: float = 0.0,
        chunks: Chunks | None = None,
    ) -> None:
        super().__init__()
        # Heads come first: their parameters take the place of the weight, before the bias.
        self.heads = nn.ModuleList(heads)
        self.merged = nn.ModuleList([_blank(h) for h in heads]) if anchored else None
        self.base: Any = base
        self.scale, self.dropout, self.chunks = scale, dropout, chunks
        self.own_mean, self.evaluates_open, self.gain = True, True, 1.0
        self.trained = base.weight.requires_grad
        base.weight.requires_grad_(False)
        self.train(base.training)

    @classmethod
    def of(
        cls,
        dense: Any,
        stand_in: type[LowRankLayer],
        rank: int,
        *,
        heads: int = 1,
        scale: float = 1.0,
        blocks: int = 1,
        diagonal: bool = False,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Open an update of a dense layer, U zero and V not drawn yet.

        Args:
            dense: becomes the base; its weight is frozen.
            stand_in: the class of low-rank layers that has its shape.
            rank: R, 1 ... min(M, N) of each block.
            heads: H.
            scale: s.
            blocks: parts of a fused projection, each with R codes of its own.
            diagonal: a map between the codes, U diag(c) V (2303.10512).
            dtype: of the heads; that of the weight without it.
            options: `anchored`, `dropout`, `chunks`, as in the class.

        Raises:
            PlanError: a rank, number of heads or blocks that does not fit.
            FactorizeError: a layer that has no low-rank form.
        """
        if heads < 1:
            raise PlanError(f"heads={heads} must be at least 1")
        made = [_head(dense, stand_in, rank, blocks, dtype) for _ in range(heads)]
        for head in made if diagonal else ():
            head.put_diagonal()
        return cls(dense, made, scale, **options)

    @classmethod
    def from_spec(
        cls, dense: Any, spec: Mapping[str, Any], stand_in: type[LowRankLayer]
    ) -> AdaptedLayer:
        """The layer that a spec describes, its heads zero, around a dense layer.

        Raises:
            PlanError: an unknown dtype, or a rank that does not fit.
        """
        dtype = getattr(torch, spec["dtype"], None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise PlanError(f"the dtype {spec['dtype']!r} is no floating-point type")
        names = ("heads", "scale", "blocks", "anchored", "dropout")
        options = {name: spec[name] for name in names} | {"diagonal": spec["core"] == "diagonal"}
        return cls.of(dense, stand_in, int(spec["rank"]), dtype=dtype, **options)

    @property
    def rank(self) -> int:
        """R of each head."""
        head: Any = self.heads[0]
        return head.rank

    def __getattr__(self, name: str) -> Any:
        # Parents read in_features, stride, ... of the layer that they called for.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "weight", "bias"):
                raise
            return getattr(self.base, name)

    # -------------------------------------------------------------------------- the function

    def forward(self, x: Tensor) -> Tensor:
        if self._closed():
            return self.base(x)
        if self.chunks is None or not self.training:
            return self._with_heads(x, range(len(self.heads)), self.gain)
        sizes, dim = self.chunks.sizes(x), self.chunks.dim
        if len(set(sizes)) == 1 and dim == 0 and self._plain():
            gain = self.gain * (len(sizes) if self.own_mean else 1.0)
            u, v, less = self._factors(range(len(sizes)), stacked=True)
            return adapted_linear(x, *self._dense(), u, v, self.scale, gain, less=less)
        parts = torch.split(x, sizes, dim)
        gains = [self.gain * (sum(sizes) / rows if self.own_mean else 1.0) for rows in sizes]
        each = (self._with_heads(part, [n], gains[n]) for n, part in enumerate(parts))
        return torch.cat(list(each), dim)

    def _with_heads(self, x: Tensor, which: Sequence[int], gain: float) -> Tensor:
        """base(x) and the mean of some heads, whose own gradients are multiplied by a gain."""
        scale = self.scale / len(which)
        if self._plain():
            u, v, less = self._factors(which)
            return adapted_linear(x, *self._dense(), u, v, scale, gain, less=less)
        y = self.base(x)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        for n in which:
            for head, sign in self._terms(n):
                y = y + self._of_head(head, x, gain).to(y.dtype) * (sign * scale)
        return y

    def _of_head(self, head: nn.Module, x: Tensor, gain: float) -> Tensor:
        own = next(head.parameters()).dtype
        autocast = torch.is_autocast_enabled(x.device.type)
        x = x.to(own) if x.is_floating_point() and not autocast else x
        if gain == 1.0:
            return head(x)
        # The factors' gradients times the gain, the input's as it is.
        x = _Gain.apply(x, 1 / gain) if x.is_floating_point() else x
        return _Gain.apply(head(x), gain)

    def _closed(self) -> bool:
        """Whether evaluation leaves out what is not merged yet, as the published one does."""
        return self.merged is not None and not self.training and not self.evaluates_open

    def _terms(self, n: int) -> list[tuple[Any, float]]:
        """What head n adds: its product, less the part of it that W holds already."""
        if self.merged is None:
            return [(self.heads[n], 1.0)]
        return [(self.heads[n], 1.0), (self.merged[n], -1.0)]

    # ----------------------------------------------------------- linear maps, as one function

    def _plain(self) -> bool:
        """Whether base and heads are matrix products of one dtype, without dropout."""
        head: Any = self.heads[0]
        return (
            isinstance(head, LowRankLinear)
            and (isinstance(self.base, nn.Linear) or isinstance(head, LowRankTransposedLinear))
            and (head.core is None or head.diagonal)
            and head.u.weight.dtype == self.base.weight.dtype
            and not (self.dropout and self.training)
        )

    def _dense(self) -> tuple[Tensor, Tensor | None]:
        weight = self.base.weight
        transposed = isinstance(self.heads[0], LowRankTransposedLinear)
        return weight.mT if transposed else weight, self.base.bias

    def _factors(
        self, which: Sequence[int], *, stacked: bool = False
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """U and V of some heads, side by side or stacked, and those of what W holds of them."""

        def joined(heads: Any) -> tuple[Tensor, Tensor]:
            us, vs = zip(*((_u(heads[n]), heads[n].v.weight) for n in which), strict=True)
            if stacked:
                return torch.stack(us), torch.stack(vs)
            return torch.cat(us, 1), torch.cat(vs)

        return (*joined(self.heads), None if self.merged is None else joined(self.merged))

    # -------------------------------------------------------------------------- the weight

    @property
    def weight(self) -> Tensor:
        """W and the open update, as parents read it: differentiable, one product per access."""
        if self.chunks is not None and self.training:
            raise LifeCycleError(
                f"each of {len(self.heads)} heads sees a chunk of the batch while training, so no "
                "single weight stands for the layer; call eval() first, or leave it out of layers"
            )
        if self._closed():
            return self.base.weight
        terms = [term for n in range(len(self.heads)) for term in self._terms(n)]
        update: Any = sum(head.weight * sign for head, sign in terms)
        return self.base.weight + (update * (self.scale / len(self.heads))).to(self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return getattr(self.base, "bias", None)

    @torch.no_grad()
    def open_update(self) -> Tensor:
        """What is not merged yet, s / H (U_1 V_1 + ... - U_1' V_1' - ...), of the weight's shape.

        In float32 or better.
        """
        terms = [term for n in range(len(self.heads)) for term in self._terms(n)]
        return sum_of_products(terms).mul_(self.scale / len(self.heads))

    @torch.no_grad()
    def anchor_(self) -> None:
        """The heads as they are count as merged from now on."""
        if self.merged is not None:
            for head, anchor in zip(self.heads, self.merged, strict=True):
                anchor.load_state_dict(head.state_dict())

    @torch.no_grad()
    def restart_(self, draw: str, generator: torch.Generator, *, skip: int = 0) -> None:
        """Set every U to zero and draw every V anew, see `draw_update`.

        `skip` draws are passed over: those of the heads that the workers before this one have.
        """
        heads: Any = self.heads
        for head in (*[heads[0]] * skip, *heads):
            draw_update(head, draw, generator)
        self.anchor_()

    # ----------------------------------------------------------------- the layer in the model

    def new_parameters(self) -> tuple[nn.Parameter, ...]:
        """What is trained in place of the weight, in the order of `parameters()`."""
        return tuple(self.heads.parameters())

    def last_factors(self) -> tuple[nn.Parameter, ...]:
        """Those of `new_parameters` that begin at zero: the U of every head."""
        heads: Any = self.heads
        return tuple(head.u.weight for head in heads)

    def for_tied(self, dense: Any, stand_in: type[LowRankLayer]) -> AdaptedLayer:
        """A layer with this one's heads around another dense layer of the same weight."""
        head: Any = self.heads[0]
        layer = self.of(
            dense,
            stand_in,
            self.rank,
            heads=len(self.heads),
            scale=self.scale,
            blocks=head.blocks,
            diagonal=head.diagonal,
            anchored=self.merged is not None,
            dropout=self.dropout,
            chunks=self.chunks,
        )
        pairs: Any = (
            *zip(layer.heads, self.heads, strict=True),
            *zip(layer.merged or (), self.merged or (), strict=True),
        )
        for own, other in pairs:
            own.v, own.core, own.u.weight = other.v, other.core, other.u.weight
        layer.trained = self.trained
        layer.own_mean, layer.evaluates_open = self.own_mean, self.evaluates_open
        layer.gain = self.gain
        return layer

    def taken_from(self, dense: Any) -> Change:
        """The heads join the optimizer behind the weight, which leaves it."""
        heads = Successors(self.new_parameters(), anywhere=True)
        return Change(added={dense.weight: heads}, frozen=(dense.weight,))

    def given_back(self) -> Change:
        """The weight takes the place of the heads again."""
        # A basis that is frozen has no place in the optimizer to give back.
        learning = [p for p in self.new_parameters() if p.requires_grad]
        first, *others = learning or self.new_parameters()
        gone = dict.fromkeys(others, Successors(()))
        return Change(replaced={first: Successors((self.base.weight,)), **gone})

    def to_dense(self) -> Any:
        """The base, without the update: merge first. Its weight learns again if it did before."""
        self.base.weight.requires_grad_(self.trained)
        return self.base.train(self.training)

    def spec(self) -> dict[str, Any]:
        """Everything needed to rebuild this layer around the dense one."""
        head: Any = self.heads[0]
        return {
            **head.spec(),
            "kind": self.kind,
            "of": head.kind,
            "heads": len(self.heads),
            "scale": self.scale,
            "anchored": self.merged is not None,
            "dropout": self.dropout,
            "dtype": str(head.u.weight.dtype).removeprefix("torch."),
        }

    def extra_repr(self) -> str:
        text = f"rank={self.rank}, heads={len(self.heads)}, scale={self.scale:g}"
        return text if self.chunks is None else f"{text}, a chunk for each head"


def _u(head: Any) -> Tensor:
    """U, or U diag(c), (O, R); of blocks the block-diagonal (O, B R)."""
    u: Tensor = head.u.weight
    u = u if head.blocks == 1 else torch.block_diag(*u.chunk(head.blocks))
    return u if head.core is None else u * head.core.weight


def sum_of_products(terms: Iterable[tuple[Any, float]]) -> Tensor:
    """U_1 V_1 + ... of low-rank layers of one shape with a sign each, as one product.

    In the shape of the weight; in float32 or better.
    """
    terms, us, vs = list(terms), [], []
    for layer, sign in terms:
        u, *core, v = layer.factors()
        us.append((u @ core[0] if core else u) * sign)
        vs.append(v)
    left, right = torch.cat(us, -1), torch.cat(vs, -2)
    return terms[0][0].as_weight(matmul(left, right) if left.dim() == 2 else left @ right)


def _head(
    dense: Any, stand_in: type[LowRankLayer], rank: int, blocks: int, dtype: torch.dtype | None
) -> LowRankLayer:
    head = stand_in.like(dense, rank, blocks=blocks)
    head.u.bias = None  # the base has it
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head.to(dtype or dense.weight.dtype).train(dense.training)


def _blank(head: LowRankLayer) -> nn.Module:
    anchor = copy.deepcopy(head)
    for parameter in anchor.parameters():
        nn.init.zeros_(parameter.requires_grad_(False))
    return anchor


class _Gain(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(x: Tensor, gain: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.gain = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.gain, None
