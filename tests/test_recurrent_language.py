"""Recurrent language models: their sizes, and truncated back-propagation with a state handed over.

B: streams, T: tokens of a window, H: hidden units.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import rankwise
from rankwise import accounting, models
from rankwise.data import TextSplit, batches, load_text, reading
from rankwise.errors import CheckpointError, OptionError
from rankwise.models import RecurrentLanguageModel, Stateful, networks
from rankwise.training import Interrupted, Recipe, train
from rankwise.training.carried import CarriedState, reading_order
from rankwise.training.task import evaluate, loss_of
from test_training import StopAt, end_state, epochs_of

SIZES = {"vocabulary": 13, "width": 6, "hidden": 8, "layers": 2}


def network(cell: str = "lstm", seed: int = 0, **sizes: object) -> RecurrentLanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RecurrentLanguageModel(cell=cell, **{**SIZES, **sizes})  # pyright: ignore


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 13, shape, generator=torch.Generator().manual_seed(seed))


# The networks


def stored(vocabulary: int, width: int, hidden: int, *, gates: int = 4, tied: bool = False) -> int:
    layers = gates * hidden * (width + hidden + 2) + gates * hidden * (2 * hidden + 2)
    head = vocabulary + (0 if tied else vocabulary * hidden)
    return vocabulary * width + layers + head


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lstm-char", stored(256, 64, 256)),
        ("lstm-char-512", stored(256, 128, 512)),
        ("gru-char", stored(256, 64, 256, gates=3)),
        ("lstm-word", stored(10_000, 650, 650, tied=True)),
        # Published as 85,962,278: with one bias a layer, where nn.LSTM has two of 6,000.
        ("lstm-wikitext2", 85_962_278 + 2 * 6_000),
    ],
)
def test_each_network_stores_the_parameters_counted_by_hand(name, expected):
    with torch.device("meta"):
        model = models.build(name)
    assert accounting.parameters(model).stored == expected
    sample = models.sample(name)
    assert isinstance(sample, torch.Tensor)
    assert model(sample.to("meta")).shape == (1, sample.shape[1], models.MODELS[name].classes)


def test_the_published_factorisation_stores_what_was_published():
    """67,962,278 with one bias a layer: each gate at a quarter of the hidden units (2103.03936)."""
    with torch.device("meta"):
        model = models.build("lstm-wikitext2")
    decided = rankwise.plan(model, rankwise.ranks.Ratio(0.25, multiple=1), split=True)
    assert set(decided.ranks.values()) == {375}
    assert decided.parameters[1] == 67_962_278 + 2 * 6_000


def test_it_is_torchs_layers_in_a_row():
    for cell, kind in (("lstm", nn.LSTM), ("gru", nn.GRU)):
        model = network(cell, dropout=0.3).eval()
        plain = kind(6, 8, 2, batch_first=True)
        plain.load_state_dict(getattr(model, cell).state_dict())
        x = tokens(3, 5)
        expected = plain(model.embedding.weight[x])[0] @ model.head.weight.T + model.head.bias
        assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    tied = network(width=8, tied=True)
    assert tied.head.weight is tied.embedding.weight
    assert float(tied.embedding.weight.detach().abs().max()) <= 0.1
    assert_close(network().head.bias.detach(), torch.zeros(13), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cell": "ltsm"}, "unknown cell 'ltsm'; did you mean 'lstm'"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be 0 or more, below 1"),
        ({"tied": True}, "reads the 8 hidden units with the weight of an embedding of width=6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(OptionError) as caught:
        network(**changes)
    assert words in str(caught.value)


# The order of reading


@pytest.mark.parametrize("length", [203, 195])  # 10 and 2 tokens are left over
def test_every_stream_reads_on_where_it_stopped_and_no_token_is_read_twice(length):
    split = TextSplit(torch.arange(length, dtype=torch.int32), 6)
    for epoch in range(6):
        read = list(batches(split, batch_size=4, seed=0, epoch=epoch, streams=True))
        assert len(read) == 8
        streams = torch.cat([targets for _, targets in read], dim=1)
        assert_close(streams, streams[:, :1] + torch.arange(48), rtol=0, atol=0)
        assert len(set(streams.flatten().tolist())) == 4 * 48
    starts = {
        int(
            cast(Tensor, next(batches(split, batch_size=4, seed=0, epoch=e, streams=True))[0])[0, 0]
        )
        for e in range(8)
    }
    assert len(starts) > 1  # what is left over is not always the end
    assert max(starts) <= length - 1 - 4 * 48


def test_workers_and_resumed_epochs_read_the_same_streams():
    split = TextSplit(torch.arange(203, dtype=torch.int32), 6)
    options = {"batch_size": 4, "seed": 0, "epoch": 1, "streams": True}
    whole = list(batches(split, **options))
    assert_close(list(batches(split, **options, start=3)), whole[3:], rtol=0, atol=0)
    for worker in (0, 1):
        own = list(batches(split, **options, worker=worker, workers=2))
        assert_close(own, [(x[worker::2], y[worker::2]) for x, y in whole], rtol=0, atol=0)


@pytest.mark.parametrize(("count", "at_once"), [(1, 5), (7, 3), (20, 4), (41, 100), (60, 20)])
def test_evaluation_reads_every_window_once_and_each_stream_in_order(count, at_once):
    seen = list(reading_order(count, at_once, streams=True))
    assert sorted(torch.cat(seen).tolist()) == list(range(count))
    for before, after in itertools.pairwise(seen):
        assert len(after) <= len(before) <= min(at_once, 20)
        assert_close(after, before[: len(after)] + 1, rtol=0, atol=0)


# The state


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_windows_with_the_state_handed_over_say_what_one_long_run_says(cell):
    model = network(cell).eval()
    long = tokens(1, 61).flatten()
    with torch.no_grad():
        whole = loss_of(model(long[None, :-1]), long[None, 1:])
    split = TextSplit(long.int(), 5)

    def score(at_once: int) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rankwise.training.task.EVALUATION_BATCH", at_once)
            return evaluate(model, split, lambda x: x, torch.no_grad, classes=13).loss

    assert math.exp(score(1)) == pytest.approx(math.exp(float(whole)), rel=1e-5)
    # Each stream is one long run of its own: twelve windows in five streams of three.
    with torch.no_grad():
        rows = torch.stack([long[15 * i : 15 * i + 16] for i in range(4)])
        streams = loss_of(model(rows[:, :-1]), rows[:, 1:])
        alone, _ = split.take(torch.arange(12))
        forgotten = loss_of(model(alone), split.take(torch.arange(12))[1])
    assert score(5) == pytest.approx(float(streams), rel=1e-5)
    assert abs(score(5) - float(forgotten)) > 1e-4
    assert isinstance(model, Stateful)
    assert not isinstance(nn.Linear(1, 1), Stateful)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_training_takes_the_gradients_of_plain_torch(cell):
    """Three windows by the loop's own parts, and as one would write it."""
    model, plain = network(cell), network(cell)
    split = TextSplit(tokens(200).int(), 5)
    carried = CarriedState(model)
    state = None
    for inputs, targets in list(batches(split, batch_size=4, seed=0, epoch=0, streams=True))[:3]:
        model.zero_grad()
        loss_of(carried.scores(model, inputs), targets).backward()
        plain.zero_grad()
        y, state = getattr(plain, cell)(plain.embedding(inputs), state)
        state = tuple(s.detach() for s in state) if cell == "lstm" else state.detach()
        F.cross_entropy(plain.head(y).flatten(0, 1), targets.flatten()).backward()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    carried.forget()
    assert_close(carried.scores(model, tokens(2, 4)), model(tokens(2, 4)), rtol=0, atol=0)


