"""The benchmark of recurrent layers runs, and counts the limits that the documents state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "recurrent.py"
SIDES = {"torch", "low-rank", "recompute", "script"}


def rows(path: Path, *arguments: str) -> list[dict]:
    command = [sys.executable, str(SCRIPT), "--smoke", "--json", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_side_is_timed_and_compared_with_torchs(tmp_path: Path) -> None:
    found = rows(tmp_path / "record.jsonl", "--repeats", "5", "--divisors", "4")
    assert [row["layer"] for row in found] == ["lstm-32", "gru-32"]
    # Products of a step: 8 H^2 against 10 R H, and 6 H^2 against 8 R H.
    assert [row["limit"] for row in found] == pytest.approx([3.2, 3.0])
    for row in found:
        assert row["commit"]
        assert row["hardware"]["cores"] >= 1
        for phase in ("training", "inference"):
            assert set(row["times"][phase]) == SIDES
            assert all(len(times) == 5 for times in row["times"][phase].values())
            assert row["ratio"][phase]["torch"] == [1, 1, 1]


def test_each_way_and_other_sequences(tmp_path: Path) -> None:
    options = ("--sides", "torch", "loop", "product", "--batch", "1", "--steps", "2")
    (row,) = rows(tmp_path / "record.jsonl", *options, "--only", "gru-256", "--divisors", "4")
    assert (row["batch"], row["steps"]) == (1, 2)
    assert set(row["times"]["inference"]) == {"torch", "loop", "product"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_memory_of_a_step(tmp_path: Path) -> None:
    options = ("--only", "lstm-256", "--divisors", "4", "--sides", "torch", "low-rank")
    (row,) = rows(tmp_path / "record.jsonl", "--memory", *options)
    assert row["layer"] == "lstm-32"
    # Gates, cells, outputs, codes: 6.5; at T 3 the cells' extra step and the bias count, too.
    assert 6.5 < row["memory"]["low-rank"]["saved_units"] < 8
    assert row["memory"]["torch"]["saved_units"] > 10
