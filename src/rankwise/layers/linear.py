"""The low-rank stand-in for nn.Linear. B: batch, I: in_features, O: out_features, R: rank."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rankwise.layers.base import LowRankLayer, check_rank


class LowRankLinear(LowRankLayer):
    """y = (x V^T) U^T + b with V (R, I) and U (O, R): cheaper than dense below R = I O / (I + O).

    Built directly, its product starts with the variance of a default nn.Linear, 1 / (3 I), for
    every rank; two default nn.Linear in a row would start three times too small.

    Args:
        in_features: I.
        out_features: O.
        rank: 1 ... min(I, O).
        bias: whether to add b.
        norm: BatchNorm over the R codes (the extra BatchNorm of 2103.03936).
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> LowRankLinear(512, 256, rank=32)(torch.zeros(4, 512)).shape
        torch.Size([4, 256])
    """

    kind: ClassVar[str] = "linear"
    dense_class: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, (out_features, in_features), self.kind)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        # Registered in the order in which data meets them; the dense layer's bias comes last, as
        # it does in nn.Linear, so that parameter order survives the exchange.
        self.v = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.norm = nn.BatchNorm1d(rank, device=device, dtype=dtype) if norm else None
        self.u = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both factors anew; the bias like nn.Linear's, within 1 / sqrt(I)."""
        std = (1 / (3 * self.in_features) / self.rank) ** 0.25
        nn.init.normal_(self.v.weight, std=std)
        nn.init.normal_(self.u.weight, std=std)
        if self.u.bias is not None:
            nn.init.uniform_(self.u.bias, -(self.in_features**-0.5), self.in_features**-0.5)

    @classmethod
    def like(cls, dense: nn.Linear, rank: int, *, norm: bool = False) -> Self:
        check_rank(rank, tuple(dense.weight.shape), cls.kind)
        layer: Any = nn.utils.skip_init(
            cls,
            dense.in_features,
            dense.out_features,
            rank,
            bias=dense.bias is not None,
            norm=norm,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )
        if layer.norm is not None:
            layer.norm.reset_parameters()
        return layer

    def dense_like(self) -> nn.Linear:
        dense: Any = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.u.bias is not None,
            device=self.u.weight.device,
            dtype=self.u.weight.dtype,
        )
        return dense

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.v(x)
        if self.norm is not None:
            codes = self.norm(codes.reshape(-1, self.rank)).view_as(codes)
        return self.u(codes)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
