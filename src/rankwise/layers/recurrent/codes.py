"""What the loops over time share: codes, slabs with one block per gate, chunks of steps.

T: steps, B: batch, H: hidden_size, R: rank, G: gates. A factor's codes are (.., R) where all gates
share them and (.., G R) where each gate has its own. Slabs of gates are (G, T, B, H): a batched
product writes them and every pointwise operand is contiguous, which costs a half to a third of
what strided gates in rows of 4 H cost on a CPU.

A row of codes is [x's codes | 1 | h's codes]: the 1 stands for the bias, so one product of that
row is the whole preactivation, and one product over all rows the gradient of both factors U and
of the bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Rows (steps times batch) that are worked on at once. The 4 H wide product of the inputs is made
# just before its steps, while it still fits the cache; measured best of 256, 512, 1024 and all.
ROWS = 512


def chunks(steps: int, batch: int, *, backwards: bool) -> tuple[int, list[tuple[int, int]]]:
    """Ranges of steps of about ROWS rows, in the order in which they are run, and the longest."""
    length = min(steps, max(1, ROWS // max(1, batch)))
    ranges = [(start, min(start + length, steps)) for start in range(0, steps, length)]
    return length, ranges[::-1] if backwards else ranges


def operand_dtype(x: Tensor) -> torch.dtype:
    """Of the operands of GEMMs: autocast's where it is on, else that of layer and inputs."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def state_dtype(operands: torch.dtype) -> torch.dtype:
    """Of cell states and of everything pointwise: half precision is for operands of GEMMs alone."""
    return torch.float32 if operands in (torch.float16, torch.bfloat16) else operands


def spread(codes: Tensor, gates: int, width: int) -> Tensor:
    """Codes (N, R) or (N, G R) as operands (G, N, R) of one batched product, without a copy."""
    if codes.shape[-1] == width:
        return codes.expand(gates, -1, -1)
    return codes.unflatten(-1, (gates, width)).transpose(0, 1)


def rows_of_codes(zx: Tensor, width: int) -> Tensor:
    """(T, B, Kx + 1 + Kh): x's codes, the 1 of the bias, and room for h's codes."""
    steps, batch, inputs = zx.shape
    codes = zx.new_empty(steps, batch, inputs + 1 + width)
    codes[..., :inputs] = zx
    codes[..., inputs] = 1
    return codes


def multiply(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """out (G, N, H) = [codes | 1] (N, K + 1) times weights (G, R + 1, H), bias in the last row."""
    gates, width = weights.shape[0], weights.shape[1] - 1
    product = out if out.dtype == rows.dtype else rows.new_empty(out.shape)
    if rows.shape[1] == width + 1:
        torch.bmm(rows.expand(gates, -1, -1), weights, out=product)
    else:
        each = spread(rows[:, :-1], gates, width)
        torch.baddbmm(weights[:, -1:], each, weights[:, :-1], out=product)
    if product is not out:
        out.copy_(product)


def add_outer(total: Tensor, rows: Tensor, slab: Tensor, width: int) -> None:
    """total (G, R, H) += codes (N, R) or (N, G R) transposed times slab (G, N, H)."""
    each = spread(rows, slab.shape[0], width).mT
    if total.dtype == rows.dtype:
        total.baddbmm_(each, slab)
    else:
        total.add_(torch.bmm(each, slab))


def multiply_back(slab: Tensor, weights: Tensor, out: Tensor) -> None:
    """Gradient of codes: out (N, R) = sum over gates of slab (G, N, H) times U (G, H, R).

    With codes for each gate out is (N, G R) and nothing is summed.
    """
    gates, _, width = weights.shape
    if out.shape[1] == width:
        torch.mm(slab[0], weights[0], out=out)
        for gate in range(1, gates):
            out.addmm_(slab[gate], weights[gate])
    else:
        for gate in range(gates):
            torch.mm(slab[gate], weights[gate], out=out[:, gate * width : (gate + 1) * width])


def ends(batch_sizes: Sequence[int]) -> list[tuple[int, int] | None]:
    """For each step the rows whose sequence ends with it, or None; sequences by falling length."""
    following = [*batch_sizes[1:], 0][: len(batch_sizes)]
    return [(b, a) if b < a else None for a, b in zip(batch_sizes, following, strict=True)]
