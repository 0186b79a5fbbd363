"""The benchmarks of low-rank updates: rows differ as they say, figures follow from known times."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_multi_head_lora_goes_on_where_its_record_ends(load: Any, tmp_path: Path, capsys) -> None:
    module = load("multi_head_lora")
    text, record = tmp_path / "text.txt", tmp_path / "record.jsonl"
    text.write_bytes(bytes(range(256)) * 40)
    call = ["--what", "heads", "--data", f"text:{text}", "--steps", "1", "--record", str(record)]
    assert module.main(call) == 0
    runs = [json.loads(line) for line in record.read_text().splitlines()]
    assert [run["row"] for run in runs] == list(module.rows(["heads"]))
    dense, two, *_ = (run["trainable"] for run in runs)
    # Two heads of rank 16 in four blocks' qkv and out, in place of their weights.
    assert dense - two == 4 * (4 * 128 * 128 - 2 * 16 * (128 + 384 + 128 + 128))
    assert module.main(call) == 0
    assert len(record.read_text().splitlines()) == len(runs)
    assert "8 heads of 16 in A, sequential" in capsys.readouterr().out


def test_every_part_of_the_network_is_named(load: Any) -> None:
    module = load("multi_head_lora")
    chosen = [options["layers"] for options in module.rows(["places"]).values() if options]
    assert len(set(chosen)) == len(module.PLACES) == 6
    assert "embedding,head" in module.PLACES["A+M+L"]


def test_figures_are_what_they_are_called(load: Any) -> None:
    module = load("updates")
    times = {name: [float(n + 1)] * 2 for n, name in enumerate(module.sides(4))}
    times |= {"frozen": [10.0] * 2, "LoRA, rank 4": [12.0] * 2, "PEFT, rank 4": [18.0] * 2}
    times |= {"LoRA, rank 16": [20.0] * 2, "parallel, 4 heads of 4": [10.0] * 2}
    times |= {"sequential, 4 heads of 4": [11.0] * 2}
    figures = module.figures(4, times)
    assert figures["added, LoRA / PEFT"] == pytest.approx(0.25)
    assert figures["4 heads / 1 head of 4 ranks"] == pytest.approx(0.5)
    assert figures["sequential / parallel, 4 heads"] == pytest.approx(1.1)
    assert module.figures(4, {"frozen": [1.0], "LoRA": [2.0], "PEFT": [5.0]}) == {
        "added, LoRA / PEFT": 0.25
    }
