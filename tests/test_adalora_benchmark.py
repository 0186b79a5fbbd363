"""The benchmark of AdaLoRA compares what it says, on a network small enough for a test."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from rankwise.models.from_transformers import hide_broken_torchvision

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def adalora(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module: Any = importlib.import_module("adalora")
    small = {"WIDTH": 24, "LAYERS": 1, "BATCH": 2, "CONTEXT": 8, "VOCABULARY": 16}
    for name, value in small.items():
        monkeypatch.setattr(module.updates, name, value)
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)
    return module


def trainable(side: Any) -> int:
    return sum(p.numel() for p in side.model.parameters() if p.requires_grad)


def test_sides_are_in_the_phase_that_they_are_named_for(adalora: Any) -> None:
    made = adalora.sides(6, 2)
    held = {name: made[name]() for name in made if "PEFT" not in name}
    for side in held.values():
        side.step()
    falling, masked, shrunk = (
        held[f"AdaLoRA, {phase}"] for phase in ("falling", "final, masked", "final, shrunk")
    )
    matrices = falling.method.triplets.matrices
    heads = masked.method.triplets.heads.values()
    update = sum(p.numel() for head in heads for p in head.parameters())
    assert trainable(falling) == trainable(masked)
    assert trainable(shrunk) < trainable(masked) - 0.4 * update
    assert sum(shrunk.method.triplets.ranks.values()) == 2 * matrices
    assert falling.share() > 0
    assert shrunk.share() == 0
    # Importance and uncertainty, as long as there are allocations to come.
    states = sum(t.numel() for t in falling.kept() if t.is_floating_point())
    assert states == 2 * update
    assert not any(t.is_floating_point() for t in shrunk.kept())


def test_peers_sides_are_in_these_phases_too(adalora: Any) -> None:
    hide_broken_torchvision()
    pytest.importorskip("peft")
    made = adalora.sides(6, 2)
    falling, final = (made[f"PEFT AdaLoRA, {phase}"]() for phase in ("falling", "final"))
    assert falling.kept()
    assert falling.share() > 0
    assert not final.kept()
    cores = [p for n, p in final.model.named_parameters() if "lora_E" in n]
    kept = sum(int((core != 0).sum()) for core in cores)
    assert kept == 2 * len(cores)
