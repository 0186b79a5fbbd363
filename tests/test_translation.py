"""Training on texts in pairs: what counts, exact runs, two workers, methods, words for it."""

from __future__ import annotations

import math
import os
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import rankwise
from rankwise import accounting, data, models
from rankwise.cli import main
from rankwise.data import IGNORED, load_pairs
from rankwise.errors import OptionError
from rankwise.models.networks import _translates
from rankwise.training import Interrupted, Recipe, Result, records, train
from rankwise.training.task import TASKS, Score, evaluate, loss_of
from test_distributed import Workers
from test_training import StopAt, stopped_and_gone_on

TINY = {"vocabulary": 20, "width": 32, "layers": 2, "heads": 4, "hidden": 48}


@pytest.fixture(autouse=True)
def a_network_for_tests(monkeypatch):
    monkeypatch.setitem(models.MODELS, "pair-test", _translates("for tests", **TINY))


@pytest.fixture
def pairs(tmp_path, monkeypatch) -> Path:
    """Letters, and the same in capitals: 400 pairs of one to five words, 320 of them to train."""
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.tsv")
    return tmp_path / "pairs.tsv"


def write_pairs(path: Path) -> None:
    drawn = random.Random(0)
    lines = [" ".join(drawn.choices("abcdef", k=drawn.randint(1, 5))) for _ in range(400)]
    path.write_text("".join(f"{line}\t{line.upper()}\n" for line in lines))


def recipe(**changes: Any) -> Recipe:
    base = {
        "model": "pair-test",
        "data": "pairs:pairs.tsv",
        "tokens": "words",
        "context": 16,
        "batch_size": 32,  # 10 steps an epoch
        "epochs": 2,
        "optimizer": "adam",
        "lr": 0.003,
        "weight_decay": 0.0,
        "method": "dense",
    }
    return Recipe(**{**base, **changes})


# What counts


class Copies(nn.Module):
    """Is sure that the next token is the one that the decoder has just read."""

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return 20.0 * F.one_hot(target, 20).float()


class Knows(nn.Module):
    """Is sure of the right word, which is the source's in capitals, and of the end."""

    def __init__(self, splits: data.PairSplits) -> None:
        super().__init__()
        number = {word: i for i, word in enumerate(splits.classes)}
        self.upper = torch.tensor([number.get(c.upper(), i) for c, i in number.items()])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        read = F.pad(self.upper[source], (0, target.shape[1]))[:, : target.shape[1]]
        return 20.0 * F.one_hot(read, 20).float()


def test_copying_what_the_decoder_reads_is_no_perplexity_of_one(pairs):
    """It was where the targets were what the network read, as in one program of the field."""
    splits = load_pairs("pairs:pairs.tsv")
    assert len(splits.classes) == 4 + 12

    def score(model: nn.Module) -> Score:
        return evaluate(model, splits.test, lambda part: part, nullcontext, classes=20)

    copied = score(Copies())
    assert copied.perplexity > 1e5
    assert copied.accuracy < 0.3  # letters that follow themselves
    known = score(Knows(splits))
    assert (known.perplexity, known.accuracy) == (pytest.approx(1, abs=1e-6), 1.0)


def test_filling_counts_neither_in_the_loss_nor_in_a_score(pairs):
    splits = load_pairs("pairs:pairs.tsv")
    model = models.build("pair-test", classes=len(splits.classes), input_shape=(5,)).eval()
    inputs, following = splits.test.take(torch.arange(len(splits.test)))
    real = following != IGNORED
    assert 0.5 < float(real.float().mean()) < 0.9
    with torch.no_grad():
        scores = model(*inputs)
        alone = [splits.test.take(torch.tensor([i])) for i in range(len(splits.test))]
        ones = torch.cat([F.cross_entropy(model(*x)[0], y[0], reduction="none") for x, y in alone])
    assert_close(loss_of(scores, following), ones.mean(), rtol=0, atol=1e-5)
    found = evaluate(model, splits.test, lambda part: part, nullcontext, classes=16)
    assert found.loss == pytest.approx(float(ones.mean()), abs=1e-5)
    right = (scores.argmax(-1) == following)[real].float().mean()
    assert found.accuracy == pytest.approx(float(right))
    smooth = loss_of(scores, following, label_smoothing=0.1)
    log = scores.log_softmax(-1)[real]
    picked = log.gather(1, following[real][:, None])[:, 0]
    by_hand = -(0.9 * picked + 0.1 * log.mean(-1)).mean()
    assert_close(smooth, by_hand, rtol=0, atol=1e-5)


def test_a_score_is_told_with_its_bleu():
    task = TASKS["translation"]
    assert task.describe(Score(0.0, 0.5)) == "perplexity 1.00, token accuracy 50.00%"
    assert task.describe(Score(0.0, 0.5, 12.345)).endswith("BLEU 12.35")


# Training


