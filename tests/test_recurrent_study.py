"""The study of a low-rank LSTM runs, goes on where it ended, and reports what it recorded."""

from __future__ import annotations

import importlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from rankwise import models
from rankwise.models import networks

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def study(monkeypatch, tmp_path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found: Any = importlib.import_module("recurrent_study")
    entry = networks._recurrent("for tests", tokens=8, width=24, hidden=32, layers=2)
    monkeypatch.setitem(models.MODELS, "lstm-test", entry)
    for name, value in {"MODEL": "lstm-test", "CONTEXT": 8, "BATCH": 8}.items():
        monkeypatch.setattr(found, name, value)
    return found


def test_every_row_is_trained_timed_and_shown(study, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdefghij", k=1500)))
    record = tmp_path / "record.jsonl"
    line = ["--data", f"text:{text}", "--record", str(record), "--smoke"]
    rows = ["dense", "Pufferfish", "Pufferfish, gate by gate"]
    assert study.main([*line, "--rows", *rows]) == 0
    runs = [json.loads(each) for each in record.read_text().splitlines()][1:]
    assert [run["row"] for run in runs] == rows
    dense, together, apart = runs
    assert not dense["structure"]
    assert dense["parameters"][0] > apart["parameters"][0] > together["parameters"][0]
    assert len(together["switch_steps"]) == 1
    capsys.readouterr()
    # A second call reads what it finds, and the steps of the final networks are added.
    assert study.main([*line, "--time", "--rounds", "4"]) == 0
    shown = capsys.readouterr().out
    times = json.loads(record.read_text().splitlines()[-1])
    assert times["times"].keys() == set(rows)
    assert times["speed_up"]["dense"] == [1.0, 1.0, 1.0]
    for run in runs:
        assert f"{run['test_loss'] / math.log(2):.3f}" in shown
        assert f"{run['parameters'][0]:,}" in shown
    assert len(record.read_text().splitlines()) == 5
    text.write_text(text.read_text()[::-1])
    with pytest.raises(SystemExit, match="made with other settings"):
        study.main([*line, "--table"])


def test_the_best_rate_is_that_of_the_validation_part(study, tmp_path):
    record = study.RunRecord(tmp_path / "r.jsonl", {"settings": {}}, rate_of=study.RATE_OF)
    for lr, seed, validation, test in (
        (1, 0, 2.0, 9.0),
        (2, 0, 1.0, 8.0),
        (4, 0, 3.0, 0.0),
        (2, 1, 5.0, 7.0),
    ):
        run = {"validation_loss": validation, "test_loss": test}
        record.runs["dense", lr, seed] = {"row": "dense", "lr": lr, "seed": seed, **run}
    assert record.best("dense") == 2
    assert [run["test_loss"] for run in record.chosen("dense")] == [8.0, 7.0]
    record.runs["Pufferfish", 8, 0] = run = {"validation_loss": 4.0}
    assert record.chosen("Pufferfish") == [run]
    assert record.best("Pufferfish, gate by gate") == 8
    assert record.best("low-rank from the start") is None
    assert record.grid("dense", 4) == "1: 2.0000  2: 1.0000  4: 3.0000"
    assert study.edge(record, "dense") is None
    del record.runs["dense", 1, 0]
    assert study.edge(record, "dense") == 1
    record.runs["dense", 1, 0] = {"validation_loss": 2.0}
    assert list(study.plan(record, "dense", (1, 4), (0, 1))) == [(1, 0), (4, 0), (2, 0), (2, 1)]
    apart = study.plan(record, "Pufferfish, gate by gate", (1, 4), (0, 1))
    assert list(apart) == [(8, 0), (8, 1)]
