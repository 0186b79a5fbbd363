"""The low-rank stand-in for nn.Linear. B: blocks, I: in_features, O: out_features, R: rank."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise.errors import PlanError
from rankwise.layers.base import LowRankLayer, check_rank


class BlockLinear(nn.Module):
    """A block-diagonal linear map: part b of the input goes to part b of the output alone.

    The weight (O, I / B) holds the blocks one below the other, as a grouped convolution does.

    Args:
        in_features: I, a multiple of B.
        out_features: O, a multiple of B.
        blocks: B.
        bias: whether to add b.
        device: where the parameters live.
        dtype: their type.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if blocks < 1 or in_features % blocks or out_features % blocks:
            raise PlanError(f"{blocks} blocks do not divide {in_features} -> {out_features}")
        self.in_features, self.out_features, self.blocks = in_features, out_features, blocks
        width = in_features // blocks
        self.weight = nn.Parameter(torch.empty(out_features, width, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        offset = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if offset is None else nn.Parameter(offset))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As B separate nn.Linear."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        # As bmm and not einsum, which leaves it for rank 1: FLOP counters see products alone.
        weight = self.weight.unflatten(0, (self.blocks, -1)).mT
        parts = x.reshape(-1, self.blocks, weight.shape[1]).transpose(0, 1)
        if self.bias is None:
            y = torch.bmm(parts, weight)
        else:
            y = torch.baddbmm(self.bias.view(self.blocks, 1, -1), parts, weight)
        return y.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"blocks={self.blocks}, bias={self.bias is not None}"
        )


class LowRankLinear(LowRankLayer):
    """y = (x V^T) U^T + b with V (R, I) and U (O, R): cheaper than dense below R = I O / (I + O).

    Built directly, its product starts with the variance of a default nn.Linear, 1 / (3 I), for
    every rank; two default nn.Linear in a row would start three times too small.

    Args:
        in_features: I.
        out_features: O.
        rank: 1 ... min(I, O / B).
        bias: whether to add b.
        norm: BatchNorm over the codes (the extra BatchNorm of 2103.03936).
        core: a map between the codes, W = U C V (2105.01029).
        blocks: B parts of the O rows, each with R codes of its own: for fused projections.
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> LowRankLinear(512, 256, rank=32)(torch.zeros(4, 512)).shape
        torch.Size([4, 256])
    """

    kind: ClassVar[str] = "linear"
    dense_class: ClassVar[type[nn.Module]] = nn.Linear
    settings: ClassVar[tuple[str, ...]] = ("in_features", "out_features")
    splits: ClassVar[bool] = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        norm: bool = False,
        core: bool = False,
        blocks: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if blocks < 1 or out_features % blocks:
            raise PlanError(f"{blocks} blocks do not divide {out_features} out_features")
        check_rank(rank, (out_features // blocks, in_features), self.kind)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.blocks = rank, blocks
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        codes = blocks * rank
        # Registered in the order in which data meets them; the dense layer's bias comes last, as
        # it does in nn.Linear, so that parameter order survives the exchange.
        self.v = nn.Linear(in_features, codes, bias=False, **place)
        self.norm = nn.BatchNorm1d(codes, **place) if norm else None
        self.core = _linear(codes, codes, blocks, bias=False, **place) if core else None
        self.u = _linear(codes, out_features, blocks, bias=bias, **place)
        self.reset_parameters()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        # Not self.v: attributes that are modules are looked up in Python, about 1 us each.
        children: Any = self._modules
        codes = children["v"](x)
        if self.norm is not None:
            codes = self.norm(codes.reshape(-1, codes.shape[-1])).view_as(codes)
        if self.core is not None:
            codes = self.core(codes)
        return children["u"](codes)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return text if self.blocks == 1 else f"{text}, blocks={self.blocks}"


def _linear(inputs: int, outputs: int, blocks: int, **options: Any) -> nn.Module:
    if blocks == 1:
        return nn.Linear(inputs, outputs, **options)
    return BlockLinear(inputs, outputs, blocks, **options)
