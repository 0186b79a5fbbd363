"""The low-rank stand-in for nn.Conv2d, in channel form. I, O: channels, K: kernel size, R: rank."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from rankwise.layers.base import LowRankLayer, check_rank


class LowRankConv2d(LowRankLayer):
    """A K x K convolution to R channels, then a 1 x 1 convolution to O (2103.03936, 2305.02538).

    The kernel (O, I, K, K) is seen as the matrix O x (I K K) of rank R, which holds
    R (I K K + O) numbers. Stride, padding, padding mode and dilation belong to the first map.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: K, or (rows, columns).
        rank: 1 ... min(O, I K K).
        stride: of the first map.
        padding: of the first map; also "same" or "valid".
        dilation: of the first map.
        bias: whether to add b.
        padding_mode: of the first map, as in nn.Conv2d.
        norm: BatchNorm over the R code channels (the extra BatchNorm of 2103.03936).
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> LowRankConv2d(64, 128, 3, rank=16, padding=1)(torch.zeros(2, 64, 8, 8)).shape
        torch.Size([2, 128, 8, 8])
    """

    kind: ClassVar[str] = "conv2d"
    dense_class: ClassVar[type[nn.Module]] = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        *,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        check_rank(rank, (out_channels, in_channels, *kernel), self.kind)
        place = {"device": device, "dtype": dtype}
        self.v = nn.Conv2d(
            in_channels,
            rank,
            kernel,
            stride,
            padding,
            dilation,
            bias=False,
            padding_mode=padding_mode,
            **place,
        )
        self.norm = nn.BatchNorm2d(rank, **place) if norm else None
        self.u = nn.Conv2d(rank, out_channels, 1, bias=bias, **place)
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        self.kernel_size, self.groups = kernel, 1
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.padding_mode = padding_mode
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both factors anew, the product with a default nn.Conv2d's variance 1 / (3 I K K)."""
        fan_in = self.v.weight[0].numel()
        std = (1 / (3 * fan_in) / self.rank) ** 0.25
        nn.init.normal_(self.v.weight, std=std)
        nn.init.normal_(self.u.weight, std=std)
        if self.u.bias is not None:
            nn.init.uniform_(self.u.bias, -(fan_in**-0.5), fan_in**-0.5)

    @classmethod
    def like(cls, dense: nn.Conv2d, rank: int, *, norm: bool = False) -> Self:
        check_rank(rank, tuple(dense.weight.shape), cls.kind)
        layer: Any = nn.utils.skip_init(
            cls,
            dense.in_channels,
            dense.out_channels,
            dense.kernel_size,
            rank,
            dense.stride,
            dense.padding,
            dense.dilation,
            bias=dense.bias is not None,
            padding_mode=dense.padding_mode,
            norm=norm,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )
        if layer.norm is not None:
            layer.norm.reset_parameters()
        return layer.to(memory_format=_memory_format(dense.weight))

    def dense_like(self) -> nn.Conv2d:
        dense: Any = nn.utils.skip_init(
            nn.Conv2d,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.u.bias is not None,
            padding_mode=self.padding_mode,
            device=self.u.weight.device,
            dtype=self.u.weight.dtype,
        )
        return dense.to(memory_format=_memory_format(self.v.weight))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.v(x)
        if self.norm is not None:
            codes = self.norm(codes)
        return self.u(codes)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, rank={self.rank}"


def _memory_format(weight: Tensor) -> torch.memory_format:
    # By strides: a 1 x 1 kernel counts as contiguous in either format, yet sets its output's.
    last = torch.empty(weight.shape, device="meta", memory_format=torch.channels_last)
    if weight.stride() == last.stride() and weight.numel() > len(weight):
        return torch.channels_last
    return torch.contiguous_format
