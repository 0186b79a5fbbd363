"""Some examples of a part, for quick tries with fewer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from rankwise.data.parts import SPLIT_SEED, DataSet, Examples, Inputs, ReadAhead
from rankwise.data.reading import read
from rankwise.data.texts.pairs import PairSplit
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


def limited(whole: DataSet, limit: int) -> DataSet:
    """The same data set with a part of its training part: what judges stays whole.

    Of images it is a fixed random choice, of a text or of pairs the beginning.

    Args:
        whole: the data set.
        limit: examples that train, at least 1.

    Raises:
        OptionError: there are not so many.
    """
    train = whole.train
    if not 1 <= limit <= len(train):
        raise OptionError(
            f"limit={limit:,}: {whole.name} has {len(train):,} {train.noun}s to train with; choose "
            "at most so many, or no limit"
        )
    numbers = torch.arange(len(train))
    if whole.task == "classification":
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        numbers = torch.randperm(len(train), generator=generator)
    if isinstance(train, PairSplit):  # which knows how long they are
        return replace(whole, train=train.some(numbers[:limit]))
    return replace(whole, train=Chosen(train, numbers[:limit]))
