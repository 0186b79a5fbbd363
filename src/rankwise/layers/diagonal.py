"""A diagonal map between the codes of a low-rank layer: W = U diag(c) V (2303.10512)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Diagonal(nn.Module):
    """Multiplies every code by a number of its own; zero at first, so that a product with it is.

    Args:
        codes: B R, those of all blocks.
        dimensions: of the input behind that of the codes: 0 for linear layers, 2 for 2-D images.
        device: where the weight lives.
        dtype: its type.

    Attributes:
        weight: c, of shape (B R,).
    """

    def __init__(
        self,
        codes: int,
        dimensions: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dimensions = dimensions
        self.weight = nn.Parameter(torch.zeros(codes, device=device, dtype=dtype))

    def forward(self, codes: Tensor) -> Tensor:
        weight = self.weight.to(codes.dtype)  # autocast has products in half precision
        return codes * weight.view(-1, *(1,) * self.dimensions)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}"
