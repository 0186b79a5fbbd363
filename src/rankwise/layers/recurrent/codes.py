"""What the loops over time share: codes, chunks of steps, types, ends of sequences.

T: steps, B: batch, H: hidden_size, R: rank, G: gates, K: width of codes. A factor's codes are
(.., R) where all gates share them and (.., G R) where each gate has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import LifeCycleError

# Rows (steps times batch) that are worked on at once: what is as wide as all gates is made for
# those alone and stays in the cache. Of 64 to 4096, 256 to 512 were the best at every width. 512
# have fewer calls, 3 % of a training step at 256 units; wide slabs (SLAB numbers and more) do not
# gain by them, and take memory: half as many there.
ROWS, SLAB = 512, 1 << 20


def chunks(
    steps: int, batch: int, width: int, *, backwards: bool
) -> tuple[int, list[tuple[int, int]]]:
    """Ranges of steps in the order in which they are run, and the longest.

    Args:
        steps: T.
        batch: B.
        width: of a slab, the gradients of all gates.
        backwards: from the last step to the first.
    """
    rows = min(ROWS, max(ROWS // 2, SLAB // width))
    length = min(steps, max(1, rows // max(1, batch)))
    ranges = [(start, min(start + length, steps)) for start in range(0, steps, length)]
    return length, ranges[::-1] if backwards else ranges


def autocast_is_on(x: Tensor) -> bool:
    """Whether autocast is on where a tensor is; there is none on the meta device."""
    kind = x.device.type
    # torch.compile cannot ask what there is before torch 2.13, and traces no meta tensors.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return available and torch.is_autocast_enabled(kind)


def operand_dtype(x: Tensor) -> torch.dtype:
    """Of the operands of GEMMs: autocast's where it is on, else that of layer and inputs."""
    return torch.get_autocast_dtype(x.device.type) if autocast_is_on(x) else x.dtype


def state_dtype(operands: torch.dtype) -> torch.dtype:
    """Of cell states and of everything pointwise: half precision is for operands of GEMMs alone."""
    return torch.float32 if operands in (torch.float16, torch.bfloat16) else operands


def ends(batch_sizes: Sequence[int]) -> list[tuple[int, int] | None]:
    """For each step the rows whose sequence ends with it, or None; sequences by falling length."""
    following = [*batch_sizes[1:], 0][: len(batch_sizes)]
    return [(b, a) if b < a else None for a, b in zip(batch_sizes, following, strict=True)]


def add_up(totals: list[Tensor], parts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Gradients of the weights with those of one more chunk; `totals` is empty before the first."""
    if not totals:
        return [part.to(dtype) for part in parts]
    return [total.add_(part) for total, part in zip(totals, parts, strict=True)]


def no_second(layer: str) -> Callable[..., Any]:
    """The backward of a loop's backward, which there is not."""

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise LifeCycleError(
            f"the backward of a low-rank {layer} cannot be differentiated again "
            "(create_graph=True); for gradient penalties and Hessians take the dense layer: "
            "to_dense()"
        )

    return refuse


class Final(torch.autograd.Function):
    """Gradients as they are, which cannot be differentiated again: see `no_second`."""

    @staticmethod
    def forward(ctx: Any, layer: str, count: int, *tensors: Tensor | None) -> Any:
        """The first `count` tensors; the others are what they were made of."""
        ctx.layer = layer
        return tuple(t if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return no_second(ctx.layer)(ctx, *gradients)


def final(layer: str, found: Sequence[Tensor | None], *sources: Tensor | None) -> Any:
    """The gradients that a backward found from `sources`, as it returns them."""
    if not torch.is_grad_enabled():  # no create_graph
        return tuple(found)
    return Final.apply(layer, len(found), *found, *sources)
