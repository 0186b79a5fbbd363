"""The encoder-decoder Transformer: its published sizes, what it may look at, how it begins."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import rankwise
from rankwise import models
from rankwise.cli import main
from rankwise.errors import OptionError
from rankwise.models import EncoderDecoder, Translator, greedy

PUBLISHED = ("encoder.0.*", "decoder.0.*")  # the layers that Pufferfish leaves dense


def small(**changed: int | float) -> EncoderDecoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocabulary": 30, "width": 16, "layers": 2, "heads": 4, "hidden": 24}
        return EncoderDecoder(**{**sizes, **changed})  # pyright: ignore[reportArgumentType]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(4, 30, shape, generator=torch.Generator().manual_seed(seed))


def stored(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_published_sizes_are_met_to_the_parameter() -> None:
    """48.98 and 26.70 million (arXiv 2103.03936), counted here by hand."""
    attention, feed, norm = 4 * 512**2, 2 * 512 * 2048 + 2048 + 512, 2 * 512
    encoder, decoder = attention + feed + 2 * norm, 2 * attention + feed + 3 * norm
    outside = 9_521 * 512 + 2 * norm
    with torch.device("meta"):
        model = models.build("transformer-base")
    assert stored(model) == 6 * (encoder + decoder) + outside == 48_978_432
    sample = models.sample("transformer-base")
    plan = rankwise.plan(model, 0.25, sample=sample, exclude=PUBLISHED)
    thin, narrow = 4 * 128 * 2 * 512, 2 * 128 * (512 + 2048) + 2048 + 512
    low = (thin + narrow + 2 * norm) + (2 * thin + narrow + 3 * norm)
    rankwise.factorize(model, plan)
    assert stored(model) == encoder + decoder + 5 * low + outside == 26_696_192


def test_scores_look_at_no_later_target_token_and_at_no_padding() -> None:
    model = small().eval()
    source, target = tokens(3, 6), tokens(3, 5, seed=1)
    scores = model(source, target)
    later = target.clone()
    later[:, 3:] = tokens(3, 2, seed=2)
    assert_close(model(source, later)[:, :3], scores[:, :3], rtol=0, atol=1e-6)
    assert not model(source, later)[:, 3:].allclose(scores[:, 3:])
    longer = F.pad(source, (0, 4))
    assert_close(model(longer, F.pad(target, (0, 2)))[:, :5], scores, rtol=0, atol=1e-5)
    other = source.clone()
    other[:, 0] = 4 + (other[:, 0] - 3) % 26
    assert not model(other, target)[:, 0].allclose(scores[:, 0])  # every word of a source counts


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_source_of_padding_alone_leaves_numbers(dtype: torch.dtype | None) -> None:
    model = small()
    source, target = tokens(3, 6), tokens(3, 5, seed=1)
    source[1] = 0
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(source, target).float().logsumexp(-1).mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_embeddings_and_first_scores_begin_with_deviation_one() -> None:
    model = small(vocabulary=600, width=64, dropout=0.0)
    embedded = model.embedding.weight.detach() * math.sqrt(64)
    assert_close(float(embedded.std()), 1.0, rtol=0.02, atol=0)
    assert 0.8 < float(model(tokens(8, 9), tokens(8, 9, seed=1)).detach().std()) < 1.2
    bound = math.sqrt(6 / (64 + 24))
    weight = model.get_parameter("encoder.1.feed.up.weight").detach()
    assert 0.97 * bound < float(weight.abs().max()) <= bound
    assert model.head.weight is model.embedding.weight


def test_positions_are_those_of_the_paper() -> None:
    from rankwise.models.encoder_decoder import _positions

    found = _positions(7, 8, torch.device("cpu"))
    for place in range(7):
        for i in range(4):
            angle = place / 10_000 ** (2 * i / 8)
            assert_close(found[place, 2 * i], torch.tensor(math.sin(angle)), rtol=0, atol=1e-6)
            assert_close(found[place, 2 * i + 1], torch.tensor(math.cos(angle)), rtol=0, atol=1e-6)


def test_greedy_takes_the_likeliest_token_until_the_end() -> None:
    class Counter(nn.Module):
        """Counts up from the source's first token and ends at 9."""

        def encode(self, source: Tensor) -> Tensor:
            return source[:, :1]

        def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
            place = torch.arange(target.shape[1])
            return F.one_hot((memory + place).clamp(max=9), 10).float()

    counter = Counter()
    assert isinstance(counter, Translator)
    source = torch.tensor([[5, 1], [7, 1]])
    written = greedy(counter, source, start=1, end=9, longest=20)
    assert written.tolist() == [[5, 6, 7, 8, 9], [7, 8, 9, 9, 9]]
    assert greedy(counter, source, start=1, end=9, longest=2).tolist() == [[5, 6], [7, 8]]


def test_greedy_agrees_with_the_scores_of_what_it_wrote() -> None:
    model = small().eval()
    source = tokens(4, 6)
    source[2, 3:] = 0
    written = greedy(model, source, start=2, end=3, longest=7)
    read = F.pad(written[:, :-1], (1, 0), value=2)
    likeliest = model(source, read).argmax(-1)
    for row, best in zip(written.tolist(), likeliest.tolist(), strict=True):
        length = row.index(3) + 1 if 3 in row else len(row)
        assert row[:length] == best[:length]


def test_full_rank_keeps_the_function_and_attention_is_known_by_its_projections() -> None:
    from rankwise.optim.attention import attentions

    model = small().eval()
    assert [a.heads for a in attentions(model)] == [4] * 6
    source, target = tokens(3, 6), tokens(3, 5, seed=1)
    scores = model(source, target)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]
    rule = rankwise.ranks.Ratio(1.0, allow_growth=True)
    rankwise.factorize(model, rule, layers=names)
    assert len(rankwise.read_plan(model)) == len(names) == 32
    assert_close(model(source, target), scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"width": 18}, "width=18 must be even and shared out over heads=4"),
        ({"width": 15, "heads": 3}, "width=15 must be even"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be 0 or more, below 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changed: dict[str, int], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        small(**changed)


def test_it_is_planned_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "transformer-tiny", "--ranks", "0.25"]) == 0
    printed = capsys.readouterr().out
    assert "decoder.1.cross.out_proj" in printed
    assert "source (1, 32), target (1, 32)" in printed
