"""Language modelling on documents that are streamed: a pass is a stretch of the stream in memory.

How long a stream is, is not known before its end, so a pass is a number of tokens that the user
states. Pass e begins at document e D of the training part, D being what so many tokens take at the
mean length of the documents that are held out, and an eighth more; it is read, tokenised, cut into
windows, and these are shuffled. So a run is resumed without tokenising what came before: documents
are skipped. A ninth or so of them is never read; where documents are short, a pass reads on
into those of the next. At the end of the stream it begins anew.

Shapes: `L` tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rankwise.data.parts import DataSet, checksum_of
from rankwise.data.texts.documents import Documents, Reader, find_documents
from rankwise.data.texts.subwords import Subwords, subwords
from rankwise.data.texts.text import OfWindows, TextSplit
from rankwise.errors import DataError, OptionError, unknown

HELD = 1000  # documents that validate, and as many that test
LEARNED_FROM = 10_000  # documents that subwords are learned from
MARGIN = 1.125
LEVELS = ("bytes", "bpe")


class ByteStream:
    """Documents as UTF-8, a zero byte between them."""

    classes = tuple(chr(number) for number in range(256))
    end = 0

    def encode(self, text: str) -> Tensor:  # -> (L,) int32
        """A number a byte."""
        return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32))


@dataclass(eq=False)
class PassingSplit(OfWindows):
    """The training part of a stream.

    Attributes:
        read: its documents, from a number on.
        code: what tokens are.
        context: T, tokens that a window reads.
        tokens: of a pass.
        stride: documents from the beginning of a pass to that of the next.
        held: documents before the first pass.
        name: for messages.
    """

    read: Reader
    code: Subwords | ByteStream
    context: int
    tokens: int
    stride: int
    held: int
    name: str
    _pass: tuple[int, TextSplit] | None = field(default=None, repr=False)
    _known: int | None = field(default=None, repr=False)  # documents, once the end was seen

    def __len__(self) -> int:
        return self.tokens // self.context

    def take(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Windows of the first pass by number; no more is read than they need."""
        needed = (int(chosen.max()) + 1) * self.context + 1
        return TextSplit(self._stretch(0, needed), self.context).take(chosen)

    def for_epoch(self, draw: int, streams: int = 0) -> TextSplit:
        """The first pass; `for_pass` gives the others."""
        return self.for_pass(0).for_epoch(draw, streams)

    def for_pass(self, epoch: int) -> TextSplit:
        """The windows of one pass; only the last one asked for stays in memory."""
        if self._pass is None or self._pass[0] != epoch:
            self._pass = None
            tokens = self._stretch(epoch * self.stride, len(self) * self.context + 1)
            self._pass = (epoch, TextSplit(tokens, self.context))
        return self._pass[1]

    def _stretch(self, first: int, wanted: int) -> Tensor:
        parts: list[Tensor] = []
        found = 0
        for text in self._from(first):
            part = _marked(self.code, text)
            parts.append(part)
            found += len(part)
            if found >= wanted:
                return torch.cat(parts)[:wanted]
        raise DataError(
            f"{self.name}: all documents that train have {found:,} tokens, fewer than the "
            f"tokens_per_epoch={self.tokens:,} of a pass; lower it"
        )

    def _from(self, first: int) -> Iterator[str]:
        """Every document once, from one on; behind the last comes the first."""
        begin = first if self._known is None else first % max(1, self._known)
        count = 0
        for text in self.read(self.held + begin):
            count += 1
            yield text
        if count:
            self._known = begin + count
        else:  # the stream ends before: how long it is, is known only by reading it
            self._known = sum(1 for _ in self.read(self.held))
            begin = first % max(1, self._known)
            yield from self.read(self.held + begin)
        yield from itertools.islice(self.read(self.held), begin)


@dataclass(frozen=True, eq=False, kw_only=True)
class PassingSplits(DataSet):
    """Documents in three parts; what validates and tests is in memory.

    The checksum is that of the documents held out, the first one that trains, and the vocabulary.
    """

    task: ClassVar[str] = "language modelling"
    train: PassingSplit
    validation: TextSplit
    test: TextSplit


def load_stream(
    name: str,
    *,
    tokens_per_epoch: int = 2_097_152,
    context: int = 128,
    level: str = "bpe",
    vocabulary: int = 8_000,
    tokenizer: str | None = None,
) -> PassingSplits:
    """Open a stream of documents: read those that are held out, and what a vocabulary needs.

    Args:
        name: a key of `documents.PUBLISHED`, from the Hub or, behind a colon, a file or folder.
        tokens_per_epoch: of a pass; in memory at 4 bytes each.
        context: tokens of a window.
        level: "bpe", or "bytes"; characters and words are not known before the end.
        vocabulary: subwords to learn from the first documents that train.
        tokenizer: a tokenizer.json to take instead.

    Raises:
        OptionError: an unknown level, or a number that is too small.
        DataError: documents are missing or malformed, or too few; or a package is missing.
    """
    _check(name, level, context, tokens_per_epoch)
    kind, _, path = name.partition(":")
    found = find_documents(kind, path, HELD)
    first, *held = _beginnings(found, name, LEARNED_FROM if level == "bpe" else 1)
    code: Subwords | ByteStream = ByteStream()
    if level == "bpe":
        code = subwords(first, vocabulary=vocabulary, tokenizer=tokenizer)
    validation, test = (
        _windows(code, part, context, f"{name}: its {what} part")
        for part, what in zip(held, ("validation", "test"), strict=True)
    )
    mean = (len(validation.tokens) + len(test.tokens)) / sum(map(len, held))
    train = PassingSplit(
        read=found.train,
        code=code,
        context=context,
        tokens=tokens_per_epoch,
        stride=math.ceil(MARGIN * tokens_per_epoch / mean),
        held=found.held,
        name=name,
    )
    return PassingSplits(
        name=kind,
        classes=code.classes,
        train=train,
        validation=validation,
        test=test,
        checksum=checksum_of((*held[0], *held[1], first[0], *code.classes)),
    )


def _check(name: str, level: str, context: int, tokens_per_epoch: int) -> None:
    if level not in LEVELS:
        raise OptionError(
            f"{name}: tokens={level}, but of a stream only bytes and bpe are known before its end"
            if level in ("characters", "words")
            else unknown("token level", level, LEVELS)
        )
    if not 1 <= context <= tokens_per_epoch:
        raise OptionError(
            f"context={context}, tokens_per_epoch={tokens_per_epoch}; a window holds at least 1 "
            "token and a pass at least one window"
        )


def _beginnings(found: Documents, name: str, learned_from: int) -> list[list[str]]:
    """The first documents that train, those that validate, and those that test."""
    parts = {
        "validation": itertools.islice(found.validation(0), HELD),
        "test": itertools.islice(found.test(found.tested), HELD),
        "training": itertools.islice(found.train(found.held), learned_from),
    }
    read = {what: list(part) for what, part in parts.items()}
    for what, part in read.items():
        if not part:
            raise DataError(f"{name}: no documents are left for its {what} part")
    return [read[what] for what in ("training", "validation", "test")]


def _windows(code: Subwords | ByteStream, texts: list[str], context: int, what: str) -> TextSplit:
    split = TextSplit(torch.cat([_marked(code, text) for text in texts]), context)
    if not len(split):
        raise DataError(
            f"{what} has {len(split.tokens):,} tokens, too few for one window of {context} and the "
            "next; lower the context"
        )
    return split


def _marked(code: Subwords | ByteStream, text: str) -> Tensor:
    part = code.encode(text)
    return part if code.end is None else torch.cat((part, part.new_tensor([code.end])))
