"""What a data set is: three parts with examples in them, and what training asks of a part.

Shapes: `N` examples of a part, `B` of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

# A target that is none: torch's losses leave it out.
IGNORED = -100
# Which examples validate and test, or are left by a limit, is part of the data set, so no run's
# seed touches it.
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


@runtime_checkable
class Uneven(Protocol):
    """Examples that a batch fills up to the length of its longest."""

    @property
    def lengths(self) -> Tensor:
        """(N,) int64: how long each one is."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class DataSet:
    """Examples in three parts. Every kind of examples has a class that says its task.

    Attributes:
        task: what is learned: classification, language modelling, or translation.
        name: how the records call it.
        classes: meaning of a target: a label or a token is an index into these.
        train: what trains.
        validation: what chooses.
        test: what is looked at once, at the end.
        checksum: first 16 hexadecimal digits of the SHA-256 of the content read.
    """

    task: ClassVar[str]
    name: str
    classes: tuple[str, ...]
    train: Examples
    validation: Examples
    test: Examples
    checksum: str


def checksum_of(contents: Iterable[bytes | bytearray | str | np.ndarray]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of some contents, one after the other."""
    digest = hashlib.sha256()
    for content in contents:
        held = np.ascontiguousarray(content).data if isinstance(content, np.ndarray) else content
        digest.update(held.encode() if isinstance(held, str) else held)
    return digest.hexdigest()[:16]
