"""An optimizer that follows a change: places, groups, moments, and what is reported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import rankwise
from rankwise.errors import LifeCycleError
from rankwise.method import Change, Successors
from rankwise.optim.groups import open_roles
from rankwise.optim.rebind import STATE_KINDS, forget_moments_, rebind

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p),
    "adam foreach": lambda p: torch.optim.Adam(p, foreach=True),
    "adam single": lambda p: torch.optim.Adam(p, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
}
UNKNOWN = {"adadelta", "adamax", "rprop", "adafactor"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 40),
        nn.ReLU(),
        nn.Linear(40, 5),
    )


def step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 1, 4, 4, generator=generator)
    y = torch.randint(5, (8,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_the_models_parameters_in_their_order(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    for seed in range(3):
        step(model, optimizer, seed)
    report = rebind(optimizer, rankwise.factorize(model, 4, norm=name == "adagrad"))
    assert report.carried + report.fresh == (8 if name == "adagrad" else 4)
    if name in UNKNOWN:
        assert report.unknown
        assert report.carried == 0
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(list(model.parameters()))
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    before = copy.deepcopy(model.state_dict())
    for seed in range(3):
        step(model, optimizer, 10 + seed)
    for key, value in model.state_dict().items():
        assert torch.isfinite(value).all(), key
        assert not torch.equal(value, before[key]) or "num_batches" in key, f"{key} never moved"


def test_every_state_of_torchs_optimizers_is_known_or_starts_fresh() -> None:
    """The table names only states that exist; an unknown one is never carried by its shape."""
    seen = set()
    for make in OPTIMIZERS.values():
        model = network()
        optimizer = make(model.parameters())
        step(model, optimizer, 0)
        seen |= {key for state in optimizer.state.values() for key in state}
    foreign = {"z"}  # schedule-free's
    assert STATE_KINDS.keys() - foreign <= seen


def linear_and_factors(norm: bool = False) -> tuple[nn.Sequential, Any, Any, Change]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh())
    dense: Any = model[0]
    change = rankwise.factorize(model, {"0": 3}, norm=norm)
    return model, dense, model[0], change


def test_momentum_becomes_the_factors_own_gradient_of_it() -> None:
    """M is linear in gradients, so U's moment is that of the gradients G V^T, V's of U^T G."""
    _, dense, low, change = linear_and_factors()
    optimizer = torch.optim.SGD([dense.weight, dense.bias], lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(9, 12, generator=generator) for _ in range(4)]
    for gradient in gradients:
        dense.weight.grad, dense.bias.grad = gradient, torch.zeros(9)
        optimizer.step()
    rebind(optimizer, change)
    u, v = low.factors()
    of_u = sum(0.9 ** (3 - i) * g @ v.T for i, g in enumerate(gradients))
    of_v = sum(0.9 ** (3 - i) * u.T @ g for i, g in enumerate(gradients))
    assert isinstance(of_u, Tensor)
    assert isinstance(of_v, Tensor)
    state = optimizer.state
    torch.testing.assert_close(state[low.u.weight]["momentum_buffer"], of_u, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state[low.v.weight]["momentum_buffer"], of_v, rtol=1e-5, atol=1e-6)


def test_first_adam_step_after_the_switch_is_no_longer_than_the_learning_rate() -> None:
    """The max rule. With one constant gradient entries are fully correlated: without the rule
    sqrt(v) of the factors is too small and the step was several learning rates long."""
    _, dense, low, change = linear_and_factors()
    optimizer = torch.optim.Adam([dense.weight, dense.bias], lr=1e-2)
    gradient = torch.ones(9, 12)
    for _ in range(300):
        dense.weight.grad, dense.bias.grad = gradient.clone(), torch.zeros(9)
        optimizer.step()
    u, v = low.factors()
    rebind(optimizer, change)
    for p in (low.u.weight, low.v.weight):
        assert int(optimizer.state[p]["step"]) == 300
    before = [low.u.weight.detach().clone(), low.v.weight.detach().clone()]
    low.u.weight.grad, low.v.weight.grad = gradient @ v.T, u.T @ gradient
    optimizer.step()
    for p, old in zip((low.u.weight, low.v.weight), before, strict=True):
        assert float((p.detach() - old).abs().max()) <= 1.01e-2


def test_second_moment_is_exact_for_uncorrelated_entries() -> None:
    """E[(G V^T)^2] = E[G^2] (V o V)^T when entries of G are independent: against 20,000 draws."""
    _, _, low, change = linear_and_factors()
    carry = next(iter(change.replaced.values())).carry
    assert carry is not None
    generator = torch.Generator().manual_seed(2)
    scale = torch.rand(9, 12, generator=generator) + 0.5
    draws = torch.randn(20_000, 9, 12, generator=generator) * scale
    u, v = low.factors()
    for_v, for_u = carry.second(scale.square(), None)
    assert for_v is not None
    assert for_u is not None
    torch.testing.assert_close(for_u, (draws @ v.T).square().mean(0), rtol=0.08, atol=0.0)
    torch.testing.assert_close(for_v, (u.T @ draws).square().mean(0), rtol=0.08, atol=0.0)


def test_convolution_moments_follow_through_the_matrix_view_and_keep_the_format() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(4, 8, 3)).to(
        memory_format=torch.channels_last  # pyright: ignore[reportCallIssue]
    )
    dense: Any = model[0]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    model(x).square().mean().backward()
    optimizer.step()
    moment = optimizer.state[dense.weight]["exp_avg"].clone()
    rebind(optimizer, rankwise.factorize(model, {"0": 4}))
    low: Any = model[0]
    u, _ = low.factors()
    state = optimizer.state[low.v.weight]["exp_avg"]
    torch.testing.assert_close(state.flatten(1), u.T @ moment.flatten(1), rtol=1e-5, atol=1e-8)
    assert state.stride() == low.v.weight.stride()


def test_a_bias_keeps_its_state_and_its_group() -> None:
    model = network()
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    weights = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [
            {"params": weights, "lr": 1e-3, "weight_decay": 0.1},
            {"params": biases, "lr": 5e-3, "weight_decay": 0.0},
        ]
    )
    step(model, optimizer, 0)
    dense: Any = model[5]
    state = optimizer.state[dense.bias]
    rebind(optimizer, rankwise.factorize(model, 4))
    low: Any = model[5]
    assert optimizer.state[low.u.bias] is state
    assert any(p is low.u.bias for p in optimizer.param_groups[1]["params"])
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 5e-3]
    factors = {id(p) for p in (low.u.weight, low.v.weight)}
    assert factors <= {id(p) for p in optimizer.param_groups[0]["params"]}


def test_roles_move_factors_to_a_twin_of_their_own_group() -> None:
    model = network()
    optimizer = torch.optim.SGD(
        [
            {"params": list(model[2].parameters()), "lr": 0.1, "weight_decay": 0.01},
            {"params": list(model[5].parameters()), "lr": 0.2, "weight_decay": 0.02},
        ],
        lr=1.0,
    )
    open_roles(optimizer, {"factors": {"weight_decay": 0.0}})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5**s)
    change = rankwise.factorize(model, {"2": 4, "5": 4})
    moved = {p: Successors(s.parameters, s.carry, "factors") for p, s in change.replaced.items()}
    rebind(optimizer, Change(replaced=moved, modules=change.modules))
    groups = optimizer.param_groups
    optimizer.step()
    assert [len(g["params"]) for g in groups] == [0, 1, 2, 2]
    assert [g["weight_decay"] for g in groups] == [0.01, 0.02, 0.0, 0.0]
    schedule.step()
    assert [g["lr"] for g in groups] == [0.05, 0.1, 0.05, 0.1]


def test_names_of_named_parameters_stay_in_step() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.named_parameters())
    change = rankwise.factorize(model, 4)
    names = {p: name for name, p in model.named_parameters()}
    rebind(optimizer, change, names)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]


def test_roles_of_an_optimizer_with_names_keep_them() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.named_parameters())
    open_roles(optimizer, {"factors": {"weight_decay": 0.0}})
    change = rankwise.factorize(model, {"5": 4})
    moved = {p: Successors(s.parameters, s.carry, "factors") for p, s in change.replaced.items()}
    names = {p: name for name, p in model.named_parameters()}
    rebind(optimizer, Change(replaced=moved, modules=change.modules), names)
    assert optimizer.param_groups[1]["param_names"] == ["5.v.weight", "5.u.weight"]


def test_what_the_optimizer_does_not_hold_stays_out_of_it() -> None:
    model = network()
    optimizer = torch.optim.SGD(model[5].parameters(), lr=0.1)
    report = rebind(optimizer, rankwise.factorize(model, 4))
    assert report.outside == 1
    assert len(optimizer.param_groups[0]["params"]) == 3


def test_a_frozen_layer_is_rightly_outside_and_no_loss() -> None:
    model = network()
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert rebind(optimizer, rankwise.factorize(model, 4)).outside == 0


def test_unknown_role_is_an_error_that_says_where_it_is_made() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight: Any = model[5].weight
    new = Successors((nn.Parameter(torch.zeros(1)),), role="factors")
    with pytest.raises(LifeCycleError, match=r"role 'factors'.*Method\.roles"):
        rebind(optimizer, Change(replaced={weight: new}))


def test_added_and_frozen_parameters() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, 0)
    weight: Any = model[5].weight
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    rebind(optimizer, Change(added={weight: Successors((a, b))}, frozen=(weight,)))
    held = optimizer.param_groups[0]["params"]
    assert not any(p is weight for p in held)
    assert weight not in optimizer.state
    at = next(i for i, p in enumerate(held) if p is a)
    assert held[at + 1] is b
    assert held[at + 2] is model[5].bias


def test_one_mask_for_all_moments() -> None:
    """Entries with m != 0 and v == 0 would make Adam step by m / eps."""
    parameter = nn.Parameter(torch.zeros(16, 16))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        parameter.grad = torch.randn(16, 16, generator=generator)
        optimizer.step()
    report = rebind(optimizer, Change(rewritten={parameter: 0.1}))
    state = optimizer.state[parameter]
    assert int((state["exp_avg"] != 0).sum()) == int(0.1 * 256)
    assert not bool(((state["exp_avg"] != 0) & (state["exp_avg_sq"] == 0)).any())
    assert report.reset == 2 * (256 - int(0.1 * 256))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert float((parameter.detach() - before).abs().max()) < 1e-2


@pytest.mark.parametrize(("keep", "left"), [(0.0, 0), (0.5, 8), (1.0, 16)])
def test_kept_fraction_of_moments_is_the_largest(keep: float, left: int) -> None:
    moment = torch.arange(1.0, 17).view(4, 4)
    state = {"exp_avg": moment.clone(), "exp_avg_sq": moment.square(), "step": torch.tensor(5.0)}
    reset = forget_moments_(state, keep)
    assert reset == 2 * (16 - left)
    expected = moment * (moment > 16 - left)
    torch.testing.assert_close(state["exp_avg"], expected, rtol=0, atol=0)
    assert float(state["step"]) == 5.0


def test_factors_of_a_frozen_weight_are_frozen_and_train_once_thawed() -> None:
    """Gradual unfreezing: the optimizer holds frozen parameters, so it must hold their factors."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, 0)
    weight: Any = model[5].weight
    weight.requires_grad_(False)
    momentum = optimizer.state[weight]["momentum_buffer"].clone()
    rebind(optimizer, rankwise.factorize(model, {"5": 4}))
    low: Any = model[5]
    u, v = (f.clone() for f in low.factors())
    assert not low.u.weight.requires_grad
    torch.testing.assert_close(
        optimizer.state[low.v.weight]["momentum_buffer"], u.T @ momentum, rtol=1e-5, atol=1e-7
    )
    step(model, optimizer, 1)
    torch.testing.assert_close(low.factors(), (u, v), rtol=0, atol=0)
    for p in low.parameters():
        p.requires_grad_(True)
    step(model, optimizer, 2)
    assert not torch.equal(low.factors()[0], u)
    assert not torch.equal(low.factors()[1], v)


