"""How an update begins: one factor zero, so that the function stays, the others drawn to learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import OptionError, unknown
from rankwise.layers.base import LowRankLayer
from rankwise.layers.embedding import LowRankEmbedding

_STD = 0.02  # of factors beside a core
DRAWS = ("kaiming", "orthogonal", "normal")


@torch.no_grad()
def draw_update(head: LowRankLayer, draw: str, generator: torch.Generator) -> None:
    """Set U to zero and draw V; of a product with a core set the core to zero and draw the others.

    U and V beside a core are normal with a standard deviation of .02 (2303.10512), whatever `draw`.

    Args:
        head: a low-rank layer; with blocks each gets a V of its own.
        draw: `kaiming`, uniform within 1 / sqrt(N) (2106.09685; the rows of an embedding's update
            have no fan-in and are normal there, as in the authors' program); `orthogonal`,
            orthonormal rows times sqrt(N / R) (2402.16828); `normal`, with variance 1 / N.
        generator: on the CPU; the same numbers on every device.

    Raises:
        OptionError: an unknown draw.
    """
    if draw not in DRAWS:
        raise OptionError(unknown("init", draw, DRAWS))
    source: Any = {"generator": generator, "device": "cpu"}
    if head.core is not None:
        nn.init.zeros_(head.core.weight)
        for weight in (head.v.weight, head.u.weight):
            weight.copy_(_as(torch.randn(weight.shape, **source) * _STD, weight))
        if getattr(head.u, "padding_idx", None) is not None:  # that token has no update
            head.u.weight[head.u.padding_idx] = 0
        return
    nn.init.zeros_(head.u.weight)
    v = head.to_factor("v", head.v.weight)  # (R, N), or (B, R, N)
    rank, columns = v.shape[-2:]
    if draw == "orthogonal":
        drawn = torch.randn(*v.shape[:-2], columns, rank, **source)
        new = torch.linalg.qr(drawn)[0].mT * (columns / rank) ** 0.5
    elif draw == "normal" or isinstance(head, LowRankEmbedding):
        std = 1.0 if draw == "kaiming" else columns**-0.5
        new = torch.randn(v.shape, **source) * std
    else:
        new = (torch.rand(v.shape, **source) * 2 - 1) * columns**-0.5
    head.v.weight.copy_(head.from_factor("v", _as(new, head.v.weight)))


def _as(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, like.dtype)
