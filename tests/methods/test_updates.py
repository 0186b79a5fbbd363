"""LoRA, LoRA+, ReLoRA and LTE: their laws, against plain torch and against each other."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rankwise
from rankwise.errors import CompositionError, LifeCycleError, OptionError, PlanError, SelectionError
from rankwise.layers import adapted_layers
from rankwise.method import Method


def network(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    layers = (nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    return nn.Sequential(*layers).to(dtype)


def data(step: int, batch: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(batch, 10, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (batch,), generator=generator)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01)


def trained(
    methods: Method | Sequence[Method],
    steps: int = 9,
    make: Callable[[nn.Module], Optimizer] = adamw,
    batch: int = 8,
    **options: Any,
) -> tuple[Any, rankwise.Run]:
    model = network()
    run = rankwise.start(model, methods, make(model), total_steps=steps or None, **options)
    for step in range(steps):
        x, y = data(step, batch)
        run.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        run.optimizer.step()
    return model, run


def function(model: nn.Module) -> Tensor:
    return model.eval()(data(99)[0]).detach()


def head(layer: Any, number: int = 0) -> Any:
    return layer.heads[number]


LORA: dict[str, Any] = {"rank": 3, "alpha": 6.0, "others": "all"}


def test_lora_is_plain_torch_with_two_products_in_the_weights_place() -> None:
    model, _ = trained(rankwise.LoRA(**LORA), steps=0)
    plain = network()
    factors = {
        n: (head(layer).u.weight.detach().clone(), head(layer).v.weight.detach().clone())
        for n, layer in adapted_layers(model).items()
    }
    leaves = [t.requires_grad_() for pair in factors.values() for t in pair]
    others = [p for n, p in plain.named_parameters() if n not in ("0.weight", "2.weight")]
    optimizer = AdamW([*leaves, *others], lr=0.01)
    for step in range(9):
        x, y = data(step)
        weights = {
            f"{n}.weight": plain[int(n)].weight.detach() + 2 * u @ v
            for n, (u, v) in factors.items()
        }
        optimizer.zero_grad()
        F.cross_entropy(torch.func.functional_call(plain, weights, (x,)), y).backward()
        optimizer.step()
    ours, run = trained(rankwise.LoRA(**LORA))
    for name, layer in adapted_layers(ours).items():
        torch.testing.assert_close(head(layer).u.weight, factors[name][0])
        torch.testing.assert_close(head(layer).v.weight, factors[name][1])
    run.finish()
    torch.testing.assert_close(ours[4].weight, plain[4].weight)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("every", [1, 2, 100])
def test_lte_with_one_head_is_plain_lora_whenever_it_merges(make: Any, every: int) -> None:
    lora, _ = trained(rankwise.LoRA(**LORA, init="orthogonal"), make=make)
    lte, _ = trained(rankwise.LTE(heads=1, **LORA, merge_every=every), make=make)
    torch.testing.assert_close(function(lte), function(lora))


def test_parallel_heads_are_models_of_their_own_that_meet_every_t_steps() -> None:
    """Each head alone: W + s (U V - U' V'), trained on its chunk, others frozen."""
    heads, every, scale = 4, 3, 2.0
    method = rankwise.LTE(heads=heads, rank=3, alpha=6.0, merge_every=every, others="none")
    model, _ = trained(method, make=sgd)
    start, _ = trained(
        rankwise.LTE(heads=heads, rank=3, alpha=6.0, others="none"), steps=0, make=sgd
    )
    plain = network()
    layers = adapted_layers(start)
    factors = [
        {n: [head(x, h).u.weight.detach(), head(x, h).v.weight.detach()] for n, x in layers.items()}
        for h in range(heads)
    ]
    weights = {n: plain[int(n)].weight.detach().clone() for n in layers}
    merged = [{n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(heads)]
    for step in range(9):
        x, y = data(step)
        for h, (part, targets) in enumerate(zip(x.chunk(heads), y.chunk(heads), strict=True)):
            leaves = {
                n: [t.clone().requires_grad_() for t in pair] for n, pair in factors[h].items()
            }
            own = {
                f"{n}.weight": weights[n] + scale * u @ v - merged[h][n]
                for n, (u, v) in leaves.items()
            }
            loss = F.cross_entropy(torch.func.functional_call(plain, own, (part,)), targets)
            loss.backward()
            factors[h] = {
                n: [(t - 0.1 * t.grad).detach() for t in pair] for n, pair in leaves.items()
            }
        if (step + 1) % every == 0:
            now = [{n: scale * u @ v for n, (u, v) in factors[h].items()} for h in range(heads)]
            for n in weights:
                weights[n] += sum(now[h][n] - merged[h][n] for h in range(heads)) / heads
            merged = now
    for n, layer in adapted_layers(model).items():
        torch.testing.assert_close(layer.base.weight, weights[n])
        for h in range(heads):
            torch.testing.assert_close(head(layer, h).u.weight.detach(), factors[h][n][0])


def test_sequential_heads_are_the_mean_of_their_updates() -> None:
    """As one LoRA whose factors stand side by side, with a scale divided by the heads."""
    model, _ = trained(rankwise.LTE(heads=3, rank=2, alpha=4.0, mode="sequential"), make=sgd)
    one, run = trained(rankwise.LoRA(rank=6, alpha=4.0, others="all"), steps=0, make=sgd)
    start, _ = trained(
        rankwise.LTE(heads=3, rank=2, alpha=4.0, mode="sequential"), steps=0, make=sgd
    )
    with torch.no_grad():
        for name, layer in adapted_layers(one).items():
            v = [head(adapted_layers(start)[name], n).v.weight for n in range(3)]
            head(layer).v.weight.copy_(torch.cat(v))
    for step in range(9):
        x, y = data(step)
        run.optimizer.zero_grad()
        F.cross_entropy(one(x), y).backward()
        run.optimizer.step()
    torch.testing.assert_close(function(model), function(one))


def test_relora_keeps_the_function_at_a_merge_and_trains_at_once_behind_it() -> None:
    method = rankwise.ReLoRA(rank=3, restart_every=4, restart_warmup=1, reset="full")
    model, run = trained(method, steps=3)
    functions = []
    for step in range(3, 5):
        x, y = data(step)
        run.optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        run.optimizer.step()
        if step == 3:
            layer = adapted_layers(model)["2"]
            assert not head(layer).u.weight.any()
            state = [run.optimizer.state[p] for p in layer.new_parameters()]
            assert not any(s["exp_avg"].any() or s["exp_avg_sq"].any() for s in state)
        functions.append(function(model))
    merge = next(e for e in run.events if e["event"] == "merge")
    heads = sum(
        p.numel() for layer in adapted_layers(model).values() for p in layer.new_parameters()
    )
    assert merge["moments"]["reset"] == 2 * heads
    assert (functions[1] - functions[0]).abs().max() > 1e-4


def test_the_function_before_and_after_a_merge_is_the_same() -> None:
    model, run = trained(rankwise.ReLoRA(rank=3, restart_every=100), steps=7)
    before = function(model)
    method: Any = run.methods[0]
    updates = method.updates
    weight = adapted_layers(model)["2"].base.weight.clone()
    updates.restart(7)
    torch.testing.assert_close(function(model), before)
    assert (adapted_layers(model)["2"].base.weight - weight).abs().max() > 1e-3


@pytest.mark.parametrize("reset", ["random", "magnitude"])
def test_one_mask_resets_all_moments_of_a_parameter(reset: str) -> None:
    method = rankwise.ReLoRA(rank=3, restart_every=6, reset=reset, reset_fraction=0.9)
    model, run = trained(method, steps=6)
    for layer in adapted_layers(model).values():
        for p in layer.new_parameters():
            first, second = (run.optimizer.state[p][k] != 0 for k in ("exp_avg", "exp_avg_sq"))
            torch.testing.assert_close(first, second)
            assert 0 < int(first.sum()) < p.numel() / 2


def test_relora_ramps_the_rate_behind_each_merge_alone() -> None:
    method = rankwise.ReLoRA(warmup_steps=5, restart_every=10, restart_warmup=4)
    scales = [method.lr_scale(step) for step in range(1, 31)]
    assert scales[:15] == [1.0] * 15
    assert scales[15:25] == [0.25, 0.5, 0.75, *[1.0] * 7]
    assert scales[25:] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_warm_start_is_dense_training() -> None:
    dense, _ = trained(rankwise.Dense(), steps=5)
    model, run = trained(rankwise.ReLoRA(rank=3, warmup_steps=5, restart_every=100), steps=5)
    torch.testing.assert_close(function(model), function(dense), rtol=0, atol=0)
    assert set(adapted_layers(model)) == {"0", "2"}
    held = {p for g in run.optimizer.param_groups for p in g["params"]}
    assert held == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "beside",
    [rankwise.LoRA(**LORA), rankwise.ReLoRA(rank=3), rankwise.LTE(heads=4, rank=3)],
    ids=["lora", "relora", "lte"],
)
def test_lora_plus_moves_u_at_its_own_rate_under_one_schedule(beside: Method) -> None:
    model = network()
    run = rankwise.start(model, [copy.deepcopy(beside), rankwise.LoRAPlus(ratio=16)], sgd(model))
    torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.5)
    u = {p for layer in adapted_layers(model).values() for p in layer.last_factors()}
    for group in run.optimizer.param_groups:
        for p in group["params"]:
            assert group["lr"] == pytest.approx(0.1 * 0.5 * (16 if p in u else 1))
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert set(held) == {p for p in model.parameters() if p.requires_grad}
    assert len(held) == len(set(held))


def test_what_goes_on_learning_is_said_by_others() -> None:
    model, _ = trained(rankwise.LoRA(rank=2, others="4,0.bias"), steps=1)
    learning = {n for n, p in model.named_parameters() if p.requires_grad and "heads" not in n}
    assert learning == {"0.base.bias", "4.weight", "4.bias"}
    _, run = trained(rankwise.LoRA(rank=2), steps=1)
    assert all(p.requires_grad for p in run.finish().parameters())


def test_an_optimizer_without_the_frozen_weights_gets_the_updates_all_the_same() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    run = rankwise.start(model, rankwise.LoRA(rank=2, layers="0"), optimizer)
    held = {p for g in run.optimizer.param_groups for p in g["params"]}
    assert set(adapted_layers(model)["0"].new_parameters()) <= held
    run.finish()
    assert not model[0].weight.requires_grad


def test_bfloat16_merges_do_not_lose_small_updates() -> None:
    """500 merges of an update a tenth of the weights' last bit: nearest rounding stands still."""
    moved = {}
    for rounding in ("stochastic", "nearest"):
        model = network(torch.bfloat16)
        with torch.no_grad():
            model[2].weight.fill_(1.0)
        method = rankwise.ReLoRA(rank=1, restart_every=1, layers="2", rounding=rounding, alpha=1)
        run = rankwise.start(model, method, sgd(model))
        first: Any = run.methods[0]
        updates = first.updates
        only = head(updates.layers["2"])
        for step in range(500):
            with torch.no_grad():
                only.v.weight.fill_(1.0)
                only.u.weight.fill_(2.0**-11)
            updates.restart(step)
        moved[rounding] = model[2].base.weight.float().mean() - 1
    assert moved["nearest"] == 0
    torch.testing.assert_close(moved["stochastic"], torch.tensor(500 / 2048), rtol=0.1, atol=0)