def test_an_optimizer_with_eager_state_has_some_for_every_parameter_that_joins() -> None:
    model = network()
    optimizer = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=0.5)
    step(model, optimizer, 0)
    rebind(optimizer, rankwise.factorize(model, 4))
    rebind(optimizer, rankwise.to_dense(model))
    dense: Any = model[5]
    state = optimizer.state[dense.weight]
    assert float(state["step"]) == 0.0
    torch.testing.assert_close(state["sum"], torch.full((40, 384), 0.5), rtol=0, atol=0)
    step(model, optimizer, 1)


def test_roles_of_an_earlier_run_on_the_optimizer_are_used_again() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for decay in (0.0, 0.01):
        open_roles(optimizer, {"factors": {"weight_decay": decay}})
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.01]


def test_rmsprops_buffer_of_finished_updates_restarts_and_its_second_moment_is_carried() -> None:
    """Its momentum is of G / sqrt(v), not of G: U^T M would not be in units of a step."""
    _, dense, low, change = linear_and_factors()
    optimizer = torch.optim.RMSprop([dense.weight, dense.bias], lr=1e-3, momentum=0.9)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        dense.weight.grad = torch.randn(9, 12, generator=generator)
        dense.bias.grad = torch.ones(9)
        optimizer.step()
    second = optimizer.state[dense.weight]["square_avg"].clone()
    rebind(optimizer, change)
    _, v = low.factors()
    state = optimizer.state[low.u.weight]
    assert not state["momentum_buffer"].any()
    torch.testing.assert_close(state["square_avg"], second @ v.square().mT, rtol=1e-5, atol=1e-7)
    assert optimizer.state[dense.bias]["momentum_buffer"].any()


def test_what_was_frozen_has_no_gradient_that_clipping_would_count() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 8)).sum().backward()
    rebind(optimizer, rankwise.adapt(model, 2, ["0"]))
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert {p for p in model.parameters() if p.grad is not None} <= held
