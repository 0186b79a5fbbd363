"""What the tokens of a text are: its bytes, its characters, or its words; subwords are elsewhere.

Shapes: `L` tokens of a work or part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rankwise.errors import DataError

LEVELS = ("bytes", "characters", "words", "bpe")
UNKNOWN, LINE_END = "<unk>", "<eos>"

# A line end, a token in angle brackets, a word with its apostrophes, or any other mark.
WORDS = re.compile(r"\n|<\w+>|\w+(?:['’]\w+)*|[^\w\s]")


def numbered(
    works: Sequence[bytes], level: str, name: str, *, tokenised: bool = False
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Every work as the numbers of its tokens, (L,) uint8 or int32, and what the numbers mean.

    Args:
        works: as read.
        level: one of `LEVELS` but bpe.
        name: of the text, for messages.
        tokenised: words are what stands between white space.

    Raises:
        DataError: characters or words are asked of what is no UTF-8.
    """
    if level == "bytes":
        classes = tuple(chr(number) for number in range(256))
        coded = [torch.from_numpy(np.frombuffer(work, dtype=np.uint8).copy()) for work in works]
        return coded, classes
    texts = [decoded(work, name) for work in works]
    if level == "characters":
        known = sorted(set().union(*texts))
        return [_characters(text, known) for text in texts], tuple(known)
    lists = [_words(text, tokenised) for text in texts]
    known = sorted(set().union(*lists))
    number = {word: i for i, word in enumerate(known)}
    coded = [torch.tensor([number[word] for word in words], dtype=torch.int32) for words in lists]
    return coded, tuple(known)


def without_rare_words(
    parts: Sequence[Tensor], classes: tuple[str, ...], min_count: int, name: str
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The parts with the vocabulary of the first one: the most frequent words come first.

    Args:
        parts: training part and others, (L,) each.
        classes: the words that the numbers mean.
        min_count: how often a word must occur in the first part; others become `<unk>`, number 0.
        name: of the text, for messages.

    Raises:
        DataError: no word occurs as often.
    """
    counts = np.bincount(parts[0].numpy(), minlength=len(classes))
    order = np.argsort(-counts, kind="stable")
    kept = [i for i in order.tolist() if counts[i] >= min_count and classes[i] != UNKNOWN]
    if not kept:
        raise DataError(
            f"{name}: no word occurs min_count={min_count} times in its training part of "
            f"{len(parts[0]):,} words; lower min_count or give a longer text"
        )
    new = np.zeros(len(classes), dtype=np.int32)
    new[kept] = np.arange(1, len(kept) + 1)
    renumbered = tuple(torch.from_numpy(new[part.numpy()]) for part in parts)
    return renumbered, (UNKNOWN, *(classes[i] for i in kept))


def _characters(text: str, classes: Sequence[str]) -> Tensor:  # -> (L,) int32
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    known = np.array([ord(character) for character in classes], dtype=np.uint32)
    return torch.from_numpy(np.searchsorted(known, codes).astype(np.int32))


def _words(text: str, tokenised: bool) -> list[str]:
    if tokenised:
        return text.replace("\n", f" {LINE_END} ").split()
    return [LINE_END if word == "\n" else word for word in WORDS.findall(text)]


def decoded(content: bytes, name: str) -> str:
    """UTF-8 as text.

    Raises:
        DataError: it is none.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is no UTF-8 text (byte {error.start:,}), so it has no characters or words; "
            "read it as bytes, or convert it"
        ) from error
