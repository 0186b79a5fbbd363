"""The order in which examples are read: shuffled, in streams, or by length.

Shapes: `N` examples of a part, `B` of a batch, `C` channels, `H` height, `W` width, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from rankwise.data.parts import IGNORED, DataSet, Examples, InPasses, Inputs, ReadAhead, Uneven
from rankwise.errors import DataError, OptionError

# Batches of examples that are sorted by length before they are cut: more fill up less, and leave
# fewer ways to meet.
POOL = 50


def steps_per_epoch(split: Examples, batch_size: int) -> int:
    """Whole global batches in one pass; the rest of the examples wait for another shuffle.

    Raises:
        OptionError: `batch_size` is below 1.
        DataError: the split does not fill one batch.
    """
    if batch_size < 1:
        raise OptionError(f"batch_size={batch_size}; a batch holds at least 1 {split.noun}")
    if len(split) < batch_size:
        raise DataError(
            f"{len(split):,} {split.noun}s do not fill one batch of {batch_size:,}; "
            f"lower the batch size to at most {len(split):,}"
        )
    return len(split) // batch_size


def batches(
    split: Examples,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    worker: int = 0,
    workers: int = 1,
    start: int = 0,
    streams: bool = False,
) -> Generator[tuple[Inputs, Tensor]]:
    """One pass over a split, in whole batches: shuffled, or in parallel streams.

    Examples of different length are met by others of like length. The order depends on seed and
    epoch alone: the workers of one run cut the same global batches into disjoint parts, and a run
    resumed at `start` reads what it would have read. Whoever stops before the end closes the pass
    (`contextlib.closing`): its batches may be prepared ahead.

    Args:
        split: what to read.
        batch_size: examples in a global batch, that is of all workers together.
        seed: of the run, at least 0.
        epoch: passes before this one.
        worker: which part of each batch, from 0.
        workers: parts that a batch is cut into; divides `batch_size`.
        start: global batches to skip.
        streams: cut the split into `batch_size` runs of examples that follow each other, and give
            every batch the next one of each: place b of a batch reads on where place b of the batch
            before it ended.

    Returns:
        Pairs of inputs and targets, stacked, B = batch_size / workers: images (B, C, H, W) and
        labels (B,), tokens (B, T) and their next tokens (B, T), or a source (B, S) with a target
        (B, T) and its next tokens (B, T).

    Raises:
        OptionError: a number out of its range.
        DataError: the split does not fill one batch.
    """
    steps = steps_per_epoch(split, batch_size)
    if workers < 1 or not 0 <= worker < workers:
        raise OptionError(f"worker={worker} of workers={workers}; workers count from 0")
    if batch_size % workers:
        raise OptionError(
            f"batch_size={batch_size} counts the {split.noun}s of all workers together and is not "
            f"divisible by workers={workers}; "
            f"{max(workers, batch_size - batch_size % workers)} would be"
        )
    if not 0 <= start <= steps:
        raise OptionError(f"start={start}; an epoch of this split has {steps} batches")
    if seed < 0 or epoch < 0:
        raise OptionError(f"seed={seed}, epoch={epoch}; neither may be negative")
    split = split.for_pass(epoch) if isinstance(split, InPasses) else split
    # A number apart from the order's, so that the one says nothing of the other.
    part = split.for_epoch(_drawn(seed, epoch, 1), batch_size if streams else 0)
    if streams:
        order = torch.arange(batch_size * steps).view(batch_size, steps).T.flatten()
    else:
        generator = torch.Generator().manual_seed(_drawn(seed, epoch))
        order = torch.randperm(len(split), generator=generator)
        if isinstance(part, Uneven):
            order = alike(order, part.lengths, batch_size, generator)
    return read(part, _order(batch_size, steps, order, worker, workers, start))


def read(split: Examples, order: Iterable[Tensor]) -> Generator[tuple[Inputs, Tensor]]:
    """Inputs and targets of some batches, one after the other; ahead of time where a split can.

    Args:
        split: what to read.
        order: (B,) numbers of the examples of each batch.
    """
    if isinstance(split, ReadAhead):
        yield from split.ahead(order)
        return
    for chosen in order:
        yield split.take(chosen)


@contextmanager
def released(splits: DataSet) -> Generator[None]:
    """Ends the processes that prepare the examples of a data set, if it has any, afterwards."""
    try:
        yield
    finally:
        for part in (splits.train, splits.validation, splits.test):
            if isinstance(part, ReadAhead):
                part.release()


def _order(
    batch_size: int, steps: int, order: Tensor, worker: int, workers: int, start: int
) -> Iterator[Tensor]:
    for step in range(start, steps):
        yield order[step * batch_size : (step + 1) * batch_size][worker::workers]


def _drawn(*numbers: int) -> int:
    """A number from those of a pass, mixed: with seed + epoch, two seeds would share epochs."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


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
