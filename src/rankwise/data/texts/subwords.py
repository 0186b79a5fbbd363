"""Subwords as tokens: byte-pair encoding (Sennrich et al., arXiv 1508.07909) on bytes, as in GPT-2.

Learned from the training part, or read from a tokenizer.json of the package tokenizers, which does
the work. Every text can be read; nothing in such a file is executed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankwise.errors import DataError, OptionError

INSTALL = "pip install 'rankwise[tokenizers]'"
# What stands between two documents: the mark of GPT-2, or that of a file, the first that it knows.
END_OF_TEXT = "<|endoftext|>"
END_MARKS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
SMALLEST = 257  # every byte, and the mark
PIECE = 2**16  # characters that are encoded as one: a word at a seam may be cut otherwise


class Subwords:
    """The tokens of a tokenizer of the package tokenizers.

    Attributes:
        classes: meaning of the numbers, as the vocabulary writes them.
        end: number of the mark between documents; None if the vocabulary has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        size = 1 + max(tokenizer.get_vocab().values())  # numbers may be left out
        self.classes = tuple(tokenizer.id_to_token(i) or f"<{i}>" for i in range(size))
        marks = (tokenizer.token_to_id(mark) for mark in END_MARKS)
        self.end: int | None = next((mark for mark in marks if mark is not None), None)

    @classmethod
    def learned(cls, texts: Iterable[str], size: int) -> Subwords:
        """At most so many tokens, learned from texts; the mark between documents is the first.

        Raises:
            DataError: the package tokenizers is missing.
            OptionError: fewer tokens than there are bytes.
        """
        if size < SMALLEST:
            raise OptionError(
                f"vocabulary={size}; subwords start from the 256 bytes and a mark, so it must be "
                f"at least {SMALLEST}"
            )
        package = _package()
        tokenizer = package.Tokenizer(package.models.BPE())
        tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(chain.from_iterable(map(_pieces, texts)), trainer=trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> Subwords:
        """The tokenizer of a tokenizer.json.

        Raises:
            DataError: the package tokenizers is missing, or this is no such file.
        """
        package = _package()
        path = Path(path).expanduser()
        try:
            return cls(package.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise DataError(
                f"tokenizer {path} cannot be read: {error.strerror or error}"
            ) from error
        except Exception as error:  # the package raises Exception itself, no class of its own
            raise DataError(
                f"{path} is no tokenizer.json of the package tokenizers ({str(error)[:200]}); save "
                "one with tokenizer.save(PATH), or leave tokenizer out to learn one"
            ) from error

    def encode(self, text: str) -> Tensor:  # -> (L,) int32
        """The numbers of a text's tokens, without marks at its ends."""
        found = self._tokenizer.encode_batch(list(_pieces(text)), add_special_tokens=False)
        numbers = [np.asarray(piece.ids, dtype=np.int32) for piece in found]
        return torch.from_numpy(np.concatenate(numbers) if numbers else np.empty(0, np.int32))

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of these numbers, marks left out."""
        return self._tokenizer.decode(list(numbers))


def subwords(texts: Iterable[str], *, vocabulary: int, tokenizer: str | None) -> Subwords:
    """Read from a file where one is named, else learned from these texts."""
    return Subwords.learned(texts, vocabulary) if tokenizer is None else Subwords.load(tokenizer)


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces that fit into memory many times over, cut behind line ends if there are."""
    begin = 0
    while begin < len(text):
        stop = begin + PIECE
        if stop < len(text):
            stop = text.rfind("\n", begin, stop) + 1 or stop
        yield text[begin:stop]
        begin = stop


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            f"tokens=bpe needs the package tokenizers, which is missing: {INSTALL}; or take "
            "bytes, characters or words"
        ) from error
    return tokenizers
