"""BLEU: values by hand, those of sacrebleu, and the translating that it is measured on."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.data.texts.coding import END, Parts
from rankwise.data.texts.pairs import PairSplit, _split
from rankwise.errors import OptionError
from rankwise.training.bleu import AT_ONCE, SURPLUS, bleu, tokens, translate, with_bleu
from rankwise.training.task import Score


def test_a_value_by_hand() -> None:
    """6 of 7 words, 4 of 6 pairs, 2 of 5 triples, 1 of 4 quadruples; 7 words for 8."""
    translation, reference = "the cat sat on the big mat", "the cat sat on the mat over there"
    precisions = [6 / 7, 4 / 6, 3 / 5, 2 / 4]
    expected = 100 * math.exp(1 - 8 / 7) * math.prod(precisions) ** (1 / 4)
    assert bleu([translation], [reference]) == pytest.approx(expected)


def test_counts_are_clipped_and_summed_over_the_corpus() -> None:
    # Papineni et al., section 2.1: "the" counts as often as the reference has it.
    first = ("the the the the the the the", "the cat is on the mat")
    second = ("a b c d", "a b c d")
    precisions = [(2 + 4) / (7 + 4), 3 / (6 + 3), 2 / (5 + 2), 1 / (4 + 1)]
    expected = 100 * math.prod(precisions) ** (1 / 4)  # 11 words for 10: no penalty
    assert bleu(*zip(first, second, strict=True)) == pytest.approx(expected)


def test_values_of_sacrebleu() -> None:
    """sacrebleu 2.6.0, corpus_bleu(..., smooth_method="none"), its usual tokens 13a."""
    translations = [
        "the cat sat on the mat .",
        "He paid 1,000.50 dollars - all .",
        "a-b 3-4 &amp; x/y (z)",
    ]
    references = [
        "the cat sat on a mat.",
        "He paid 1,000.50 dollars, all.",
        "a-b 3-4 & x/y [z]",
    ]
    assert bleu(translations, references) == pytest.approx(60.26193604006502, abs=1e-9)


def test_the_ends_of_the_scale() -> None:
    line = "the cat sat on the mat"
    assert bleu([line], [line]) == pytest.approx(100)
    assert bleu(["cat mat"], [line]) == 0.0
    assert bleu([""], [line]) == 0.0
    assert bleu([], []) == 0.0
    assert bleu([line.upper()], [line]) == 0.0
    with pytest.raises(ValueError, match="1 translations of 2 references"):
        bleu([line], [line, line])


def test_tokens_are_those_of_mteval_13a() -> None:
    assert tokens("Don't (it's 3.5%) 2019-20, A-B.") == [
        *("Don't", "(", "it's", "3.5", "%", ")", "2019", "-", "20", ",", "A-B", "."),
    ]
    assert tokens("&lt;b&gt; &quot;x&quot; &amp; y") == ["<", "b", ">", '"', "x", '"', "&", "y"]
    assert tokens("  ") == []


class Capitals(nn.Module):
    """Writes the source's words in capitals, one a step; only in eval mode."""

    def __init__(self, split: PairSplit, *, stops: bool = True) -> None:
        super().__init__()
        classes = split.coding.classes
        number = {word: i for i, word in enumerate(classes)}
        upper = [number.get(word.upper(), i) for i, word in enumerate(classes)]
        upper[END] = END if stops else number["A"]
        self.upper, self.size = torch.tensor(upper), len(classes)

    def encode(self, source: Tensor) -> Tensor:
        assert not self.training
        return F.pad(self.upper[source], (0, SURPLUS), value=int(self.upper[END]))

    def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
        return F.one_hot(memory[:, : target.shape[1]], self.size).float()


def split_of(count: int) -> PairSplit:
    lines = [" ".join("abcdefgh"[i % 5 : i % 5 + 1 + i % 4]) for i in range(count)]
    pairs = [(line, line.upper()) for line in lines]
    code = Parts([line for pair in pairs for line in pair], "words", 1, "capitals")
    return _split(pairs, code, references=True)


def test_every_source_is_translated_in_its_place() -> None:
    split = split_of(AT_ONCE + 9)
    model = Capitals(split).train()
    found = translate(model, split, lambda part: part, nullcontext)
    assert found == list(split.references)
    assert model.training
    score = with_bleu(Score(0.5, 1.0), model, split, lambda part: part, nullcontext)
    assert score == Score(0.5, 1.0, pytest.approx(100))  # pyright: ignore[reportArgumentType]


def test_a_network_that_never_ends_is_stopped() -> None:
    split = split_of(3)
    found = translate(Capitals(split, stops=False), split, lambda part: part, nullcontext)
    longest = int(split.sources.lengths.max())
    assert max(len(line.split()) for line in found) == longest + SURPLUS


def test_a_network_that_cannot_decode_is_refused() -> None:
    with pytest.raises(OptionError, match="Linear has no methods encode and decode"):
        translate(nn.Linear(1, 1), split_of(2), lambda part: part, nullcontext)
