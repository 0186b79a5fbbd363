"""Images that stay in their files: decoded while the network trains, a few batches ahead.

Threads decode: Pillow lets go of Python's lock while it reads, decodes and scales, so that two
threads decode twice as fast as one; they share memory with the loop, end with it, and are not there
for signals to hit. Which thread decodes what changes nothing: each image goes to its place in its
batch.

Shapes: `B` images of a batch, `C` channels, `S` side in pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rankwise.data.augment import Augment, draws
from rankwise.data.decode import decode
from rankwise.data.folder import Files, cut
from rankwise.data.splits import Normalise, statistics
from rankwise.data.tree import path_of

AHEAD = 2  # batches that are being prepared while one is used
AT_ONCE = 8  # images of one piece of work
SAMPLED = 1_024  # training images whose channels' mean and deviation stand for all


@dataclass(frozen=True, eq=False, kw_only=True)
class Streamed:
    """One part of a set of image files.

    Attributes:
        files: the set.
        chosen: (N,) which of its files are this part.
        normalise: of bytes, by the training part.
        threads: how many decode; what they read does not depend on it.
        augment: varies images in a pass over them; what is taken outside one stays as it is.
        draw: the number of the pass.
    """

    files: Files
    chosen: np.ndarray
    normalise: Normalise
    threads: int
    augment: Augment | None = None
    draw: int | None = None

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
        return len(self.chosen)

    def for_epoch(self, draw: int, streams: int = 0) -> Streamed:
        """The same images in every pass, or each as that pass varies it."""
        return self if self.augment is None else replace(self, draw=draw)

    def take(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, S, S) in channels-last order and labels (B,), decoded now."""
        with _threads(self.threads) as pool:
            return _finished(self._begin(pool, chosen))

    def ahead(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches one after the other; the next ones are decoded while one is used.

        Args:
            order: (B,) numbers of the examples of each batch.

        Raises:
            DataError: an image is damaged: when its batch is due.
        """
        # Small batches leave threads idle if only a few are begun.
        enough = 2 * self.threads * AT_ONCE
        begun: deque[_Batch] = deque()
        with _threads(self.threads) as pool:
            for chosen in order:
                begun.append(self._begin(pool, chosen))
                if len(begun) > AHEAD and sum(len(b.labels) for b in begun) > enough:
                    yield _finished(begun.popleft())
            while begun:
                yield _finished(begun.popleft())

    def _begin(self, pool: ThreadPoolExecutor, chosen: Tensor) -> _Batch:
        files = self.files
        numbers = self.chosen[chosen.numpy()]
        shape = (len(numbers), files.size, files.size, files.channels)
        images = np.empty(shape, np.float32)
        drawn = None
        if self.augment is not None and self.draw is not None:
            drawn = draws(self.draw, chosen)
        pieces = [
            pool.submit(self._fill, images, numbers, drawn, start)
            for start in range(0, len(numbers), AT_ONCE)
        ]
        return _Batch(images, torch.from_numpy(files.listing.labels[numbers]), pieces)

    def _fill(
        self, images: np.ndarray, numbers: np.ndarray, drawn: np.ndarray | None, start: int
    ) -> None:
        """Decode one piece of a batch into its place."""
        mean, deviation = self.normalise.mean.view(-1).numpy(), self.normalise.deviation.view(-1)
        for place in range(start, min(start + AT_ONCE, len(numbers))):
            name = self.files.listing.names[numbers[place]]
            pixels = self._pixels(name, None if drawn is None else drawn[place])
            # numpy in place of torch, whose operations would start threads of their own here.
            np.subtract(pixels, mean, out=images[place], dtype=np.float32)
            np.divide(images[place], deviation.numpy(), out=images[place])

    def _pixels(self, name: str, drawn: np.ndarray | None) -> np.ndarray:
        files, content = self.files, self.files.tree.read(name)
        if self.augment is None or drawn is None:
            return files.decoded(content, name)
        if not self.augment.resized:
            return self.augment.one(files.decoded(content, name), drawn)
        box = partial(self.augment.box, drawn)
        path = path_of(files.tree, name)
        pixels = decode(content, path, channels=files.channels, size=files.size, crop=box)
        return self.augment.one(pixels, drawn)


@dataclass(frozen=True, eq=False, kw_only=True)
class StreamedSplits:
    """Image files in three parts.

    Attributes:
        name: how the records call the set.
        classes: a label is an index into these.
        train: what trains.
        validation: what chooses.
        test: what is looked at once, at the end.
        checksum: first 16 hexadecimal digits of the SHA-256 of all names and sizes; to read every
            file for it would take longer than some trainings.
    """

    name: str
    classes: tuple[str, ...]
    train: Streamed
    validation: Streamed
    test: Streamed
    checksum: str

    @property
    def task(self) -> str:
        """Classification."""
        return "classification"


@dataclass(frozen=True, eq=False)
class _Batch:
    images: np.ndarray  # (B, S, S, C) float32, filled by the pieces
    labels: Tensor
    pieces: list[Future[None]]


def stream(
    files: Files, *, threads: int | None = None, augment: Augment | None = None
) -> StreamedSplits:
    """Read listed files while they are trained on.

    Images are those that `folder.read` would keep, bit for bit; the mean and deviation of a channel
    are those of 1,024 training images, evenly spaced.

    Args:
        files: what to read.
        threads: how many decode; by default as many as there are cores, and at most eight.
        augment: of training images.

    Raises:
        DataError: a class is too small to be cut, or a sampled image is damaged.
    """
    threads = cores() if threads is None else threads
    digest = hashlib.sha256()
    for name, size in zip(files.listing.names, files.listing.sizes, strict=True):
        digest.update(f"{name}\0{size}\0".encode())
    train, validation, test = cut(files.listing, files.fractions)
    sampled = train[np.linspace(0, len(train) - 1, min(SAMPLED, len(train))).astype(int)]
    with _threads(threads) as pool:
        names = [files.listing.names[number] for number in sampled]
        pixels = list(pool.map(lambda name: files.decoded(files.tree.read(name), name), names))
    normalise = statistics(np.stack(pixels))
    return StreamedSplits(
        name=files.name,
        classes=files.listing.classes,
        train=Streamed(
            files=files, chosen=train, normalise=normalise, threads=threads, augment=augment
        ),
        validation=Streamed(files=files, chosen=validation, normalise=normalise, threads=threads),
        test=Streamed(files=files, chosen=test, normalise=normalise, threads=threads),
        checksum=digest.hexdigest()[:16],
    )


def cores() -> int:
    """Threads for one of the processes on this machine: its share of the cores, at most eight."""
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


def _finished(batch: _Batch) -> tuple[Tensor, Tensor]:
    for piece in batch.pieces:
        piece.result()
    return torch.from_numpy(batch.images).movedim(-1, 1), batch.labels
