"""The steps of the LSTM's loop and of its backward as compiled C++ (`lstm_steps.cpp`).

A step of few rows is a chain of short operations: at 256 units and rank 64 the two products take 25
of its 65 us, the calls and what passes through memory between them the rest. Compiled, products and
pointwise operations are one pass. G: gates, H: hidden_size, K: width of codes, R: rank, L: lanes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise import cpp
from rankwise.layers.recurrent.codes import operand_dtype
from rankwise.layers.recurrent.matrices import Matrix

G, WIDE = 4, 4
# Rows a thread has at least: fewer read the weights for too little work.
FEWEST = 4
_NAMES = {torch.float32: "float", torch.float64: "double"}


def library() -> ctypes.CDLL | None:
    """The compiled source, if it can be had."""
    return cpp.load(Path(__file__).with_suffix(".cpp"))


@torch.compiler.assume_constant_result
def _is_here() -> bool:
    return library() is not None


def serves(matrices: Sequence[Matrix]) -> bool:
    """Whether there are compiled steps for a layer in one direction: float32 or 64 on a CPU.

    Args:
        matrices: the input's, the recurrent one's, the projection's if there is one.
    """
    ih, hh = matrices[:2]
    if hh.v is None or hh.gates != G or hh.apart or ih.apart or hh.u.device.type != "cpu":
        return False
    return hh.u.dtype in _NAMES and operand_dtype(hh.u) == hh.u.dtype and _is_here()


def _function(name: str, dtype: torch.dtype) -> Any:
    found = library()
    assert found is not None
    return getattr(found, f"{name}_{_NAMES[dtype]}")


def _lanes(dtype: torch.dtype) -> int:
    found = library()
    assert found is not None
    return found.vector_bytes() // dtype.itemsize


@torch.compiler.assume_constant_result
def _has_threads() -> bool:
    found = library()
    return found is not None and found.has_threads() == 1


def threads(batch: int, available: int) -> int:
    """Of so many threads those that share the rows of a batch: sequences do not meet."""
    return max(1, min(available, batch // FEWEST)) if _has_threads() else 1


def _call(function: Any, numbers: Sequence[int], tensors: Sequence[Tensor | None]) -> None:
    """Numbers, T and B first, and tensors without gaps by their addresses, on torch's threads."""
    assert all(t is None or t.is_contiguous() for t in tensors)
    numbers = (threads(numbers[1], torch.get_num_threads()), *numbers)
    addresses = (ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors)
    function(*map(ctypes.c_int64, numbers), *addresses)


def units(*weights: Tensor) -> Tensor:
    """Of W (G H, K), side by side, (H / L, K, G, L): the gates of L units, for each input.

    The rows of g are doubled. Made in one piece: of wide layers, memory that is new costs more than
    to copy.
    """
    first = weights[0]
    lanes, hidden = _lanes(first.dtype), len(first) // G
    packed = first.new_zeros(-(-hidden // lanes), sum(w.shape[1] for w in weights), G, lanes)
    for weight, to in zip(weights, packed.split([w.shape[1] for w in weights], 1), strict=True):
        each = weight.unflatten(0, (G, hidden))
        for n, part in enumerate(each.split(lanes, 1)) if hidden % lanes else ():
            to[n, ..., : part.shape[1]] = part.permute(2, 0, 1)
        if not hidden % lanes:
            to.copy_(each.unflatten(1, (-1, lanes)).permute(1, 3, 0, 2))
    packed[:, :, 2].mul_(2)
    return packed


def panels(weight: Tensor) -> Tensor:
    """W (N, K) as (N / 4 L, K, 4 L): so many outputs side by side, for each input."""
    width, turned = WIDE * _lanes(weight.dtype), weight.t()
    packed = weight.new_zeros(-(-len(weight) // width), len(turned), width)
    for to, part in zip(packed, turned.split(width, 1), strict=True):
        to[:, : part.shape[1]] = part
    return packed


def following(batch_sizes: Sequence[int], steps: int, batch: int) -> Tensor:
    """(T + 1): how many sequences have each step, and none behind the last."""
    return torch.tensor([*(batch_sizes or [batch] * steps), 0], dtype=torch.int64)


class Forward:
    """The forward loop on packed weights, for any number of steps and rows."""

    def __init__(self, ux: Tensor, uh: Tensor, bias: Tensor, v: Tensor) -> None:
        """Pack (4 H, Kx), (4 H, R), (4 H) and (R, H)."""
        self.u, self.bias, self.v = units(ux, uh), units(bias[:, None]), panels(v)

    def run(
        self,
        zx: Tensor,
        z0: Tensor,
        c0: Tensor,
        kept: tuple[Tensor, Tensor, Tensor, Tensor],
        reverse: bool,
        batch_sizes: Sequence[int],
    ) -> Tensor:
        """The last c. Fills the outputs, and of 2 c, gates and codes those that are not empty."""
        output, cells, gates, codes = kept
        (steps, batch, hidden), (width_x, rank) = output.shape, (zx.shape[2], z0.shape[1])
        if not len(codes):
            codes = zx.new_empty(steps, batch, width_x + rank)
        codes[..., :width_x] = zx
        codes[steps - 1 if reverse else 0, :, width_x:] = z0
        every, last = len(cells) > 0, c0.new_empty(c0.shape)
        if every:
            torch.mul(c0, 2, out=cells[steps if reverse else 0])
        sizes = following(batch_sizes, steps, batch)
        numbers = (steps, batch, hidden, width_x, rank, int(reverse), int(every))
        weights = (sizes, self.u, self.bias, self.v)
        states = (
            codes,
            cells if every else (c0 * 2).contiguous(),
            gates if len(gates) else None,
            output,
            last,
        )
        _call(_function("forward", zx.dtype), numbers, (*weights, *states))
        return last / 2


class Backward:
    """The backward loop over chunks, on packed weights."""

    def __init__(self, uh: Tensor, v: Tensor, reverse: bool) -> None:
        """Pack (4 H, R) and (R, H)."""
        self.vt, self.ut, self.reverse = panels(v.t()), panels(uh.t()), reverse

    def run(
        self,
        gates: Tensor,
        cells: Tensor,
        d_output: Tensor,
        dc: Tensor,
        z: Tensor | None,
        slab: Tensor,
        d_last: Tensor | None,
        sizes: Tensor,
    ) -> Tensor:
        """The gradient of the codes of h (N, B, R) of a chunk of N steps.

        Args:
            gates: (N, B, 4 H).
            cells: 2 c before and after each step, (N + 1, B, H).
            d_output: (N, B, H).
            dc: (B, H), the gradient of c, carried on in place.
            z: (B, R), of the codes that the chunk done before this one read first; None: no such.
            slab: (N, B, 4 H), gets the gradients of the preactivations.
            d_last: (B, H), of the last c, where sequences end in different steps.
            sizes: (N + 1), how many sequences have each step and the one behind the chunk.
        """
        (steps, batch, hidden), rank = d_output.shape, self.vt.shape[1]
        dz = gates.new_empty(steps, batch, rank)
        numbers = (steps, batch, hidden, rank, int(self.reverse))
        saved = (
            sizes,
            None if d_last is None else d_last.contiguous(),
            gates.contiguous(),  # as hooks of what is saved may return it
            cells.contiguous(),
            d_output.contiguous(),
        )
        _call(
            _function("backward", gates.dtype),
            numbers,
            (*saved, self.vt, self.ut, z, dc, slab, dz),
        )
        return dz
