"""The optimizers of torchao and bitsandbytes step proxies: moments of 4 and 8 bits, and of fp8.

`make test` runs this file in a process of its own, with both packages on the path. They are not
installed beside the others: transformers, peft and the published programs change their ways where
they find them. Elsewhere these tests are skipped. torchao compiles its step, which wants a C++
compiler and seconds for every shape; here it runs uncompiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import rankwise
from rankwise.errors import CheckpointError, LifeCycleError
from rankwise.methods.fira import Fira
from rankwise.methods.galore import GaLore
from rankwise.methods.qgalore import QGaLore
from rankwise.methods.tracked import Tracked
from test_projected import batches, begin, engine_of, gap, loss_of, train
from test_shards import sharded


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone: enough for weights to be sharded."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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


@pytest.mark.filterwarnings("ignore")
def test_moments_in_codes_that_cannot_be_turned_are_refused_at_the_start() -> None:
    with pytest.raises(LifeCycleError, match=r"rotate the moments of AdamW8bit.*torchao"):
        begin(wide(), GaLore(64, moments="rotate"), bitsandbytes)


@pytest.mark.filterwarnings("ignore")
def test_every_part_of_q_galore_in_8_bits_learns_and_resumes(tmp_path: Path) -> None:
    """Weights and moments of 8 bits, bases of 4: the paper's."""
    model, again, data = wide(), wide(), list(batches(60))
    method = partial(QGaLore, 64, every=6, weight_bits=8)
    first = float(loss_of(model, data[-1]).detach())
    run = begin(model, method(), torchao)
    train(run, data[:30])
    rankwise.save(tmp_path, run)
    train(run, data[30:])
    resumed = begin(again, method(), torchao, resume=tmp_path)
    train(resumed, data[30:])
    run.finish()
    resumed.finish()
    assert gap(model, again) == 0
    assert float(loss_of(model, data[-1]).detach()) < 0.8 * first


@pytest.mark.filterwarnings("ignore")
def test_moments_in_codes_of_shards_are_trained_and_not_saved(group: None, tmp_path: Path) -> None:
    """Blocks of codes do not end where a worker's rows do."""
    torch.manual_seed(0)
    layers = nn.Linear(24, 256, bias=False), nn.Linear(256, 8, bias=False)
    model = sharded(nn.Sequential(*layers), (1,))
    run = begin(model, GaLore(20, every=3, side="right", layers="0"), torchao)
    train(run, batches(2))
    with pytest.raises(CheckpointError, match=r"\(OptimState8bit of \(256, 20\)\)") as refused:
        rankwise.save(tmp_path, run)
    assert "saved with an optimizer whose states have the shape of what it steps" in str(refused)
    assert list(tmp_path.iterdir()) == []
