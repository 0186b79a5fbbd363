"""Projected gradients with weights of half precision and states of 8 bits."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import rankwise
from rankwise.errors import CheckpointError, LifeCycleError
from rankwise.methods.fira import Fira
from rankwise.methods.galore import GaLore
from rankwise.methods.tracked import Tracked
from rankwise.optim.low_bit import unpacked
from test_projected import batches, begin, engine_of, gap, loss_of, mlp, train


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


def wide() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 512), nn.Tanh(), nn.Linear(512, 256), nn.Tanh(), nn.Linear(256, 8)
    )


def torchao(model: nn.Module) -> Any:
    with _quiet():
        optim = pytest.importorskip("torchao.optim")
    return optim.AdamW8bit(model.parameters(), lr=1e-2, weight_decay=0.0)


def bitsandbytes(model: nn.Module, **options: Any) -> Any:
    with _quiet():
        optim = pytest.importorskip("bitsandbytes.optim")
    options = {"lr": 1e-2, "weight_decay": 0.0, "min_8bit_size": 4096, **options}
    return optim.AdamW8bit(model.parameters(), **options)


def _quiet() -> Any:
    return warnings.catch_warnings(action="ignore")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "method"),
    [
        (torchao, partial(GaLore, 64, every=6)),
        (torchao, partial(GaLore, 64, every=6, moments="rotate")),
        (torchao, partial(Tracked, 64)),
        (bitsandbytes, partial(GaLore, 64, every=6)),
        (bitsandbytes, partial(Fira, 64, every=6)),
    ],
)
def test_an_8_bit_optimizer_learns_and_resumes_exactly(
    make: Any, method: Any, tmp_path: Path
) -> None:
    model, data = wide(), list(batches(24))
    first = float(loss_of(model, data[-1]).detach())
    run = begin(model, method(), make)
    train(run, data[:12])
    proxy = engine_of(run).matrices["2.weight"].proxy
    kinds = {
        str(getattr(v, "codes", v).dtype)
        for v in run.optimizer.state[proxy].values()
        if isinstance(v, torch.Tensor)
    }
    assert "torch.uint8" in kinds, "the moments of the proxy are low-bit"
    rankwise.save(tmp_path, run)
    train(run, data[12:])
    again = wide()
    train(begin(again, method(), make, resume=tmp_path), data[12:])
    assert float(loss_of(model, data[-1]).detach()) < 0.8 * first
    assert gap(model, again) == 0


@pytest.mark.parametrize("name", ["AdamW4bit", "AdamWFp8"])
@pytest.mark.filterwarnings("ignore")
def test_states_of_other_widths_survive_a_checkpoint(name: str, tmp_path: Path) -> None:
    def make(model: nn.Module) -> Any:
        with _quiet():
            optim = pytest.importorskip("torchao.optim")
        return getattr(optim, name)(model.parameters(), lr=1e-2)

    model, again, data = wide(), wide(), list(batches(4))
    run = begin(model, GaLore(64, every=3), make)
    train(run, data[:2])
    rankwise.save(tmp_path, run)
    train(run, data[2:])
    train(begin(again, GaLore(64, every=3), make, resume=tmp_path), data[2:])
    assert gap(model, again) == 0


def test_states_of_foreign_classes_are_not_looked_for() -> None:
    state = {"exp_avg": {"low-bit state": "os.system", "parts": {}, "options": []}}
    with pytest.raises(CheckpointError, match=r"'os\.system'; known are torchao"):
        unpacked({"state": {0: state}})


@pytest.mark.filterwarnings("ignore")
def test_moments_in_codes_that_cannot_be_turned_are_refused_at_the_start() -> None:
    with pytest.raises(LifeCycleError, match=r"rotate the moments of AdamW8bit.*torchao"):
        begin(wide(), GaLore(64, moments="rotate"), bitsandbytes)
