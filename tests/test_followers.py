"""Averaged copies follow structural changes, however they are made and wrapped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import rankwise
from rankwise.errors import PlanError

SWITCH = 3


class Net(nn.Module):
    """A child called `module`, a module with two names, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 24)
        self.module = nn.Sequential(nn.Linear(24, 24), nn.Tanh())
        self.again = self.module[0]
        self.tied = nn.Linear(24, 24)
        shared: Any = self.module[0]
        self.tied.weight = shared.weight
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.module(self.stem(x)))
        return self.head(self.tied(torch.tanh(x)))


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "averaged": lambda m: AveragedModel(m, use_buffers=True),
    "compiled": lambda m: torch.compile(copy.deepcopy(m), backend="eager"),
    "data parallel": lambda m: nn.DataParallel(copy.deepcopy(m)),
    "twice wrapped": lambda m: AveragedModel(nn.DataParallel(m)),
}


def train(run: rankwise.Run, steps: range) -> None:
    for i in steps:
        run.optimizer.zero_grad()
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(i))
        run.model(x).square().mean().backward()
        run.optimizer.step()


def begin(model: nn.Module, **options: Any) -> rankwise.Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = rankwise.Pufferfish(4, warmup_steps=SWITCH, **options)
    return rankwise.start(model, method, optimizer, total_steps=10)


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("when", ["before start", "after start", "after the switch"])
def test_a_copy_follows_however_it_is_made(kind: str, when: str) -> None:
    model = Net()
    follower = COPIES[kind](model)
    run = begin(model)
    if when == "after start":
        follower = COPIES[kind](model)
    if when != "after the switch":
        run.follow(follower)
    train(run, range(SWITCH))
    if when == "after the switch":
        run.follow(follower)
    inner: Any = next(m for m in follower.modules() if isinstance(m, Net))
    assert rankwise.read_plan(inner) == rankwise.read_plan(model)
    assert {"module.0", "tied"} <= rankwise.read_plan(inner).keys()
    assert inner.again is inner.module[0]
    assert inner.tied.u.weight is inner.module[0].u.weight
    assert {id(p) for p in inner.parameters()}.isdisjoint(map(id, model.parameters()))
    theirs = [p.shape for p in inner.parameters()]
    assert theirs == [p.shape for p in model.parameters()]
    train(run, range(SWITCH, 6))


def test_a_copy_keeps_its_own_weights_in_the_row_space_of_the_models() -> None:
    model = Net()
    run = begin(model)
    train(run, range(SWITCH - 1))
    follower = copy.deepcopy(model)
    with torch.no_grad():
        for p in follower.parameters():
            p.mul_(0.9)
    averaged: Any = follower.again.weight
    weight = averaged.detach().clone()
    run.follow(follower)
    train(run, range(SWITCH - 1, SWITCH))
    ours: Any = model.again
    theirs: Any = follower.again
    _, v = ours.factors()
    projected = weight @ torch.linalg.pinv(v) @ v
    torch.testing.assert_close(theirs.weight.detach(), projected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("buffers", [False, True])
def test_an_average_goes_on_over_the_switch_with_the_extra_norm(buffers: bool) -> None:
    model = Net()
    run = begin(model, norm=True)
    average = AveragedModel(
        model,
        use_buffers=buffers,
        avg_fn=lambda a, b, _: (a + b) / 2 if a.is_floating_point() else b,
    )
    run.follow(average)
    run.follow(average)
    for i in range(20):
        train(run, range(i, i + 1))
        average.update_parameters(model)
    ours: Any = model.again
    inner: Any = average.module
    theirs = inner.again
    near = torch.nn.functional.cosine_similarity(
        theirs.norm.running_var, ours.norm.running_var, dim=0
    )
    assert float(near) > 0.9
    for p in average.parameters():
        assert torch.isfinite(p).all()


def test_what_is_no_copy_of_the_model_is_refused_at_once() -> None:
    model = Net()
    run = begin(model)
    with pytest.raises(PlanError, match=r"has no layer 'head'.*a copy of the same model"):
        run.follow(nn.Sequential(nn.Linear(8, 3)))
    shadows: Any = [p.clone() for p in model.parameters()]
    with pytest.raises(PlanError, match="list is no module"):
        run.follow(shadows)
