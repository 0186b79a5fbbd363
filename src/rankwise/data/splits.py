"""Data in three parts, labelled images among them, and the order in which training reads them.

Shapes: `N` images, `C` channels, `H` height, `W` width.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from rankwise.data.augment import Augment
from rankwise.data.lengths import Uneven, alike
from rankwise.data.normalise import Normalise, statistics
from rankwise.errors import DataError, OptionError
from rankwise.images.variation import draws

# Which images validate and test is part of the data set, so no run's seed touches it.
SPLIT_SEED = 2021


Inputs = Tensor | tuple[Tensor, ...]  # what a network is called with


class Examples(Protocol):
    """One part of a data set: numbered examples, each an input and its target or targets."""

    @property
    def unit(self) -> str:
        """What losses are means over and what speed counts: an image, a token."""
        ...

    @property
    def noun(self) -> str:
        """What one example is called."""
        ...

    @property
    def units(self) -> int:
        """Units in one example; their mean where examples differ."""
        ...

    def __len__(self) -> int: ...

    def take(self, chosen: Tensor) -> tuple[Inputs, Tensor]:
        """Inputs and targets of these examples (B,), stacked; targets may be `IGNORED`."""
        ...

    def for_epoch(self, draw: int, streams: int = 0) -> Examples:
        """The examples of one pass.

        Args:
            draw: a random number of that pass, at least 0.
            streams: so many runs of examples will be read in order, each to its end; 0: shuffled.
        """
        ...


@runtime_checkable
class ReadAhead(Protocol):
    """Examples that are prepared while those before them are used."""

    def ahead(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """What `take` gives for each of these batches, one after the other."""
        ...

    def release(self) -> None:
        """End what prepares them; it begins anew when it is needed."""
        ...


@runtime_checkable
class InPasses(Protocol):
    """Examples of which every pass reads others."""

    def for_pass(self, epoch: int) -> Examples:
        """Those of one pass, from 0."""
        ...


class DataSet(Protocol):
    """What the training loop needs of a data set: its parts, its task and where it comes from."""

    @property
    def task(self) -> str:
        """What is learned: classification, language modelling, or translation."""
        ...

    @property
    def name(self) -> str:
        """How the records call it."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Meaning of a target: a label or a token is an index into these."""
        ...

    @property
    def train(self) -> Examples:
        """What trains."""
        ...

    @property
    def validation(self) -> Examples:
        """What chooses."""
        ...

    @property
    def test(self) -> Examples:
        """What is looked at once, at the end."""
        ...

    @property
    def checksum(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the content read."""
        ...


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set of images, whole in memory.

    Attributes:
        pixels: (N, C, H, W) float32 as it is read, or uint8, a quarter of the memory, which
            `normalise` turns into float32 batch by batch.
        labels: (N,) int64.
        normalise: of bytes.
        augment: varies images in a pass over them; what is taken outside one stays as it is.
        draw: the number of the pass.
    """

    pixels: Tensor
    labels: Tensor
    normalise: Normalise | None = None
    augment: Augment | None = None
    draw: int | None = None

    @property
    def images(self) -> Tensor:
        """All images as they are read, (N, C, H, W) float32; of bytes a copy, made anew."""
        if self.normalise is None:
            return self.pixels
        return self.normalise(self.pixels.contiguous())

    @property
    def unit(self) -> str:
        """An image: it has one label."""
        return "image"

    @property
    def noun(self) -> str:
        """An image."""
        return "image"

    @property
    def units(self) -> int:
        """One."""
        return 1

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B,) by number."""
        if self.normalise is None:
            taken = self.pixels[chosen]
        else:  # along the last dimension lie the colours of a pixel: an image is copied as a piece
            taken = self.pixels.movedim(1, -1).index_select(0, chosen).movedim(-1, 1)
        if self.augment is not None and self.draw is not None:
            taken = self.augment(taken, draws(self.draw, chosen.numpy()))
        return taken if self.normalise is None else self.normalise(taken), self.labels[chosen]

    def for_epoch(self, draw: int, streams: int = 0) -> Split:
        """The same images in every pass, or each as that pass varies it."""
        return self if self.augment is None else replace(self, draw=draw)


@dataclass(frozen=True, eq=False, kw_only=True)
class Splits:
    """Images in three parts: what trains, what chooses, and what is looked at once, at the end."""

    name: str
    classes: tuple[str, ...]  # a label is an index into these
    train: Split
    validation: Split
    test: Split
    checksum: str  # first 16 hexadecimal digits of the SHA-256 of the content read

    @property
    def task(self) -> str:
        """Classification."""
        return "classification"


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


def stratified(
    labels: np.ndarray, fractions: Sequence[float], classes: Sequence[str]
) -> list[np.ndarray]:
    """Cut indices into a first part and one part for each fraction, alike in every class.

    Args:
        labels: (N,) class of each image.
        fractions: share of each class that goes to the parts after the first; a part gets at
            least one image of each class.
        classes: the name of each label.

    Returns:
        Sorted indices: the rest, then one array for each fraction.

    Raises:
        DataError: a class has fewer images than there are parts.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    parts: list[list[np.ndarray]] = [[] for _ in range(len(fractions) + 1)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < len(parts):
            raise DataError(
                f"class '{classes[label]}' has {len(members)} image(s), too few to give each of "
                f"{len(parts)} splits one; add images or make the splits yourself"
            )
        total = len(members)
        members = members[torch.randperm(len(members), generator=generator).numpy()]
        for part, fraction in enumerate(fractions, start=1):
            count = max(1, round(fraction * total))
            parts[part].append(members[:count])
            members = members[count:]
        parts[0].append(members)
    return [np.sort(np.concatenate(part)) for part in parts]


def normalised(
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[Split, Split, Split]:
    """Turn bytes into training, validation and test splits, scaled by the first one.

    Args:
        parts: training, validation, test: images (N, H, W, C) uint8 and labels (N,).

    Returns:
        The splits: in the training split every channel has mean 0 and standard deviation 1; a
        channel that is constant there is only shifted.
    """
    normalise = statistics(parts[0][0])
    train, validation, test = (
        Split(
            torch.from_numpy(images).movedim(-1, 1),
            torch.from_numpy(labels).long(),
            normalise,
        )
        for images, labels in parts
    )
    return train, validation, test
