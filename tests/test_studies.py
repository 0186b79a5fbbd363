"""The studies run, resume without repeating, and show what their rows hold."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.layers import LowRankLinear

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_layer_kinds_are_run_once_each_and_tabled(study, tmp_path, capsys):
    script, record = study("loralinear"), tmp_path / "rows.jsonl"
    arguments = ["--smoke", "--seeds", "0", "1", "--ranks", "2", "--json", str(record)]
    script.main([*arguments, "--lrs", "0.01", "0.1"])
    first = rows(record)
    # Two rates with the first seed, both of them with the second.
    assert len(first) == len(script.KINDS) * 4
    assert {r["kind"] for r in first} == set(script.KINDS)
    assert len({r["parameters"] for r in first if r["kind"] != "full rank"}) == 1
    assert all(r["steps"] == [0, 2, 4] for r in first)
    starts = {(r["kind"], r["seed"]): r["accuracy"][0] for r in first}
    for r in first:  # step 0 comes before any training: the rate has no part in it
        assert r["accuracy"][0] == starts[r["kind"], r["seed"]]
    table = capsys.readouterr().out
    assert "validation accuracy before training (step 0)" in table
    script.main([*arguments, "--lrs", "0.01", "0.1"])
    assert rows(record) == first
    assert "validation accuracy before training (step 0)" in capsys.readouterr().out


def test_arms_of_the_ablation_have_equal_parameters_and_decay(study, tmp_path, capsys):
    script, record = study("ablation"), tmp_path / "rows.jsonl"
    arguments = ["--smoke", "--seeds", "3", "--json", str(record)]
    script.main(arguments)
    found = {r["arm"]: r for r in rows(record)}
    assert list(found) == list(script.ARMS)
    low = [found[arm] for arm in script.ARMS if arm != "dense"]
    assert {r["parameters"] for r in low} == {found["plain"]["parameters"]}
    assert found["plain"]["parameters"] <= 0.1 * found["dense"]["parameters"]
    assert len({r["weight_decay"] for r in found.values()}) == 1
    # The halves differ in what they should: the start by the initialisation, not by the decay.
    assert found["plain"]["loss"][0] == found["FD"]["loss"][0]
    assert found["SI"]["loss"][0] == found["SI&FD"]["loss"][0]
    assert found["plain"]["loss"][0] != found["SI"]["loss"][0]
    assert found["SI"]["loss"][-1] != found["SI&FD"]["loss"][-1]
    script.main(arguments)
    assert len(rows(record)) == len(found)
    assert "| SI&FD |" in capsys.readouterr().out


def test_plots_are_drawn_from_rows(study, tmp_path):
    pytest.importorskip("matplotlib")
    script, record = study("loralinear"), tmp_path / "rows.jsonl"
    arguments = ["--smoke", "--seeds", "0", "--ranks", "1", "2", "--lrs", "0.1"]
    script.main([*arguments, "--json", str(record), "--plot", "--plots", str(tmp_path)])
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "loralinear-curves.png",
        "loralinear-ranks.png",
    }


def test_the_cost_of_decay_is_recorded_for_every_side(study, tmp_path, capsys):
    script, record = study("decay"), tmp_path / "decay.json"
    assert script.main(["--smoke", "--json", str(record)]) == 0
    written = json.loads(record.read_text())
    (row,) = written["rows"]
    assert set(row["times"]) == set(script.SIDES)
    assert row["limit"] == 3 * 64 / (4 * 4)
    assert written["batches"][0]["ratio"][1] > 0
    assert "product" in capsys.readouterr().out


def test_the_sides_of_the_cost_of_decay_compute_the_same(study):
    script = study("decay")
    grads = {}
    for side in script.SIDES[:3]:
        torch.manual_seed(0)
        layer = LowRankLinear(24, 24, 5, bias=False)
        script.sides(layer)[side]()
        grads[side] = [layer.u.weight.grad.clone(), layer.v.weight.grad.clone()]
    for side in script.SIDES[1:3]:
        torch.testing.assert_close(grads[side], grads[script.SIDES[0]], rtol=1e-4, atol=1e-9)
