"""The plan says what is done, and what is done is what the plan said."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from rankwise import accounting
from rankwise.errors import PlanError, SelectionError
from rankwise.method import Context
from rankwise.ranks import Budget, Ratio, factorize, plan

NAN = float("nan")


class Small(nn.Module):
    """Convolutions that go down and up again, an embedding of positions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.body = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.position = nn.Embedding(64, 16)
        self.fc = nn.Linear(16, 10)
        self.unused = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.body(self.grouped(self.down(x)).relu()).relu())
        places = torch.arange(x[0, 0].numel(), device=x.device)
        return self.fc(x.flatten(2).mT + self.position(places)).mean(1)


def test_the_lines_of_the_plan_add_up_to_the_models_flops_before_and_after() -> None:
    model, x = Small(), torch.zeros(2, 3, 8, 8)
    decided = plan(model, Ratio(0.25, multiple=1), x, layers="*")
    assert decided.flops is not None
    assert decided.flops[0] == accounting.flops(model, x)
    lines = {line.name: line.flops for line in decided.layers}
    assert sum(pair[0] for pair in lines.values() if pair) == decided.flops[0]
    assert lines["unused"] is None  # not called
    assert lines["position"] == (0, 2 * 64 * 4 * 16)  # a look-up, then R = 4 to 16 for 64 tokens
    assert plan(model, 4, x, layers="body").layers[4].flops is None  # a look-up that stays one
    factorize(model, decided)
    assert decided.flops[1] == accounting.flops(model, x)
    assert decided.parameters[1] == accounting.parameters(model).stored


def test_the_plan_changes_nothing() -> None:
    model, x = Small(), torch.zeros(2, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    plan(model, 0.25, x)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_printed_table_names_every_layer_its_rank_or_its_reason() -> None:
    decided = plan(Small(), Ratio(0.25), torch.zeros(1, 3, 8, 8), layers="body,fc")
    text = str(decided)
    lines = {line.split()[0]: line for line in text.splitlines()[2:] if line}
    assert "8 of 32" in lines["body"]
    assert "4,608 -> 2,496" not in lines["body"]
    assert "4,608 -> 1,408  " in lines["body"]  # 8 x (144 + 32)
    assert "0.31" in lines["body"]
    assert "would not make it smaller (break-even" in lines["fc"]
    assert "4 of 4×36" in lines["grouped"]
    assert "not selected" in lines["down"]
    assert decided.summary() in text
    assert "1 of 7 layers low-rank" in decided.summary()


def test_a_plan_without_a_sample_says_that_the_order_is_of_definition() -> None:
    assert any("order of definition" in note for note in plan(Small(), 0.25).notes)
    assert not plan(Small(), 0.25, torch.zeros(1, 3, 8, 8)).notes


def test_a_plan_in_which_no_layer_gains_is_a_report_not_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    decided = plan(model, 4, keep_first=0, keep_last=0)
    assert dict(decided.ranks) == {}
    assert all("break-even 4" in line.reason for line in decided.layers)
    assert not factorize(model, decided)
    assert "stays dense" in caplog.text


def test_the_order_of_a_plan_is_that_of_the_execution() -> None:
    names = [line.name for line in plan(Small(), 0.25, torch.zeros(1, 3, 8, 8)).layers]
    assert names == ["down", "grouped", "body", "up", "position", "fc", "unused"]


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("norm", [False, True])
def test_a_budget_holds_for_the_model_that_comes_out(fraction: float, norm: bool) -> None:
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(4)))
    dense = accounting.parameters(model).stored
    factorize(model, Budget(fraction, multiple=1), keep_first=0, keep_last=0, norm=norm)
    after = accounting.parameters(model).stored
    assert math.floor(fraction * dense) - 98 < after <= fraction * dense


def test_variance_init_repeats_and_follows_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        model: Any = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        factorize(model, {"0": 4, "1": 4}, init="variance", context=Context(seed=seed))
        assert not torch.equal(model[0].v.weight, model[1].v.weight)
        return model[0].v.weight.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("rank", [0, 33, "8", 2.0, True, NAN])
def test_a_mapping_of_ranks_is_checked_layer_by_layer(rank: Any) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 10))
    with pytest.raises(PlanError, match=r"^0 \(64, 32\): rank .* 1 to 32"):
        factorize(model, {"0": rank})


def test_a_mapping_with_an_unknown_layer_names_the_closest() -> None:
    model = nn.ModuleDict({"query": nn.Linear(32, 64)})
    with pytest.raises(SelectionError, match="did you mean 'query'"):
        factorize(model, {"quary": 2})


def test_a_split_that_matches_no_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 24))
    with pytest.raises(
        SelectionError, match=r"split: '0\.qvk' matches no layer; the closest are 0"
    ):
        plan(model, 2, layers="*", split={"0.qvk": 3})
    assert plan(model, 2, layers="0", split={"0": 3}).layers[0].shape.blocks == 3
