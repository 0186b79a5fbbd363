"""Images that stay in their files: decoded while the network trains, a few batches ahead.

Processes decode (`images.decoders`), each fed by a thread, which lets it write into the image's
place in its batch. Which process decodes what changes nothing: what happens to an image follows
from the pass and its number.

Shapes: `B` images of a batch, `C` channels, `S` side in pixels.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rankwise.data.images.augment import Augment
from rankwise.data.images.folder import Files, cut
from rankwise.data.images.normalise import Normalise, statistics
from rankwise.data.images.splits import OfImages
from rankwise.data.parts import DataSet, checksum_of
from rankwise.errors import DataError
from rankwise.images.decoders import Decoders
from rankwise.images.tree import Archive
from rankwise.images.variation import How, picture

AHEAD = 2  # batches that are being prepared while one is used
AT_ONCE = 8  # images of one piece of work
SAMPLED = 1_024  # training images whose channels' mean and deviation stand for all


@dataclass(frozen=True, eq=False, kw_only=True)
class Streamed(OfImages):
    """One part of a set of image files.

    Attributes:
        files: the set.
        decoders: the processes that decode; what they read does not depend on their number.
        chosen: (N,) which of the files are this part.
        normalise: of bytes, by the training part.
    """

    files: Files
    decoders: Decoders
    chosen: np.ndarray
    normalise: Normalise

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, S, S) in channels-last order and labels (B,), decoded here and now."""
        batch = self._empty(chosen)
        for place, name in enumerate(batch.names):
            drawn = None if batch.drawn is None else batch.drawn[place]
            batch.images[place] = picture(self.files.tree, name, self._how, drawn)
        return self._finished(batch)

    def ahead(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches one after the other; the next ones are decoded while one is used.

        Args:
            order: (B,) numbers of the examples of each batch.

        Raises:
            DataError: an image is damaged: when its batch is due.
        """
        # Small batches leave processes idle if only a few are begun.
        enough = 2 * self.decoders.count * AT_ONCE
        begun: deque[_Batch] = deque()
        with _threads(self.decoders.count) as pool:
            for chosen in order:
                begun.append(self._begin(pool, chosen))
                if len(begun) > AHEAD and sum(len(b.names) for b in begun) > enough:
                    yield self._finished(begun.popleft())
            while begun:
                yield self._finished(begun.popleft())

    def release(self) -> None:
        """End the processes; they start anew when they are needed."""
        self.decoders.close()

    @property
    def _how(self) -> How:
        augment = self.augment if self.draw is not None else None
        return replace(
            self.files.how,
            padding=0 if augment is None else augment.padding,
            resized=augment is not None and augment.resized,
        )

    def _empty(self, chosen: Tensor) -> _Batch:
        numbers, files = self.chosen[chosen.numpy()], self.files
        names = [files.listing.names[number] for number in numbers]
        images = np.empty((len(names), files.size, files.size, files.channels), np.uint8)
        labels = torch.from_numpy(files.listing.labels[numbers])
        return _Batch(images, labels, names, self.drawn(chosen), [])

    def _begin(self, pool: ThreadPoolExecutor, chosen: Tensor) -> _Batch:
        batch = self._empty(chosen)
        for start in range(0, len(batch.names), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            drawn = None if batch.drawn is None else batch.drawn[part]
            work = (batch.images[part], batch.names[part], self._how, drawn)
            batch.pieces.append(pool.submit(self.decoders.fill, *work))
        return batch

    def _finished(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        for piece in batch.pieces:
            piece.result()
        return self.normalise(torch.from_numpy(batch.images).movedim(-1, 1)), batch.labels


@dataclass(frozen=True, eq=False, kw_only=True)
class StreamedSplits(DataSet):
    """Image files in three parts.

    Their checksum is that of all names and sizes; to read every file for it would take longer than
    some trainings.
    """

    task: ClassVar[str] = "classification"
    train: Streamed
    validation: Streamed
    test: Streamed


@dataclass(frozen=True, eq=False)
class _Batch:
    images: np.ndarray  # (B, S, S, C) uint8, filled by the pieces
    labels: Tensor
    names: list[str]
    drawn: np.ndarray | None  # (B, D)
    pieces: list[Future[None]]


def stream(
    files: Files, *, workers: int | None = None, augment: Augment | None = None
) -> StreamedSplits:
    """Read listed files while they are trained on.

    Images are those that `folder.read` would keep, bit for bit; the mean and deviation of a channel
    are those of 1,024 training images, evenly spaced.

    Args:
        files: what to read.
        workers: processes that decode; by default as many as there are cores, and at most eight.
        augment: of training images.

    Raises:
        DataError: a class is too small to be cut, a sampled image is damaged, or the files are in a
            tar archive, of which one file cannot be read alone.
    """
    if isinstance(files.tree, Archive) and not files.tree.by_name:
        raise DataError(
            f"{files.tree.place} cannot be streamed: a tar archive is read as a whole; unpack it, "
            "or pack it as zip"
        )
    sized = zip(files.listing.names, files.listing.sizes, strict=True)
    decoders = Decoders(files.tree.place, cores() if workers is None else workers)
    neutral = Normalise(torch.zeros(files.channels, 1, 1), torch.ones(files.channels, 1, 1))
    train, validation, test = (
        Streamed(files=files, decoders=decoders, chosen=part, normalise=neutral)
        for part in cut(files.listing, files.fractions)
    )
    count = len(train)
    sampled = torch.linspace(0, count - 1, min(SAMPLED, count), dtype=torch.float64).long()
    try:
        batches = train.ahead(sampled.split(64))
        pixels = [images.movedim(1, -1).byte().numpy() for images, _ in batches]
    except BaseException:
        decoders.close()
        raise
    normalise = statistics(np.concatenate(pixels))
    return StreamedSplits(
        name=files.name,
        classes=files.listing.classes,
        train=replace(train, normalise=normalise, augment=augment),
        validation=replace(validation, normalise=normalise),
        test=replace(test, normalise=normalise),
        checksum=checksum_of(f"{name}\0{size}\0" for name, size in sized),
    )


def cores() -> int:
    """Processes for one of the trainers on this machine: its share of the cores, at most eight."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, (allowed or 1) // beside))


@contextmanager
def _threads(count: int) -> Generator[ThreadPoolExecutor]:
    """Threads that are gone afterwards: at the end, at an error, where the reader turns away."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="rankwise-decode")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
