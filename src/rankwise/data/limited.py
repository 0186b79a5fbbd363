"""The same data set with a smaller training part, for quick tries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rankwise.data.pairs import PairSplit
from rankwise.data.splits import SPLIT_SEED, DataSet, Examples, Inputs, ReadAhead, read
from rankwise.errors import OptionError


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some of the examples of a part, under numbers of their own."""

    whole: Examples
    numbers: Tensor  # (n,) int64

    @property
    def unit(self) -> str:
        """That of the whole."""
        return self.whole.unit

    @property
    def noun(self) -> str:
        """That of the whole."""
        return self.whole.noun

    @property
    def units(self) -> int:
        """That of the whole."""
        return self.whole.units

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, chosen: Tensor) -> tuple[Inputs, Tensor]:
        """Inputs and targets of these examples (B,)."""
        return self.whole.take(self.numbers[chosen])

    def ahead(self, order: Iterable[Tensor]) -> Iterator[tuple[Inputs, Tensor]]:
        """Batches of these examples, ahead of time if the whole can do that."""
        yield from read(self.whole, (self.numbers[chosen] for chosen in order))

    def release(self) -> None:
        """End what prepares those of the whole."""
        if isinstance(self.whole, ReadAhead):
            self.whole.release()

    def for_epoch(self, draw: int, streams: int = 0) -> Self:
        """The same numbers of what the whole is in that pass."""
        return type(self)(self.whole.for_epoch(draw, streams), self.numbers)


@dataclass(frozen=True, eq=False)
class Limited:
    """A data set whose training part is a part of another's.

    Of images (and other examples without an order) it is a fixed random choice, of a text its
    beginning.
    """

    whole: DataSet
    limit: int

    def __post_init__(self) -> None:
        if not 1 <= self.limit <= len(self.whole.train):
            raise OptionError(
                f"limit={self.limit:,}: {self.whole.name} has {len(self.whole.train):,} "
                f"{self.whole.train.noun}s to train with; choose at most so many, or no limit"
            )

    @property
    def task(self) -> str:
        """That of the whole."""
        return self.whole.task

    @property
    def name(self) -> str:
        """That of the whole."""
        return self.whole.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of the whole."""
        return self.whole.classes

    @property
    def train(self) -> Examples:
        """The chosen ones."""
        count = len(self.whole.train)
        numbers = torch.arange(count)
        if self.task == "classification":
            generator = torch.Generator().manual_seed(SPLIT_SEED)
            numbers = torch.randperm(count, generator=generator)
        if isinstance(self.whole.train, PairSplit):  # which knows how long they are
            return self.whole.train.some(numbers[: self.limit])
        return Chosen(self.whole.train, numbers[: self.limit])

    @property
    def validation(self) -> Examples:
        """All of them."""
        return self.whole.validation

    @property
    def test(self) -> Examples:
        """All of them."""
        return self.whole.test

    @property
    def checksum(self) -> str:
        """That of the whole."""
        return self.whole.checksum