def test_the_state_survives_a_checkpoint_and_another_number_of_workers(monkeypatch):
    model = network()
    carried = CarriedState(model)
    assert carried.state_dict() == []
    carried.scores(model, tokens(4, 5))
    saved = carried.state_dict()
    after = carried.scores(model, tokens(4, 5, seed=2))
    again = CarriedState(model)
    again.load_state_dict(saved, torch.device("cpu"))
    assert_close(again.scores(model, tokens(4, 5, seed=2)), after, rtol=0, atol=0)
    monkeypatch.setattr("rankwise.distributed.workers", lambda: 2)
    shares = []
    for worker in (0, 1):
        monkeypatch.setattr("rankwise.distributed.worker", lambda worker=worker: worker)
        one = CarriedState(model)
        one.load_state_dict(saved, torch.device("cpu"))
        assert one._state is not None
        shares.append([part.clone() for part in one._state])
        windows = tokens(4, 5, seed=2)[worker::2]
        assert_close(one.scores(model, windows), after[worker::2], rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("rankwise.distributed.gather", lambda _: shares)
    carried._state = tuple(shares[0])
    assert_close(carried.state_dict(), saved, rtol=0, atol=0)


def test_reduced_precision_hands_its_state_over():
    model = network()
    carried = CarriedState(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = [carried.scores(model, tokens(3, 4, seed=s)) for s in (1, 2)][1]
    exact = CarriedState(model)
    second = [exact.scores(model, tokens(3, 4, seed=s)) for s in (1, 2)][1]
    assert_close(first.float(), second, rtol=0, atol=0.02)


# Runs


@pytest.fixture
def prose(tmp_path, monkeypatch) -> Path:
    """Every second letter is the one three places before it, the others are one of four."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 4, (4000,), generator=generator)
    letters[1::2] = letters[:-1:2].roll(1)
    path = tmp_path / "prose.txt"
    path.write_text("".join("abcd"[i] for i in letters.tolist()))
    return path


@pytest.fixture(autouse=True)
def networks_for_tests(monkeypatch):
    for name, sizes in {
        "lstm-test": {"dropout": 0.1},
        "gru-test": {"cell": "gru"},
    }.items():
        entry = networks._recurrent(name, tokens=8, width=12, hidden=16, layers=2, **sizes)
        monkeypatch.setitem(models.MODELS, name, entry)


def recipe(**changes) -> Recipe:
    base = {
        "model": "lstm-test",
        "data": "text:prose.txt",
        "context": 16,
        "batch_size": 20,  # 3200 tokens to train: 199 windows, 9 steps
        "epochs": 2,
        "optimizer": "adamw",
        "lr": 0.01,
        "method": "dense",
        "clip_norm": 1.0,
    }
    return Recipe(**{**base, **changes})


@pytest.mark.parametrize("step", [4, 9, 14])
@pytest.mark.parametrize("model", ["lstm-test", "gru-test"])
def test_a_run_stopped_anywhere_ends_bit_for_bit_as_one_that_was_not(prose, model, step):
    whole = train(recipe(out="whole", model=model))
    with pytest.raises(Interrupted):
        train(recipe(out="parts", model=model), report=StopAt(step))
    carried = rankwise.load("parts").extra["carried"]
    assert bool(carried) == (step % 9 != 0)
    resumed = train(recipe(out="parts", model=model), resume="parts")
    for mine, theirs in zip(end_state("parts"), end_state("whole"), strict=True):
        assert_close(mine, theirs, rtol=0, atol=0)
    assert epochs_of("parts") == epochs_of("whole")
    assert (resumed.test_loss, resumed.validation_loss) == (whole.test_loss, whole.validation_loss)


# Stopped where the structure changes in mid-epoch, and after it.
@pytest.mark.parametrize("step", [11, 14])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("factorized", {"ranks": 4, "init": "orthogonal"}),
        ("pufferfish", {"ranks": 4, "warmup_steps": 11, "split": True, "lr_factor": 0.5}),
        ("pufferfish+factor-decay", {"ranks": 4, "warmup_steps": 11, "layers": "*.hh_l*"}),
        ("sifd", {"ranks": 4}),
        ("cuttlefish", {"ranks": 4, "gains": "none", "latest": 11 / 18}),
        ("galore", {"rank": 4, "every": 5}),
    ],
)
def test_a_low_rank_run_stopped_anywhere_ends_bit_for_bit_as_one_that_was_not(
    prose, method, options, step
):
    how = {"method": method, "method_options": options}
    whole = train(recipe(out="whole", **how))
    with pytest.raises(Interrupted):
        train(recipe(out="parts", **how), report=StopAt(step))
    assert rankwise.load("parts").extra["carried"]
    resumed = train(recipe(out="parts", **how), resume="parts")
    for mine, theirs in zip(end_state("parts"), end_state("whole"), strict=True):
        assert_close(mine.get("state", mine), theirs.get("state", theirs), rtol=0, atol=0)
    assert epochs_of("parts") == epochs_of("whole")
    assert (resumed.test_loss, resumed.parameters) == (whole.test_loss, whole.parameters)
    plan = rankwise.load("whole").run["plan"]
    assert ("lstm" in plan) == (method != "galore")
    if "+" in method:
        assert set(plan) == {"lstm", "lstm.hh_l0", "lstm.hh_l1"}


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_micro_batches_of_streams_are_one_batch(cell):
    model = network(cell)
    rankwise.factorize(model, 4, layers=f"{cell}.*", split=True)
    x, y = tokens(4, 6), tokens(4, 6, seed=2)
    _, state = model(tokens(4, 6, seed=3), model.initial_state(4))
    state = tuple(part.detach() for part in state)
    loss_of(model(x, state)[0], y).backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        scores, _ = model(x[half], tuple(part[:, half] for part in state))
        (loss_of(scores, y[half]) / 2).backward()
    parts = [p.grad for p in model.parameters()]
    assert len(parts) == len(whole)
    assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_tied_head_stays_tied_beside_low_rank_recurrent_layers():
    model: Any = network(width=8, tied=True)
    rankwise.factorize(model, 3, layers="*")
    assert model.head.u.weight is model.embedding.u.weight
    assert len(rankwise.read_plan(model)) == 7  # the LSTM, its matrices, embedding and head
    before = model(tokens(2, 5)).detach()
    rankwise.to_dense(model)
    assert model.head.weight is model.embedding.weight
    assert_close(model(tokens(2, 5)), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_projected_at_full_rank_train_a_recurrent_layer_as_dense_sgd_does(cell):
    plain, low = network(cell), network(cell)
    sgds = [torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9) for m in (plain, low)]
    method = rankwise.GaLore(99, every=2, scale=1.0, moments="rotate", layers=f"{cell}.weight*")
    run = rankwise.start(low, method, sgds[1])
    assert len(method.engine.matrices) == 4  # pyright: ignore[reportAttributeAccessIssue]
    for matrix in method.engine.matrices.values():  # pyright: ignore[reportAttributeAccessIssue]
        matrix.sides = ("right",)  # not the identity that it is at full rank
    for seed in range(6):
        for model, sgd in ((plain, sgds[0]), (run.model, sgds[1])):
            sgd.zero_grad()
            loss_of(model(tokens(4, 6, seed=seed)), tokens(4, 6, seed=seed + 9)).backward()
            sgd.step()
    for mine, theirs in zip(low.parameters(), plain.parameters(), strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    moved = (plain.head.weight - network(cell).head.weight).detach().abs().max()
    assert float(moved) > 0.01


def test_the_loop_is_truncated_back_propagation_as_one_would_write_it(prose):
    plain_sgd = {"optimizer": "sgd", "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0}
    options: dict = {**plain_sgd, "schedule": "constant", "lr_warmup_epochs": 0, "clip_norm": None}
    how = recipe(model="gru-test", tokens="characters", out="out", **options)
    result = train(how)
    text = load_text("text:prose.txt", context=16, level="characters")
    torch.manual_seed(0)
    model = models.build("gru-test", classes=4, input_shape=(16,))
    for epoch in range(2):
        part = text.train.for_epoch(reading._drawn(0, epoch, 1), 20)
        stream = part.tokens[part.shift :].long()
        rows = stream[: 20 * 9 * 16].view(20, 144)
        following = stream[1 : 20 * 9 * 16 + 1].view(20, 144)
        state = torch.zeros(2, 20, 16)
        for at in range(0, 144, 16):
            scores, (state,) = model(rows[:, at : at + 16], (state.detach(),))
            model.zero_grad()
            loss_of(scores, following[:, at : at + 16]).backward()
            with torch.no_grad():
                for p in model.parameters():
                    assert p.grad is not None
                    p -= 0.5 * p.grad
    assert_close(dict(model.state_dict()), end_state("out")[0], rtol=1e-5, atol=1e-6)
    score = evaluate(model, text.test, lambda x: x, torch.no_grad, classes=4)
    assert result.test_loss == pytest.approx(score.loss, rel=1e-5)


def test_words_are_trained_and_their_vocabulary_decides_the_size(prose):
    prose.write_text("a rose is a rose\n" * 400)
    result = train(recipe(tokens="words", min_count=3, context=5, out="out"))
    saved = rankwise.load("out")
    assert saved.extra["classes"] == ["<unk>", "a", "rose", "<eos>", "is"]
    assert saved.weights["embedding.weight"].shape == (5, 12)
    assert result.test_accuracy > 0.3


def test_a_vocabulary_that_is_numbered_otherwise_is_no_resume(prose, monkeypatch):
    prose.write_text("a rose is a rose\n" * 400)
    how = recipe(tokens="words", context=5, out="out")
    with pytest.raises(Interrupted):
        train(how, report=StopAt(3))
    monkeypatch.setattr("rankwise.data.texts.vocabulary._words", lambda text, _: text.split(" "))
    with pytest.raises(CheckpointError, match=r"with 5 classes or tokens that are not the \d"):
        train(how, resume="out")
