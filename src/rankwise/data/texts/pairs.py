"""Texts in pairs, source and target, for translation: a file, a folder in two languages, Multi30k.

A source ends in an end mark; a target is read behind a start mark and predicts itself with an end
mark. Pairs with an empty side are left out. Those with a side longer than the context do not train,
as in the published programs, but validate and test: nothing is cut.

Shapes: `N` pairs, `B` of a batch, `S` source tokens, `T` target tokens, `L` tokens in all.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.data.parts import IGNORED, DataSet, checksum_of
from rankwise.data.texts.coding import END, PADDING, START, Coding, coding
from rankwise.data.texts.parallel import read_pairs
from rankwise.data.texts.vocabulary import LEVELS
from rankwise.errors import DataError, OptionError, unknown

Pair = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Lines:
    """Lines of tokens, one behind the other.

    Attributes:
        tokens: (L,) int32.
        begins: (N,) where each line begins.
        lengths: (N,) of each, at least 1.
    """

    tokens: Tensor
    begins: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, lines: Iterable[Sequence[int]]) -> Lines:
        """From lists of numbers, of which one at a time need be in memory."""
        tokens, counts = array("i"), array("q")
        for line in lines:
            tokens.extend(line)
            counts.append(len(line))
        lengths = torch.tensor(counts, dtype=torch.int64)
        return cls(torch.tensor(tokens, dtype=torch.int32), lengths.cumsum(0) - lengths, lengths)

    def padded(self, chosen: Tensor) -> Tensor:
        """These lines (B,), filled up to the longest of them, (B, T) int64."""
        place = torch.arange(int(self.lengths[chosen].max()))
        inside = place < self.lengths[chosen][:, None]
        index = torch.where(inside, self.begins[chosen][:, None] + place, 0)
        return torch.where(inside, self.tokens[index], PADDING).long()


@dataclass(frozen=True, eq=False)
class PairSplit:
    """One part of a text in pairs.

    Attributes:
        sources: N lines, an end mark behind each.
        targets: N lines between a start and an end mark.
        references: the targets as a translation of known tokens would write them; training has
            none.
        coding: what the tokens are.
    """

    unit = "token"  # of a target, its end mark among them
    noun = "pair"
    sources: Lines
    targets: Lines
    references: tuple[str, ...]
    coding: Coding

    @property
    def units(self) -> int:
        """Tokens that a pair predicts in the mean, rounded."""
        return max(1, round(int((self.targets.lengths - 1).sum()) / max(1, len(self))))

    @cached_property
    def lengths(self) -> Tensor:
        """(N,): tokens of both sides."""
        return self.sources.lengths + self.targets.lengths

    def __len__(self) -> int:
        return len(self.sources.lengths)

    def take(self, chosen: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Pairs by number: sources (B, S) with targets as they are read (B, T); what follows each.

        Rows end in padding; what follows there (B, T) is `IGNORED`.
        """
        whole = self.targets.padded(chosen)
        following = whole[:, 1:].masked_fill(whole[:, 1:] == PADDING, IGNORED)
        return (self.sources.padded(chosen), whole[:, :-1]), following

    def for_epoch(self, draw: int, streams: int = 0) -> PairSplit:
        """Every pass reads the same pairs."""
        return self

    def some(self, numbers: Tensor) -> PairSplit:
        """These pairs (n,), under numbers of their own."""
        sides = [
            replace(side, begins=side.begins[numbers], lengths=side.lengths[numbers])
            for side in (self.sources, self.targets)
        ]
        references = self.references and tuple(self.references[i] for i in numbers.tolist())
        return PairSplit(sides[0], sides[1], references, self.coding)


@dataclass(frozen=True, eq=False, kw_only=True)
class PairSplits(DataSet):
    """A text in pairs in three parts; its classes are the vocabulary of both sides.

    Attributes:
        left_out: pairs of the training part that are longer than the context.
    """

    task: ClassVar[str] = "translation"
    train: PairSplit
    validation: PairSplit
    test: PairSplit
    left_out: int


def load_pairs(
    name: str,
    *,
    context: int = 128,
    level: str = "words",
    min_count: int = 2,
    languages: str | None = None,
    vocabulary: int = 8_000,
    tokenizer: str | None = None,
) -> PairSplits:
    """Read a text in pairs into memory.

    Args:
        name: `pairs:` and the path of a file, per line a source, a tab and its target (the last
            tenth tests, the one before validates); or of a folder with train.de, train.en,
            val.de, ... ; or `multi30k`, also with the folder of its files behind a colon.
        context: tokens of a side at most in the pairs that train, end marks among them.
        level: "bytes", "characters", "words" or "bpe".
        min_count: how often a word must occur in the training part, both sides together.
        languages: source and target, "de-en"; needed where a folder has no first and second one.
        vocabulary: subwords to learn from both sides of the training part, at least 257.
        tokenizer: a tokenizer.json to take instead of learning.

    Raises:
        OptionError: an unknown name or level, a number below 1, or languages that are missing or
            make no sense.
        DataError: a file is missing or malformed, or a part has no pairs.
    """
    if level not in LEVELS:
        raise OptionError(unknown("token level", level, LEVELS))
    for option, number in (("context", context), ("min_count", min_count)):
        if number < 1:
            raise OptionError(f"{option}={number}; it must be at least 1")
    parts = [_filled(part) for part in read_pairs(name, languages)]
    for part, what in zip(parts, ("training", "validation", "test"), strict=True):
        if not part:
            raise DataError(f"{name}: its {what} part has no pairs of lines that are not empty")
    lines = [line for pair in parts[0] for line in pair]
    sizes = {"min_count": min_count, "vocabulary": vocabulary}
    code = coding(level, lines, name=name, tokenizer=tokenizer, **sizes)
    split = [_split(part, code, references=number > 0) for number, part in enumerate(parts)]
    train = _within(split[0], context)
    if not len(train):
        shortest = int(torch.maximum(split[0].sources.lengths, split[0].targets.lengths - 1).min())
        raise DataError(
            f"{name}: no pair of its training part has at most context={context} tokens a side; "
            f"the shortest one has {shortest}; raise the context"
        )
    _, _, path = name.partition(":")
    return PairSplits(
        name=Path(path).name if name.startswith("pairs:") else name,
        classes=code.classes,
        train=train,
        validation=split[1],
        test=split[2],
        checksum=checksum_of([json.dumps(parts)]),
        left_out=len(split[0]) - len(train),
    )


def _filled(pairs: Iterable[Pair]) -> list[Pair]:
    return [pair for pair in pairs if pair[0].strip() and pair[1].strip()]


def _split(pairs: Sequence[Pair], code: Coding, *, references: bool) -> PairSplit:
    return PairSplit(
        Lines.of([*code.encode(source), END] for source, _ in pairs),
        Lines.of([START, *code.encode(target), END] for _, target in pairs),
        tuple(code.written(target) for _, target in pairs) if references else (),
        code,
    )


def _within(part: PairSplit, context: int) -> PairSplit:
    """The pairs whose sides both have at most so many tokens, the start mark not counted."""
    kept = (part.sources.lengths <= context) & (part.targets.lengths - 1 <= context)
    return part.some(kept.nonzero().flatten())