def test_it_learns_to_translate_and_the_records_say_what_was_read(pairs):
    how = {"epochs": 24, "lr": 0.01, "lr_warmup_epochs": 2, "label_smoothing": 0.1}
    result = train(recipe(out="out", **how))
    # Of the words one in six would be right without the source, of the ends two in five at most.
    assert result.test_accuracy > 0.7
    assert result.test_bleu is not None
    assert result.test_bleu > 25
    assert result.task == "translation"
    start, *_, finish = records.read("out")
    assert start["data"]["task"] == "translation"
    assert start["data"]["pairs_left_out"] == 0
    assert Result.from_record(finish) == result
    old = {key: value for key, value in finish.items() if key != "test_bleu"}
    assert Result.from_record(old).test_bleu is None
    splits = load_pairs("pairs:pairs.tsv")
    inputs, units = data.example(splits.train)
    model = models.build("pair-test", classes=16, input_shape=(5,))
    assert result.flops == accounting.flops(model, inputs) // units
    assert result.parameters[0] == sum(p.numel() for p in model.parameters())


METHODS = [
    ("factorized", {"ranks": 4}),
    ("pufferfish", {"ranks": 8, "warmup_steps": 11, "exclude": "encoder.0.*,decoder.0.*"}),
    ("galore", {"rank": 4, "every": 5}),
]


@pytest.mark.parametrize("step", [4, 10, 11, 14])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_a_run_stopped_anywhere_ends_bit_for_bit_as_one_that_was_not(pairs, method, options, step):
    stopped_and_gone_on(recipe, step, method=method, method_options=options, amp="bf16")


def test_the_first_layers_of_encoder_and_decoder_stay_dense_as_in_the_paper(pairs):
    options = {"ranks": 0.25, "warmup_steps": 3, "exclude": "encoder.0.*,decoder.0.*"}
    train(
        recipe(
            epochs=1,
            lr_warmup_epochs=0,
            method="pufferfish+factor-decay",
            out="out",
            method_options={**options, "strength": 1e-4},
        )
    )
    low = [n for n, spec in rankwise.load("out").run["plan"].items() if "rank" in spec]
    assert len(low) == 6 + 10
    assert {name.split(".")[1] for name in low} == {"1"}


@pytest.mark.parametrize("method", ["cuttlefish", "lora"])
def test_other_methods_train_it_too(pairs, method):
    options = {"cuttlefish": {"observe_every": 2, "min_gain": 0.01}, "lora": {"rank": 2}}
    result = train(recipe(epochs=3, method=method, method_options=options[method]))
    assert math.isfinite(result.test_loss)


def test_methods_are_compared_by_perplexity_and_bleu(pairs, capsys):
    flags = ["--model", "pair-test", "--data", "pairs:pairs.tsv", "--tokens", "words"]
    flags += ["--epochs", "1", "--lr-warmup-epochs", "0", "--batch-size", "32", "--out", "out"]
    assert main(["compare", "--methods", "dense,factorized", *flags]) == 0
    printed = capsys.readouterr().out
    assert "BLEU" in printed
    assert "plexity" in printed
    assert main(["report", "out/dense-0", "out/factorized-0"]) == 0
    printed = capsys.readouterr().out
    assert "test perplexity" in printed
    assert "test BLEU" in printed


def test_a_network_for_another_task_is_refused_with_those_that_fit(pairs):
    with pytest.raises(OptionError, match=r"llama-tiny is a network for language modelling, but"):
        train(recipe(model="llama-tiny"))
    with pytest.raises(OptionError, match=r"a --model among transformer-base, transformer-tiny"):
        train(recipe(model="mlp-512x2"))
    with pytest.raises(OptionError, match="languages=de-en: shakespeare is no text in pairs"):
        train(recipe(data="shakespeare", languages="de-en"))


# Two workers


def train_here(folder: str, out: str, stops: bool) -> Any:
    """Weights after 20 steps, low-rank from step 11; perhaps stopped and resumed at 10."""
    os.chdir(folder)
    models.MODELS["pair-test"] = _translates("for tests", dropout=0.0, **TINY)
    how = {"method": "pufferfish", "method_options": {"ranks": 4, "warmup_steps": 11}}
    how |= {"optimizer": "sgd", "lr": 0.1, "label_smoothing": 0.1, "lr_warmup_epochs": 0}
    asked = recipe(epochs=1, batch_size=16, out=out, **how)
    if stops:
        with pytest.raises(Interrupted):
            train(asked, report=StopAt(10))
    train(asked, resume=out if stops else None)
    return rankwise.load(out).weights


def test_two_workers_are_one_though_their_shares_of_a_batch_differ_in_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "pair-test", models.MODELS["transformer-tiny"])
    write_pairs(tmp_path / "pairs.tsv")
    alone = train_here(str(tmp_path), "alone", False)
    together = Workers(tmp_path)
    try:
        whole, same = together(train_here, str(tmp_path), "whole", False)
        resumed, _ = together(train_here, str(tmp_path), "parts", True)
    finally:
        together.stop()
    assert_close(whole, same, rtol=0, atol=0)
    assert_close(whole, alone, rtol=1e-3, atol=1e-5)
    assert_close(resumed, whole, rtol=0, atol=0)
