"""The benchmarks of low-rank gradients measure what they say: grids, live bytes, ratios."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.fixture
def study(monkeypatch) -> Any:
    return benchmark("language_study", monkeypatch)


@pytest.fixture
def times(monkeypatch) -> Any:
    return benchmark("gradients", monkeypatch)


@pytest.fixture
def memory(monkeypatch) -> Any:
    return benchmark("gradient_memory", monkeypatch)


FACTS = {"settings": {"steps": 3}}


def valley(bottom: float):
    """A run whose validation loss is lowest at one rate, and which diverges far above it."""

    def run(lr: float, seed: int) -> dict[str, Any]:
        diverged = lr > 4 * bottom
        loss = None if diverged else abs(torch.tensor(lr / bottom).log2().item()) + seed
        return {"validation": loss, "test": loss, "state_numbers": 0}

    return run


@pytest.mark.parametrize("bottom", [0.001, 0.01, 0.3])
def test_the_grid_grows_until_its_best_rate_is_inside(study, tmp_path, bottom):
    record = study.RunRecord(tmp_path / "record.jsonl", FACTS, loss="validation")
    row = study.Row("dense", (0.01, 0.02, 0.04))
    best = study.tune("AdamW", row, record, valley(bottom))
    tried = sorted(lr for _, lr, _ in record.runs)
    assert tried[0] < best < tried[-1]
    assert abs(torch.tensor(best / bottom).log2().item()) <= 0.51
    assert len(tried) == len(set(tried))


def test_a_record_goes_on_where_it_ended_and_refuses_other_settings(study, tmp_path):
    path = tmp_path / "record.jsonl"
    runs = []

    def run() -> dict[str, Any]:
        runs.append(1)
        return {"validation": 2.0}

    for _ in range(2):
        record = study.RunRecord(path, FACTS, loss="validation")
        assert record.once("AdamW", 0.1, 0, run) == 2.0
    assert len(runs) == 1
    assert [json.loads(line).get("row") for line in path.read_text().splitlines()] == [
        None,
        "AdamW",
    ]
    with pytest.raises(SystemExit, match="made with other settings; choose another --record"):
        study.RunRecord(path, {"settings": {"steps": 4}})


def test_rates_rise_then_fall_to_zero(study):
    rates = [study.schedule(step) for step in range(study.STEPS)]
    assert rates[0] == pytest.approx(1 / study.WARMUP)
    assert max(rates) == rates[study.WARMUP - 1] == 1.0
    assert rates[-1] < 1e-4
    after = rates[study.WARMUP :]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize("name", ["gradient_study", "update_study"])
def test_every_row_of_the_studies_steps_and_moves_the_weights(study, name, monkeypatch, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(256)) * 40)
    splits = study.data.load_text(f"text:{path}", context=study.CONTEXT)
    for label, row in benchmark(name, monkeypatch).ROWS.items():
        entry = study.train(row, splits, row.lr[0], 0, 2)
        assert entry["diverged"] is False, label
        assert entry["tokens"] == 2 * study.BATCH * study.CONTEXT
        assert entry["validation"] != pytest.approx(5.545, abs=1e-4), label  # ln 256: nothing moved
        # The first two steps of a warm-start are dense.
        dense = row.method == "dense" or "warmup_steps" in row.options
        assert (entry["state_numbers"] < 2 * 857_216) == (not dense or bool(row.beside)), label


def test_the_matrices_timed_are_those_of_the_blocks(times):
    shapes = times.shapes_of("llama-60m")
    assert len(shapes) == 56
    assert sum(m * n for m, n in shapes) == 8 * (4 * 512**2 + 3 * 512 * 1376)


def test_our_side_projects_and_steps_like_a_backward_would(times):
    shapes = [(24, 16), (16, 24), (16, 16)]
    gradients = [torch.randn(m, n, generator=torch.Generator().manual_seed(m)) for m, n in shapes]
    side = times.ours(times.build_on_all("galore", rank=4, every=0), shapes, gradients)
    timer = times.Timer(iter(range(100)).__next__)
    assert timer.rounds({"ours": side}, 3) == {"ours": [1000, 1000, 1000]}
    turning = times.ours(times.build_on_all("galore", rank=4, every=3), shapes, gradients)
    counts = []
    for _ in range(6):
        timer.once(turning)
        counts.append(turning.refreshed())
    assert counts[1:] == [1, 1, 1, 1, 1]  # three matrices in turn, each every third step
    # What was given is untouched, so every round does the same work.
    for gradient, (m, n) in zip(gradients, shapes, strict=True):
        expected = torch.randn(m, n, generator=torch.Generator().manual_seed(m))
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["GaLore", "GaLore, two-sided", "APOLLO"])
def test_the_published_programs_are_given_the_same_bases(monkeypatch, name, tmp_path):
    equality = benchmark("gradient_equality", monkeypatch)
    for package in ("galore_torch", "apollo_torch"):
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.setattr(equality, "CONTEXT", 16)
    monkeypatch.setattr(equality, "EVERY", 2)
    path = tmp_path / "text.txt"
    path.write_text("Who goes there? Stand, and unfold yourself to the watch. " * 200)
    splits = equality.data.load_text(f"text:{path}", context=16)
    (found,) = equality.compare(name, splits, "llama-tiny", rank=32, steps=3)
    package = "apollo_torch" if name == "APOLLO" else "galore_torch"
    assert importlib.util.find_spec(package) is not None  # others look for it in this process
    assert found["largest move"] > 2e-3
    assert found["largest difference"] < 2e-6


def test_the_figures_are_ratios_of_medians_and_amortise_the_refresh(times):
    row = times.Row(
        model="m",
        rank=1,
        threads=1,
        steps={
            name: [value] * 5
            for name, value in {
                **{"floor": 100.0, "GaLore": 110.0, "galore-torch": 120.0},
                **{"floor, oneDNN": 50.0, "GaLore by mm": 125.0},
                **{"APOLLO": 90.0, "apollo-torch": 100.0, "tracked": 330.0},
            }.items()
        },
        refresh={"warm": 200.0, "warm, rotated": 400.0, "galore-torch, SVD": 4000.0},
        sequence=[110.0] * 199 + [132.0],
        refreshed=[0] * 199 + [1],
        forward_backward=9_890.0,
        whole={"GaLore": 110.0},
    )
    figures = row.figures()
    assert figures["GaLore / floor"] == pytest.approx(1.1)
    assert figures["GaLore / oneDNN's floor"] == pytest.approx(2.2)
    assert figures["GaLore by mm / floor"] == pytest.approx(1.25)
    assert figures["amortised / galore-torch"] == pytest.approx(111 / 140)
    assert figures["200 steps / galore-torch"] == pytest.approx(110.11 / 140)
    assert figures["SVD / refresh"] == pytest.approx(20)
    assert figures["SVD / rotated refresh"] == pytest.approx(10)
    assert figures["slowest / median step"] == pytest.approx(1.2)
    assert figures["step with / without refresh"] == pytest.approx(1.2)
    assert figures["share, GaLore"] == pytest.approx(0.011)
    assert set(times.GOALS) <= set(figures)


def test_a_missing_peer_says_how_to_get_it(monkeypatch):
    peers = benchmark("gradient_peers", monkeypatch)
    monkeypatch.delitem(sys.modules, "galore_torch.adamw", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="galore_torch is not installed; pip install --no-deps"):
        peers.galore_torch([], rank=1, every=1)


def test_live_bytes_rise_fall_and_move_between_kinds(memory):
    live = memory.Live()
    with live:
        first = torch.zeros(1000)
        live.add(first, "weights")
        view = first[10:20]
        second = torch.zeros(500)
        assert (live.now["weights"], live.now["rest"]) == (4000, 2000)
        live.add(second, "gradients")
        assert (live.now["gradients"], live.now["rest"]) == (2000, 0)
        del second
        gc.collect()
        assert live.now["gradients"] == 0
        del first
        gc.collect()
        assert live.now["weights"] == 4000  # its view keeps it
        assert view.numel() == 10
    assert sum(live.peak.values()) == 6000


def test_what_a_step_keeps_is_what_the_formula_predicts(memory):
    sides = ("AdamW", "GaLore", "tracked", "Fira")
    dense, low, *others = (memory.measure("llama-tiny", side) for side in sides)
    for row in (dense, low, *others):
        assert row["kept_total"] == pytest.approx(row["predicted_total"], rel=1e-3)
        for kind in ("weights", "gradients", "states"):
            assert row["kept"][kind] == pytest.approx(row["predicted"][kind], abs=0.01)
        assert row["peak"] > row["kept_total"]
    assert low["kept_total"] < 0.6 * dense["kept_total"]
