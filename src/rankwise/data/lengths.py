"""Examples of different length: what a batch fills them up with, and which ones go together.

Shapes: `N` examples, `B` of a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rankwise.data.splits import Examples, Inputs

# A target that is none: torch's losses leave it out.
IGNORED = -100
# Batches of examples that are sorted by length before they are cut: more fill up less, and leave
# fewer ways to meet.
POOL = 50


@runtime_checkable
class Uneven(Protocol):
    """Examples that a batch fills up to the length of its longest."""

    @property
    def lengths(self) -> Tensor:
        """(N,) int64: how long each one is."""
        ...


def alike(order: Tensor, lengths: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """The same order, but for batches of examples of like length.

    Runs of `POOL` batches are sorted by length and cut into batches, and these are shuffled, so
    that no length has a time of its own.

    Args:
        order: (N,) numbers of examples, shuffled.
        lengths: (N,) of each number.
        batch_size: examples of a global batch.
        generator: of the shuffling.

    Returns:
        Whole batches after each other; what fills none is left out.
    """
    whole = order[: len(order) // batch_size * batch_size]
    runs = whole.split(POOL * batch_size)
    batches = torch.cat([run[lengths[run].argsort(stable=True)] for run in runs])
    batches = batches.view(-1, batch_size)
    return batches[torch.randperm(len(batches), generator=generator)].flatten()


def example(split: Examples) -> tuple[Inputs, int]:
    """What sizes are counted for: one example, of median length where they differ.

    Returns:
        The inputs, of one example, and the units that it predicts.
    """
    number = 0
    if isinstance(split, Uneven):
        number = int(split.lengths.argsort(stable=True)[len(split) // 2])
    inputs, targets = split.take(torch.tensor([number]))
    return inputs, int((targets != IGNORED).sum())
