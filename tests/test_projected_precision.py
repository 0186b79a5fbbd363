"""Projected gradients with weights of half precision; states of few bits in checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import rankwise
from rankwise.errors import CheckpointError
from rankwise.methods.fira import Fira
from rankwise.methods.galore import GaLore
from rankwise.optim.low_bit import unpacked
from test_projected import batches, begin, gap, mlp, train


@pytest.mark.parametrize("method", [partial(GaLore, 4), partial(Fira, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_of_half_precision_weights_are_not_lost(method: Any, dtype: Any) -> None:
    """200 updates, each far below half a unit in the last place, against float32."""
    moved = {}
    for rounding in ("nearest", "stochastic", "compensated", "float32"):
        torch.manual_seed(0)
        half = rounding != "float32"
        model: Any = nn.Sequential(nn.Linear(16, 24, bias=False)).to(dtype if half else None)
        with torch.no_grad():
            model[0].weight.fill_(1.0)
        option = rounding if half else "nearest"
        run = begin(
            model,
            method(scale=1.0, every=0, layers="*", rounding=option),
            lambda m: SGD(m.parameters(), lr=1e-4),
        )
        direction = torch.ones(24, 16, dtype=model[0].weight.dtype)
        for _ in range(200):
            (model[0].weight * direction).sum().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        moved[rounding] = float((model[0].weight.detach().float() - 1).mean())
    assert moved["nearest"] == 0
    assert moved["float32"] == pytest.approx(-2e-2, rel=1e-2)
    assert moved["stochastic"] == pytest.approx(moved["float32"], rel=0.15)
    assert moved["compensated"] == pytest.approx(moved["float32"], rel=0.15)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_rounding_resumes_exactly(rounding: str, tmp_path: Path) -> None:
    data = [(x.bfloat16(), y) for x, y in batches(8)]
    method = partial(GaLore, 4, every=3, rounding=rounding)
    whole, first = mlp(dtype=torch.bfloat16), mlp(dtype=torch.bfloat16)
    train(begin(whole, method()), data)
    run = begin(first, method())
    train(run, data[:4])
    rankwise.save(tmp_path, run)
    again = mlp(5, torch.bfloat16)
    train(begin(again, method(), resume=tmp_path), data[4:])
    assert gap(whole, again) == 0


def test_states_of_foreign_classes_are_not_looked_for() -> None:
    state = {"exp_avg": {"low-bit state": "os.system", "parts": {}, "options": []}}
    with pytest.raises(CheckpointError, match=r"'os\.system'; known are torchao"):
        unpacked({"state": {0: state}})
