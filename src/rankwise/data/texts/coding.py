"""From a line of text to the numbers of its tokens and back: what data in pairs are read with.

One vocabulary for both sides, as the network has one embedding. Its first numbers are the same for
every kind of token: padding, what is not known, the start of a target, and the end of a line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from rankwise.data.texts.subwords import Subwords, subwords
from rankwise.data.texts.vocabulary import UNKNOWN, WORDS
from rankwise.errors import DataError

SPECIAL = ("<pad>", UNKNOWN, "<s>", "</s>")
PADDING, UNKNOWN_TOKEN, START, END = range(len(SPECIAL))


class Coding(Protocol):
    """What the tokens of a line are."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Meaning of the numbers, those of `SPECIAL` first."""
        ...

    def encode(self, line: str) -> list[int]:
        """The numbers of a line's tokens, none of them for its ends."""
        ...

    def decode(self, numbers: Iterable[int]) -> str:
        """The line of these numbers; what is special is left out, but for what is not known."""
        ...

    def written(self, line: str) -> str:
        """A line as `decode` would write it if every token were known."""
        ...


class Bytes:
    """The bytes of UTF-8: every line can be read."""

    classes = (*SPECIAL, *(chr(number) for number in range(256)))

    def encode(self, line: str) -> list[int]:
        """A number a byte."""
        return [len(SPECIAL) + byte for byte in line.encode()]

    def decode(self, numbers: Iterable[int]) -> str:
        """What is no UTF-8 becomes a replacement character."""
        held = [number - len(SPECIAL) for number in numbers if number >= len(SPECIAL)]
        return bytes(held).decode(errors="replace")

    def written(self, line: str) -> str:
        """The line itself."""
        return line


class Parts:
    """Characters or words: those that occur often enough in the lines that train.

    Args:
        lines: of both sides of the training part.
        level: "characters" or "words"; words are those of language modelling, punctuation apart.
        min_count: how often a token must occur in the lines; others are not known.
        name: of the data, for messages.

    Raises:
        DataError: nothing occurs as often.

    Example:
        >>> words = Parts(["ein Haus", "a house", "a dog"], "words", 2, "example")
        >>> words.classes, words.encode("a cat"), words.decode([2, 4, 1, 3])
        (('<pad>', '<unk>', '<s>', '</s>', 'a'), [4, 1], 'a <unk>')
    """

    def __init__(self, lines: Iterable[str], level: str, min_count: int, name: str) -> None:
        self._pattern, self._between = (WORDS, " ") if level == "words" else (_CHARACTER, "")
        counts = Counter(part for line in lines for part in self._pattern.findall(line))
        kept = [part for part, count in counts.items() if count >= min_count]
        kept = sorted(set(kept).difference(SPECIAL), key=lambda part: (-counts[part], part))
        if not kept:
            raise DataError(
                f"{name}: nothing occurs min_count={min_count} times among the {len(counts):,} "
                f"different {level} of its training part; lower min_count or give more pairs"
            )
        self.classes = (*SPECIAL, *kept)
        self._number = {part: number for number, part in enumerate(self.classes)}
        # A text may hold these marks as words, which are then no marks.
        for mark in SPECIAL:
            self._number[mark] = UNKNOWN_TOKEN

    def encode(self, line: str) -> list[int]:
        """A number a word or character."""
        return [self._number.get(part, UNKNOWN_TOKEN) for part in self._pattern.findall(line)]

    def decode(self, numbers: Iterable[int]) -> str:
        """Words with one space between, or characters."""
        silent = (PADDING, START, END)
        return self._between.join(self.classes[n] for n in numbers if n not in silent)

    def written(self, line: str) -> str:
        """The line's words with one space between, or the line itself."""
        return self._between.join(self._pattern.findall(line))


class Subworded:
    """Subwords, their numbers behind those of `SPECIAL`: every line can be read."""

    def __init__(self, code: Subwords) -> None:
        self._code = code
        self.classes = (*SPECIAL, *code.classes)

    def encode(self, line: str) -> list[int]:
        """A number a subword."""
        return [len(SPECIAL) + number for number in self._code.encode(line).tolist()]

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of the subwords."""
        return self._code.decode(n - len(SPECIAL) for n in numbers if n >= len(SPECIAL))

    def written(self, line: str) -> str:
        """The line as the subwords give it back: a tokenizer may change case or spaces."""
        return self._code.decode(self._code.encode(line).tolist())


_CHARACTER = re.compile(".", re.DOTALL)


def coding(
    level: str,
    lines: Sequence[str],
    *,
    min_count: int,
    name: str,
    vocabulary: int = 8_000,
    tokenizer: str | None = None,
) -> Coding:
    """The coding of this level, its vocabulary from the lines that train.

    Args:
        level: one of `vocabulary.LEVELS`.
        lines: of both sides of the training part.
        min_count: of words, how often they must occur; of characters every one is kept.
        name: of the data, for messages.
        vocabulary: subwords to learn.
        tokenizer: a tokenizer.json to take instead.
    """
    if level == "bytes":
        return Bytes()
    if level == "bpe":
        return Subworded(subwords(lines, vocabulary=vocabulary, tokenizer=tokenizer))
    return Parts(lines, level, min_count if level == "words" else 1, name)
