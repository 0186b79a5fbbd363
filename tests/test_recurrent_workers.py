"""Two workers hand the states of their own streams over, and are one worker with all of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import rankwise
from rankwise import models
from rankwise.models import networks
from rankwise.training import Interrupted, Recipe, train
from test_distributed import Workers
from test_training import StopAt


def train_here(folder: str, out: str, stop: int | None = None, resume: bool = False) -> Any:
    """Weights after two epochs of 9 steps, low-rank from step 11; None if stopped before."""
    os.chdir(folder)
    entry = networks._recurrent("for tests", tokens=8, width=12, hidden=16, layers=2)
    models.MODELS["lstm-test"] = entry
    recipe = Recipe(
        model="lstm-test",
        data="text:prose.txt",
        context=16,
        batch_size=20,
        epochs=2,
        optimizer="sgd",
        lr=0.3,
        method="pufferfish",
        method_options={"ranks": 4, "warmup_steps": 11},
        out=out,
    )
    report = None if stop is None else StopAt(stop)
    try:
        train(recipe, report=report, resume=out if resume else None)
    except Interrupted:
        return None
    return rankwise.load(out).weights


@pytest.fixture
def together(tmp_path: Path) -> Iterator[Workers]:
    workers = Workers(tmp_path)
    yield workers
    workers.stop()


def test_two_workers_are_one_and_resume_in_mid_epoch(together, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.MODELS, "lstm-test", models.MODELS["lstm-char"])
    letters = torch.randint(0, 26, (4000,), generator=torch.Generator().manual_seed(0))
    Path("prose.txt").write_text("".join(chr(97 + i) for i in letters.tolist()))
    folder = str(tmp_path)
    alone = train_here(folder, "alone")
    whole, same = together(train_here, folder, "whole")
    assert_close(whole, same, rtol=0, atol=0)
    assert_close(whole, alone, rtol=1e-3, atol=1e-4)
    assert together(train_here, folder, "parts", 10) == [None, None]
    shutil.copytree("parts", "fewer")
    resumed, _ = together(train_here, folder, "parts", None, True)
    assert_close(resumed, whole, rtol=0, atol=0)
    # One worker takes the streams of both up, where they were.
    carried = rankwise.load("fewer").extra["carried"]
    assert [tuple(part.shape) for part in carried] == [(2, 20, 16)] * 2
    assert_close(train_here(folder, "fewer", None, True), alone, rtol=1e-3, atol=1e-4)
