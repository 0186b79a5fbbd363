"""Methods together: what they declare decides what goes, and what goes does what each says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import rankwise
from rankwise import (
    LTE,
    Cuttlefish,
    Dense,
    FactorDecay,
    GaLore,
    LoRA,
    LoRAPlus,
    MultiHeadGaLore,
    Pufferfish,
    ReLoRA,
)
from rankwise.errors import CompositionError, SelectionError
from rankwise.layers import LowRankLayer, adapted_layers
from rankwise.method import Method

LAST = 11
Methods = Callable[[], list[Method]]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 6)
    )


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + i)
    return torch.randn(16, 20, generator=generator), torch.randint(6, (16,), generator=generator)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)


def begin(methods: list[Method], seed: int = 0, make: Any = adamw, **options: Any) -> Any:
    model = network(seed)
    return rankwise.start(model, methods, make(model), total_steps=LAST, **options)


def train(run: Any, until: int) -> list[float]:
    losses = []
    while run.step < until:
        x, y = batch(run.step)
        run.optimizer.zero_grad()
        loss = F.cross_entropy(run.model(x), y)
        loss.backward()
        run.optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def held(run: Any) -> set[nn.Parameter]:
    return {p for group in run.optimizer.param_groups for p in group["params"]}


LTE_2 = {"rank": 4, "heads": 2, "alpha": 8.0, "merge_every": 3}
GOOD: dict[str, Methods] = {
    "LTE, GaLore on its factors": lambda: [
        LTE(**LTE_2),
        GaLore(rank=2, every=4, layers="*.heads.*"),
    ],
    "LTE in sequence, GaLore on its factors": lambda: [
        LTE(**LTE_2, mode="sequential"),
        GaLore(rank=2, every=4, layers="*.heads.*"),
    ],
    "ReLoRA, GaLore on the dense rest": lambda: [
        ReLoRA(rank=4, restart_every=4, restart_warmup=2, layers="0"),
        GaLore(rank=2, every=3),
    ],
    "ReLoRA, GaLore on its factors": lambda: [
        ReLoRA(rank=4, restart_every=4, restart_warmup=2, reset="magnitude"),
        GaLore(rank=2, every=3, layers="*.heads.*"),
    ],
    "GaLore until ReLoRA opens": lambda: [
        GaLore(rank=2, every=3),
        ReLoRA(rank=4, warmup_steps=5, restart_every=3, restart_warmup=1, layers="0"),
    ],
    "GaLore until ReLoRA opens everything": lambda: [
        ReLoRA(rank=4, warmup_steps=5, restart_every=3, restart_warmup=1, layers="*"),
        GaLore(rank=2, every=3, layers="*"),
    ],
    "GaLore until ReLoRA opens all that it projects": lambda: [
        ReLoRA(rank=4, warmup_steps=5, restart_every=3, restart_warmup=1, layers="0,2"),
        GaLore(rank=2, every=3),
    ],
    "multi-head GaLore, GaLore on the dense rest": lambda: [
        MultiHeadGaLore(heads=2, rank=3, merge_every=3, moments="rotate", layers="0"),
        GaLore(rank=2, every=3),
    ],
    "LoRA+, ReLoRA": lambda: [
        ReLoRA(rank=4, warmup_steps=2, restart_every=4, restart_warmup=2),
        LoRAPlus(),
    ],
    "LoRA+, LTE": lambda: [LTE(**LTE_2), LoRAPlus()],
    "LoRA+, LTE, GaLore on its factors": lambda: [
        LTE(**LTE_2),
        LoRAPlus(),
        GaLore(rank=2, every=4, layers="*.heads.*"),
    ],
    "Pufferfish, then LoRA on the dense rest": lambda: [
        Pufferfish(ranks=4, warmup_steps=5, layers="0,2"),
        LoRA(rank=2, after_switch=True, layers="4", others="all"),
    ],
    "Cuttlefish, then LoRA on the dense rest": lambda: [
        Cuttlefish(ranks=4, gains="none", latest=0.4, layers="0,2"),
        LoRA(rank=2, after_switch=True, layers="4", others="all"),
    ],
    "Pufferfish, Frobenius decay, then LoRA": lambda: [
        Pufferfish(ranks=4, warmup_steps=5, layers="0,2"),
        FactorDecay(),
        LoRA(rank=2, after_switch=True, layers="4", others="all"),
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_stopped_anywhere_it_ends_where_it_would_have(name: str, tmp_path: Path) -> None:
    whole = begin(GOOD[name]())
    stops = {}
    for stop in (0, 1, 4, 5, 6, 8):
        train(whole, stop)
        stops[stop] = rankwise.save(tmp_path, whole, keep=9)
    train(whole, LAST)
    for stop, path in stops.items():
        again = begin(GOOD[name](), seed=stop + 1, resume=path)
        train(again, LAST)
        torch.testing.assert_close(again.bare.state_dict(), whole.bare.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", GOOD)
def test_functions_stay_and_the_optimizer_ends_with_the_models_parameters(name: str) -> None:
    run = begin(GOOD[name]())
    losses = train(run, LAST)
    assert losses[-1] < 3  # no jump at an opening, a merge or a restart
    x, _ = batch(0)
    before = run.bare.eval()(x).detach()
    run.finish()
    torch.testing.assert_close(run.bare(x).detach(), before, rtol=1e-4, atol=1e-5)
    assert held(run) == set(run.bare.parameters())
    assert not adapted_layers(run.bare)


# ---------------------------------------------------------------- GaLore on factors


def test_factors_that_are_named_are_projected() -> None:
    run = begin(GOOD["LTE, GaLore on its factors"]())
    names = set(run.methods[1].parameter_names(run.bare).values())
    assert len(names) == 2 * 2 * 2
    assert "0.heads.1.u.weight.projected" in names
    train(run, 1)
    (proxy,) = (p for p, n in run.methods[1].engine.parameter_names().items() if "0.heads.1.u" in n)
    assert run.optimizer.state[proxy]["exp_avg"].shape == (32, 2)


def test_factors_no_larger_than_the_rank_are_not_skipped_in_silence() -> None:
    for layers in ("*.heads.*", "*"):
        with pytest.raises(SelectionError, match=r"shape \(4, 20\) .* to rank 4: .* short side is"):
            begin([LTE(**LTE_2), GaLore(rank=4, layers=layers)])


def test_by_itself_it_leaves_the_factors_alone_and_says_so_if_nothing_else_is_left() -> None:
    run = begin([LTE(**LTE_2, layers="0"), GaLore(rank=2)])
    assert set(run.methods[1].parameter_names(run.bare).values()) == {"2.weight.projected"}
    with pytest.raises(SelectionError, match=r"left to project beside .*layers='\*\.heads\.\*'"):
        begin([LTE(**LTE_2), GaLore(rank=2)])


def test_a_step_is_lifted_before_its_weight_is_frozen_whatever_the_order() -> None:
    weights = []
    for order in (1, -1):
        run = begin(GOOD["GaLore until ReLoRA opens"]()[::order])
        train(run, LAST)
        weights.append(run.finish().state_dict())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_a_restart_renews_bases_and_forgets_all_moments_of_projected_factors() -> None:
    run = begin(GOOD["ReLoRA, GaLore on its factors"]())
    train(run, 4)
    engine = run.methods[1].engine
    for matrix in engine.matrices.values():
        assert not matrix.has_basis()
        assert not run.optimizer.state[matrix.proxy]["exp_avg"].any()
        assert not run.optimizer.state[matrix.proxy]["exp_avg_sq"].any()
    assert run.events[-1]["moments"]["reset"] > 0
    layer: Any = adapted_layers(run.bare)["0"]
    assert not layer.heads[0].u.weight.any()  # lifted before the restart, not onto it


def test_weights_that_an_update_freezes_leave_the_projection() -> None:
    run = begin(GOOD["GaLore until ReLoRA opens"]())
    names = run.methods[0].parameter_names
    assert set(names(run.bare).values()) == {"0.weight.projected", "2.weight.projected"}
    train(run, 6)
    assert set(names(run.bare).values()) == {"2.weight.projected"}
    assert {*run.bare.get_submodule("0").heads.parameters()} <= held(run)


def test_a_resume_that_finds_nothing_to_project_is_refused_where_no_update_froze_it(
    tmp_path: Path,
) -> None:
    run = begin([GaLore(rank=2, every=3)])
    train(run, 2)
    path = rankwise.save(tmp_path, run)
    model = network()
    for layer in ("0", "2"):
        model.get_submodule(layer).requires_grad_(False)
    with pytest.raises(SelectionError, match="was selected by layers='auto'"):
        rankwise.start(model, GaLore(rank=2, every=3), adamw(model), resume=path)


# ---------------------------------------------------------------- LoRA+


@pytest.mark.parametrize(
    "name", ["LoRA+, ReLoRA", "LoRA+, LTE", "LoRA+, LTE, GaLore on its factors"]
)
def test_u_learns_16_times_as_fast_and_schedulers_drive_it(name: str) -> None:
    run = begin(GOOD[name]())
    scheduler = LambdaLR(run.optimizer, lambda step: 0.5**step)
    for step in range(1, 5):
        train(run, step)
        scheduler.step()
    stands = {
        n.removesuffix(".projected"): p
        for m in run.methods
        for p, n in m.parameter_names(run.bare).items()
    }
    rate = {p: g["lr"] for g in run.optimizer.param_groups for p in g["params"]}
    for layer_name, layer in adapted_layers(run.bare).items():
        heads: Any = layer.heads
        for n, head in enumerate(heads):
            u = stands.get(f"{layer_name}.heads.{n}.u.weight", head.u.weight)
            v = stands.get(f"{layer_name}.heads.{n}.v.weight", head.v.weight)
            assert rate[u] == 16 * rate[v] == 16 * 0.01 * 0.5**4


# ---------------------------------------------------------------- behind a switch


@pytest.mark.parametrize("name", [n for n in GOOD if "then LoRA" in n])
def test_lora_opens_behind_the_switch_and_keeps_the_function(name: str) -> None:
    run = begin(GOOD[name]())
    train(run, 3)
    assert not adapted_layers(run.bare)
    while not adapted_layers(run.bare):
        train(run, run.step + 1)
    assert isinstance(run.bare.get_submodule("0"), LowRankLayer)
    assert set(adapted_layers(run.bare)) == {"4"}
    x, _ = batch(0)
    dense = copy.deepcopy(run.bare)
    rankwise.to_dense(dense)
    torch.testing.assert_close(run.bare(x), dense(x), rtol=1e-5, atol=1e-6)
    heads: Any = adapted_layers(run.bare)["4"].heads
    assert not any(head.u.weight.any() for head in heads)


# ---------------------------------------------------------------- what does not go

BAD: dict[str, tuple[Methods, str]] = {
    "two LoRAs": (
        lambda: [LoRA(rank=2), LoRA(rank=2, layers="0")],
        "both would freeze the same weights and open updates of them",
    ),
    "LTE and ReLoRA": (
        lambda: [LTE(**LTE_2), ReLoRA(rank=2)],
        "both would freeze the same weights",
    ),
    "LoRA and Pufferfish": (
        lambda: [LoRA(rank=2), Pufferfish(ranks=4, warmup_steps=3)],
        "a switch looks for dense weights",
    ),
    "GaLore and Cuttlefish": (
        lambda: [GaLore(rank=2), Cuttlefish(ranks=4)],
        "a switch takes away the weights whose gradients are projected",
    ),
    "two GaLores": (lambda: [GaLore(rank=2), GaLore(rank=3)], "both project the gradients"),
    "LoRA+ alone": (lambda: [LoRAPlus(), Dense()], "LoRAPlus needs low-rank updates"),
    "LoRA+ twice": (
        lambda: [LoRA(rank=2), LoRAPlus(), LoRAPlus()],
        "the rate of U would be multiplied twice",
    ),
    "Frobenius decay of LoRA alone": (
        lambda: [LoRA(rank=2), FactorDecay()],
        "FactorDecay needs low-rank weights",
    ),
    "LoRA behind no switch": (
        lambda: [LoRA(rank=2, after_switch=True)],
        "LoRA needs low-rank weights: it waits for a switch",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_sense_is_refused_with_the_reason(name: str) -> None:
    make, reason = BAD[name]
    for order in (1, -1):
        with pytest.raises(CompositionError, match=reason):
            begin(make()[::order])