def test_an_averaged_copy_follows_updates_and_merges() -> None:
    model = network()
    run = rankwise.start(
        model, rankwise.ReLoRA(rank=3, warmup_steps=2, restart_every=3), sgd(model), seed=1
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    run.follow(average)
    for step in range(8):
        x, y = data(step)
        run.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before = function(average)
        run.optimizer.step()
        torch.testing.assert_close(function(average), before)  # a merge changes no function
        if step in (4, 7):  # merged: its own update is in its own weights, and it begins anew too
            for name, layer in adapted_layers(average.module).items():
                assert not head(layer).u.weight.any()
                theirs = head(adapted_layers(model)[name])
                torch.testing.assert_close(head(layer).v.weight, theirs.v.weight)
        average.update_parameters(model)
        model.train()
    run.finish()
    assert not adapted_layers(average)
    assert (function(average) - function(model)).abs().max() < 0.2


def test_a_tied_head_and_embedding_share_one_update() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False))
    model[2].weight = model[0].weight
    with pytest.raises(SelectionError, match="tied"):
        rankwise.adapt(copy.deepcopy(model), 2, layers="2")
    run = rankwise.start(model, rankwise.LoRA(rank=2, layers="0,2"), adamw(model))
    tokens = torch.arange(12)
    for _ in range(3):
        run.optimizer.zero_grad()
        F.cross_entropy(model(tokens), tokens).backward()
        run.optimizer.step()
    expected = model(tokens)
    run.finish()
    assert model[2].weight is model[0].weight
    torch.testing.assert_close(model(tokens), expected)


