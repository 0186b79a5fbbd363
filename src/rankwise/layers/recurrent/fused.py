"""Loops over time on low-rank factors as one CUDA kernel for all steps.

On a GPU a loop over time is a chain of small products, and what counts is how long a step takes to
begin and end, not its arithmetic. So one launch runs them all, the factors stay on the chip, and
the part of a step that everybody has to wait for is R numbers a sequence: see `fused_kernels`.
Written in Triton, which torch's CUDA builds bring along.

The inputs' part of the gates is a product for all steps at once and is made outside. Float32 is
multiplied as torch's own recurrent layers multiply it: in TF32 unless
`torch.backends.cudnn.rnn.fp32_precision` says "ieee", then as three products of TF32. Sums are in
float32 and in a fixed order, so results repeat exactly.
"""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST = 16  # rows and columns of a matrix unit's tile


@dataclass(frozen=True)
class Tiling:
    """What a program owns: `rows` sequences and `units` hidden units."""

    rows: int
    units: int

    def groups(self, batch: int) -> int:
        """Programs of the same sequences are a group."""
        return -(-batch // self.rows)

    def programs(self, hidden: int) -> int:
        """Of a group."""
        return -(-hidden // self.units)

    def memory(self, rank: int, size: int, precision: str) -> int:
        """Bytes that a program takes on the chip, as compiled: U, V, the codes and exchange."""
        apart = 4 * self.units if size == 4 and precision == "tf32x3" else 0
        return size * _power(rank) * (5 * self.units + apart + self.rows) + (8 << 10)


@dataclass(frozen=True)
class Chip:
    """What programs run on.

    Attributes:
        processors: how many; 0: the kernels do not run here.
        memory: bytes beside each that one program may take.
    """

    processors: int = 0
    memory: int = 0


@cache
def tiling(
    batch: int, hidden: int, rank: int, size: int, chip: Chip, precision: str = "tf32"
) -> Tiling | None:
    """The finest tiling whose programs all run at once, one on each processor; None: none does.

    Args:
        batch: B.
        hidden: H.
        rank: R.
        size: bytes of a number.
        chip: what they run on.
        precision: of float32, as Triton calls it.
    """
    for rows, units in itertools.product((16, 32, 64), (16, 32)):
        tiles = Tiling(rows, units)
        if tiles.memory(rank, size, precision) > chip.memory:
            continue
        if tiles.groups(batch) * tiles.programs(hidden) <= chip.processors:
            return tiles
    return None


@cache
def _chip(device: torch.device) -> Chip:
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return Chip()
    found = torch.cuda.get_device_properties(device)
    if found.major < 8:
        return Chip()
    return Chip(found.multi_processor_count, found.shared_memory_per_multiprocessor - 1024)


@cache
def _runs(device: torch.device) -> bool:
    """Whether a kernel can be built and run: Triton needs a C compiler, for one."""
    z, v = torch.zeros(1, 1, 16, device=device), torch.zeros(16, 16, device=device)
    x, u, c = (torch.zeros(n, 16, device=device) for n in (4, 64, 1))
    given = (x, None, u, v, z, c, torch.empty_like(c), None, torch.empty_like(c))
    try:
        launch("forward", z, v, *given, GRU=False, REVERSE=0, SAVE=False)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever Triton, a compiler or the driver may say
        warnings.warn(
            f"recurrent layers cannot use their kernel on {device} and take another, slower way "
            f"({type(error).__name__}: {error})",
            stacklevel=2,
        )
        return False
    return True


def fits(v: Tensor, dtype: torch.dtype, steps: int, batch: int) -> bool:
    """Whether the kernels take a recurrent matrix U V over so many steps and sequences.

    Args:
        v: (R, H).
        dtype: of the operands.
        steps: T.
        batch: B.
    """
    if not v.is_cuda or dtype not in _DTYPES:
        return False
    within = steps * batch * 4 * v.shape[1] < 2**31  # places are counted in 32 bits
    return within and _tiles(v, dtype, batch) is not None and _runs(v.device)


def _tiles(v: Tensor, dtype: torch.dtype, batch: int) -> Tiling | None:
    rank, hidden = v.shape
    if not v.is_cuda:  # Triton's interpreter runs programs one after the other: one for all units
        return Tiling(_SMALLEST, _power(hidden))
    return tiling(batch, hidden, rank, dtype.itemsize, _chip(v.device), _precision())


def launch(kernel: str, z: Tensor, v: Tensor, *given: Any, **options: Any) -> None:
    """Run a kernel of `fused_kernels` on all programs.

    Args:
        kernel: its name.
        z: (T, B, R), of the operands' dtype.
        v: (R, H).
        given: its tensors.
        options: its choices.
    """
    from rankwise.layers.recurrent import fused_kernels  # Triton is not everywhere

    (steps, batch, rank), hidden, tiles = z.shape, v.shape[1], _tiles(v, z.dtype, z.shape[1])
    assert tiles is not None
    groups, programs, codes = tiles.groups(batch), tiles.programs(hidden), _power(rank)
    parts = z.new_empty(groups, programs, tiles.rows, codes, dtype=torch.float32)
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device_of(z):
        getattr(fused_kernels, kernel)[(programs, groups)](
            *given,
            parts,
            z.new_zeros(groups, 32, dtype=torch.int32),
            steps,
            batch,
            hidden,
            rank,
            P=programs,
            PP=_power(programs, 1),
            BM=tiles.rows,
            BN=tiles.units,
            BR=codes,
            SHARE=_power(-(-tiles.rows * codes // programs), 1),
            PRECISION=_precision(),
            INTERPRETED=not z.is_cuda,
            num_warps=tiles.units // 4,
            # A load moved before the wait that precedes it would read an older step's.
            num_stages=1,
            launch_cooperative_grid=True,
            **options,
        )


def _power(count: int, least: int = _SMALLEST) -> int:
    """The next power of two."""
    return max(least, 1 << (count - 1).bit_length())


def _precision() -> str:
    cudnn: Any = torch.backends.cudnn
    own = cudnn.rnn.fp32_precision
    given = cudnn.fp32_precision if own == "none" else own
    return "tf32x3" if given == "ieee" else "tf32"


def gradient_of_v(d_z: Tensor, output: Tensor, *, reverse: bool) -> Tensor:
    """That of V (R, H) from those of the codes (T, B, R) and the hidden states (T, B, H).

    Step t's codes are V h of the step before it; the first step's are no product of V.
    """
    later, before = (d_z[:-1], output[1:]) if reverse else (d_z[1:], output[:-1])
    return later.flatten(0, 1).t() @ before.flatten(0, 1)
