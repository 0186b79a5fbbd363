"""The benchmarks run, write what they promise, and count the limits that the documents state."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

STEP_TIME = Path(__file__).parent.parent / "benchmarks" / "step_time.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(STEP_TIME), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    path = tmp_path_factory.mktemp("bench") / "record.json"
    done = run("--smoke", "--json", str(path))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def test_every_network_is_timed_on_all_three_sides(smoke):
    output, record = smoke
    networks = {row["network"] for row in record["rows"]}
    assert networks == {"mlp-128x4", "mlp-512x8", "resnet-small", "resnet-18"}
    for row in record["rows"]:
        assert row["network"] in output
        assert set(row["times"]) == {"dense", "low-rank", "plain pair"}
        for times in row["times"].values():
            assert len(times) == record["repeats"]
            assert min(times) > 0
        low, middle, high = row["ratio"]
        assert low <= middle <= high


def test_the_limits_are_the_flop_ratios_of_training(smoke):
    # Forward and backward without the gradient for the input; counted by hand for the perceptrons:
    # in units of one product per sample, 2 for the first layer and 3 for each of the others.
    def by_hand(width: int, hidden: int, rank: int) -> float:
        ends = 2 * 784 * width + 3 * 10 * width
        return (ends + 3 * hidden * width**2) / (ends + 3 * hidden * 2 * rank * width)

    limits = {row["network"]: row["flop_ratio"] for row in smoke[1]["rows"]}
    assert limits["mlp-128x4"] == pytest.approx(by_hand(128, 4, 16), rel=1e-9)
    assert limits["mlp-512x8"] == pytest.approx(by_hand(512, 8, 64), rel=1e-9)
    assert limits["resnet-18"] == pytest.approx(2.05, abs=0.01)


def test_a_record_says_where_it_comes_from(smoke):
    _, record = smoke
    assert record["commit"]
    assert record["versions"].keys() == {"python", "torch", "rankwise"}
    assert record["hardware"]["cores"] >= 1
    assert record["seed"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--repeats", "2"), "at least 5"),
        (("--threads", "0"), "at least 1"),
        (("--batch", "1"), "at least 2 samples"),
        (("--clock", "cpu", "--threads", "2"), "--threads 1"),
        (("--only", "mlp"), "mlp-128x4"),
    ],
)
def test_options_that_cannot_be_measured_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(STEP_TIME), *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(STEP_TIME), run_name="__main__")
    assert message in capsys.readouterr().err
