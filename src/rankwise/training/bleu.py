"""BLEU (Papineni et al., ACL 2002) of what a network translates, and the translating itself."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import nn

from rankwise.data import Examples, PairSplit
from rankwise.data.texts.coding import END, START
from rankwise.errors import OptionError
from rankwise.models import Translator, greedy
from rankwise.training.task import Score, eval_mode

ORDERS = 4  # lengths of n-grams, from 1
# A translation may be longer than its source by so many tokens (1706.03762, section 6.1).
SURPLUS = 50
AT_ONCE = 64

# The tokens of mteval-v13a: marks stand alone, full stops and commas not between digits, a dash
# only behind a digit.
_MARKS = re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])")
_AFTER_NO_DIGIT = re.compile(r"([^0-9])([\.,])")
_BEFORE_NO_DIGIT = re.compile(r"([\.,])([^0-9])")
_DASH = re.compile(r"([0-9])(-)")
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def tokens(line: str) -> list[str]:
    """The words that BLEU counts: those of mteval-v13a, case kept.

    Example:
        >>> tokens('He paid 1,000.50 dollars (all), "twice".')
        ['He', 'paid', '1,000.50', 'dollars', '(', 'all', ')', ',', '"', 'twice', '"', '.']
    """
    for entity, mark in _ENTITIES:
        line = line.replace(entity, mark)
    line = f" {line} "
    line = _MARKS.sub(r" \1 ", line)
    line = _AFTER_NO_DIGIT.sub(r"\1 \2 ", line)
    line = _BEFORE_NO_DIGIT.sub(r" \1 \2", line)
    return _DASH.sub(r"\1 \2 ", line).split()


def bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a corpus with one reference a line, 0 to 100.

    100 BP (p1 p2 p3 p4)^(1/4): p_n is the share of the translations' n-grams that their reference
    has as well, each as often as it stands there; BP = exp(1 - r / c) where the translations have
    c words, fewer than the references' r. Counts are sums over all lines. Nothing is smoothed:
    without one common n-gram of length 4 the result is 0.

    Example:
        >>> round(bleu(["the cat sat on the mat"], ["the cat sat on a mat"]), 2)
        53.73
    """
    if len(translations) != len(references):
        raise ValueError(f"{len(translations)} translations of {len(references)} references")
    hits, possible = [0] * ORDERS, [0] * ORDERS
    written = wanted = 0
    for translation, reference in zip(translations, references, strict=True):
        ours, theirs = tokens(translation), tokens(reference)
        written, wanted = written + len(ours), wanted + len(theirs)
        for order in range(1, ORDERS + 1):
            have = _ngrams(ours, order)
            hits[order - 1] += (have & _ngrams(theirs, order)).total()
            possible[order - 1] += have.total()
    if not all(hits):
        return 0.0
    precision = sum(math.log(hit / of) for hit, of in zip(hits, possible, strict=True)) / ORDERS
    return 100 * math.exp(precision + min(0.0, 1 - wanted / written))


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(order)), strict=False))


def translate(
    model: nn.Module,
    split: PairSplit,
    move: Callable[[Any], Any],
    precision: Callable[[], AbstractContextManager[object]],
) -> list[str]:
    """What a network makes of every source, by greedy decoding.

    Args:
        model: the bare one; it is left in the mode that it is in.
        split: the sources.
        move: brings a batch to the model's device.
        precision: autocast of the run.

    Raises:
        OptionError: the network cannot decode.
    """
    if not isinstance(model, Translator):
        raise OptionError(
            f"{type(model).__name__} has no methods encode and decode, so that it cannot translate"
        )
    # Sources of like length together; then back to their own order.
    order = split.sources.lengths.argsort(stable=True)
    written: list[str] = [""] * len(split)
    with eval_mode(model):
        for chosen in order.split(AT_ONCE):
            (source, _), _ = split.take(chosen)
            with precision():
                found = greedy(
                    model, move(source), start=START, end=END, longest=source.shape[1] + SURPLUS
                )
            for number, row in zip(chosen.tolist(), found.tolist(), strict=True):
                line = row[: row.index(END)] if END in row else row
                written[number] = split.coding.decode(line)
    return written


def with_bleu(
    score: Score,
    model: nn.Module,
    split: Examples,
    move: Callable[[Any], Any],
    precision: Callable[[], AbstractContextManager[object]],
) -> Score:
    """A score of pairs together with BLEU, any other as it is; arguments as for `translate`."""
    if not isinstance(split, PairSplit):
        return score
    return replace(score, bleu=bleu(translate(model, split, move, precision), split.references))