def test_attention_is_opened_for_its_updates_and_closed_behind_them() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    before = model(x)
    run = rankwise.start(model, rankwise.LoRA(rank=2, layers="self_attn.*,linear?"), adamw(model))
    assert set(adapted_layers(model)) == {
        *(f"self_attn.{n}" for n in ("q", "k", "v", "out_proj")),
        "linear1",
        "linear2",
    }
    torch.testing.assert_close(model(x), before)
    for mode in (True, False):
        model.train(mode)
        run.optimizer.zero_grad()
        model(x).square().mean().backward()
        run.optimizer.step()
    expected = model(x)
    run.finish()
    assert type(model.self_attn) is nn.MultiheadAttention
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_run_that_ends_before_its_first_merge_is_told(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        trained(rankwise.LTE(heads=2, rank=2, merge_every=50), steps=4)
    assert "LTE never merges: the run ends after step 4" in caplog.text


def test_wrong_input_is_answered_in_words() -> None:
    with pytest.raises(SelectionError, match=r"'fc\*' matches none"):
        trained(rankwise.LoRA(rank=2, layers="fc*"))
    with pytest.raises(PlanError, match=r"0 \(16, 10\): rank 64 does not fit"):
        trained(rankwise.LoRA(rank=64))
    with pytest.raises(PlanError, match="an update of rank 64 does not fit a weight of 16×10"):
        trained(rankwise.ReLoRA(rank=64, warmup_steps=3))
    with pytest.raises(SelectionError, match="others='head' matches none of the 4 parameters"):
        trained(rankwise.LoRA(rank=2, others="head"))
    with pytest.raises(CompositionError, match="LoRA and LTE do not go together"):
        trained([rankwise.LoRA(), rankwise.LTE()])
    with pytest.raises(CompositionError, match="LoRAPlus needs low-rank updates"):
        trained(rankwise.LoRAPlus())
    with pytest.raises(LifeCycleError, match="a batch of 3 cannot be divided among 4 heads"):
        trained(rankwise.LTE(heads=4, rank=2), batch=3)
    with pytest.raises(OptionError, match="unknown mode 'paralel'; did you mean 'parallel'"):
        rankwise.LTE(mode="paralel")
    with pytest.raises(CompositionError, match="a switch looks for dense weights"):
        trained([rankwise.Pufferfish(ranks=4, warmup_steps=2), rankwise.LoRA(rank=2)])


class Int8Params(nn.Parameter):
    """As bitsandbytes' weights."""


@pytest.mark.parametrize("layers", ["auto", "0,2"])
def test_a_quantised_base_is_refused_with_the_reason_and_the_way_out(layers: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    for place in (0, 2):
        whole: Any = model[place]
        whole.weight = Int8Params(torch.zeros(8, 8), requires_grad=False)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(SelectionError) as raised:
        rankwise.start(model, rankwise.LoRA(rank=2, layers=layers), optimizer)
    message = str(raised.value)
    assert (
        f"no layer of Sequential was selected by layers='{layers}' (0: its weight is a" in message
    )
    assert (
        "Int8Params, no plain tensor (quantised or sharded); load the model in float32" in message
    )
    assert ("keep_last" in message) == (layers == "auto")
