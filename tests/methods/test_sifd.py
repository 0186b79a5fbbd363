"""What SI&FD promises: decay of the product in place of weight decay, by any optimizer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import rankwise
from rankwise import models
from rankwise.errors import CompositionError, OptionError, PlanError
from rankwise.layers import LowRankLayer
from rankwise.methods import METHODS
from rankwise.methods.factor_decay import FactorDecay
from rankwise.methods.sifd import SIFD
from rankwise.optim.penalties import parse_penalty

STEPS = 4
LOW = "low.*"  # the layers that become low-rank in `Net`


class Net(nn.Module):
    """A convolution with stride, a grouped one, a tied and a plain linear layer, dense ends."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.low = nn.ModuleDict(
            {
                "conv": nn.Conv2d(8, 12, 3, stride=2, padding=1),
                "twice": nn.Linear(48, 48, bias=False),
                "tied": nn.Linear(48, 48, bias=False),
                "last": nn.Linear(48, 32),
            }
        )
        self.low["tied"].weight = self.low["twice"].weight
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.low["conv"](self.stem(x).tanh()).flatten(1)
        x = self.low["tied"](self.low["twice"](x).tanh()).tanh()
        return self.head(self.low["last"](x).tanh())


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def loss_of(model: nn.Module, step: int, part: slice = slice(None)) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 2, 4, 4, generator=generator, dtype=torch.float64)
    return model(x[part]).square().mean()


def sgd(parameters: Any, **options: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, **options)


def adam(parameters: Any, **options: Any) -> Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, **options)


def adamw(parameters: Any, **options: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, **options)


def low_rank(model: nn.Module) -> list[LowRankLayer]:
    unique = {m.u.weight: m for m in model.modules() if isinstance(m, LowRankLayer)}
    return list(unique.values())


def factors_of(model: nn.Module) -> list[nn.Parameter]:
    return [getattr(layer, part).weight for layer in low_rank(model) for part in layer.parts]


def by_definition(model: nn.Module, kind: str) -> Tensor:
    """The penalty of all low-rank layers, the product formed as the dense weight, for autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in low_rank(model):
        weights = [getattr(layer, part).weight for part in layer.parts]
        values = {
            "frobenius": lambda layer=layer: layer.weight.square().sum(),
            "l2": lambda weights=weights: sum(w.square().sum() for w in weights),
            "kronecker": lambda weights=weights: torch.stack(
                [w.square().sum() for w in weights]
            ).prod(),
        }
        for name, weight in parse_penalty(kind).items():
            total = total + weight / 2 * values[name]()
    return total


def start(method: Any, make: Callable[..., Optimizer], decay: float, **options: Any) -> Any:
    model = net()
    return rankwise.start(model, method, make(model.parameters(), weight_decay=decay), **options)


def train(run: rankwise.Run, steps: int = STEPS, first: int = 0) -> None:
    for step in range(first, first + steps):
        run.optimizer.zero_grad()
        loss_of(run.model, step).backward()
        run.optimizer.step()


def assert_same(a: nn.Module, b: nn.Module, rtol: float = 1e-9) -> None:
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------ the decay is the penalty's gradient


@pytest.mark.parametrize("form", ["UV", "UCV"])
@pytest.mark.parametrize("kind", ["frobenius", "kronecker", "l2", "frobenius+0.5*l2"])
@pytest.mark.parametrize("make", [sgd, adam])
def test_coupled_decay_is_autograd_of_the_penalty_in_the_loss(make, kind, form):
    run = start(SIFD(ranks=4, layers=LOW, decay=kind, core=form == "UCV"), make, 0.05)
    own = copy.deepcopy(run.bare)
    factors = factors_of(own)
    others = [p for p in own.parameters() if not any(p is f for f in factors)]
    optimizer = make([{"params": others, "weight_decay": 0.05}, {"params": factors}])
    train(run)
    for step in range(STEPS):
        optimizer.zero_grad()
        (loss_of(own, step) + 0.05 * by_definition(own, kind)).backward()
        optimizer.step()
    assert_same(run.bare, own)


@pytest.mark.parametrize("form", ["UV", "UCV"])
@pytest.mark.parametrize("kind", ["frobenius", "kronecker", "l2", "frobenius+0.5*l2"])
def test_decoupled_decay_takes_the_penaltys_gradient_off_the_weights(kind, form):
    run = start(SIFD(ranks=4, layers=LOW, decay=kind, core=form == "UCV"), adamw, 0.5)
    own = copy.deepcopy(run.bare)
    factors = factors_of(own)
    others = [p for p in own.parameters() if not any(p is f for f in factors)]
    optimizer = adamw(
        [{"params": others, "weight_decay": 0.5}, {"params": factors, "weight_decay": 0.0}]
    )
    train(run)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(own, step).backward()
        pulls = torch.autograd.grad(by_definition(own, kind), factors)
        with torch.no_grad():
            for factor, pull in zip(factors, pulls, strict=True):
                factor.sub_(0.01 * 0.5 * pull)
        optimizer.step()
    assert_same(run.bare, own)


@pytest.mark.parametrize("make", [sgd, adam, adamw])
def test_l2_is_the_optimizers_own_weight_decay(make):
    with_decay = start(SIFD(ranks=4, layers=LOW, decay="l2"), make, 0.05)
    without = start(SIFD(ranks=4, layers=LOW, decay="none"), make, 0.05)
    plain = start(rankwise.Factorized(ranks=4, layers=LOW), make, 0.05)
    for run in (with_decay, without, plain):
        train(run)
    assert_same(with_decay.bare, plain.bare)
    assert_same(without.bare, plain.bare, rtol=0)


def test_maximising_turns_the_decay_round_too():
    plain = start(rankwise.Factorized(ranks=4, layers=LOW), sgd, 0.05)
    run = start(SIFD(ranks=4, layers=LOW, decay="l2"), sgd, 0.05)
    for each in (plain, run):
        for group in each.optimizer.param_groups:
            group["maximize"] = True
        train(each)
    assert_same(run.bare, plain.bare)


# --------------------------------------------------------------- strength, groups, learning rates


def test_the_factors_leave_weight_decay_and_decay_by_what_their_layer_had():
    model = net()
    convolution = list(model.low["conv"].parameters())
    rest = [p for p in model.parameters() if not any(p is c for c in convolution)]
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": convolution, "weight_decay": 0.7}]
    run = rankwise.start(model, SIFD(ranks=4, layers=LOW), torch.optim.SGD(groups, lr=0.0))
    decay = {p: g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    factors = factors_of(model)
    assert {decay[p] for p in factors} == {0.0}
    assert decay[model.get_parameter("low.conv.u.bias")] == 0.7
    assert decay[model.head.weight] == 0.1
    loss_of(model, 0).backward()
    before = {p: p.grad.clone() for p in factors if p.grad is not None}
    run.before_step()
    for layer in low_rank(model):
        weights = [getattr(layer, part).weight for part in layer.parts]
        pulls = torch.autograd.grad(layer.weight.square().sum() / 2, weights)
        wanted = 0.7 if layer is model.low["conv"] else 0.1
        for weight, pull in zip(weights, pulls, strict=True):
            torch.testing.assert_close(weight.grad - before[weight], wanted * pull)


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_a_strength_given_goes_before_the_weight_decay(decay):
    run = start(SIFD(ranks=4, layers=LOW, strength=0.2), sgd, decay)
    loss_of(run.model, 0).backward()
    layer: Any = run.bare.low["last"]
    (pull,) = torch.autograd.grad(layer.weight.square().sum() / 2, [layer.u.weight])
    before = layer.u.weight.grad.clone()
    run.before_step()
    torch.testing.assert_close(layer.u.weight.grad - before, 0.2 * pull)


def test_decay_that_does_nothing_is_said_once(caplog):
    run = start(SIFD(ranks=4, layers=LOW), sgd, 0.0)
    with caplog.at_level(logging.WARNING):
        train(run)
    assert len([r for r in caplog.records if "no decay" in r.message]) == 1


@pytest.mark.parametrize("make", [sgd, adamw])
def test_schedules_and_resumed_runs_keep_the_decay_in_step(make, tmp_path: Path):
    def begin(**options: Any) -> tuple[Any, Any]:
        run = start(SIFD(ranks=4, layers=LOW), make, 0.3, **options)
        return run, torch.optim.lr_scheduler.StepLR(run.optimizer, 1, gamma=0.5)

    def go(run: Any, scheduler: Any, steps: range) -> None:
        for step in steps:
            train(run, 1, step)
            scheduler.step()

    whole, scheduler = begin()
    go(whole, scheduler, range(6))
    half, scheduler = begin()
    go(half, scheduler, range(3))
    rankwise.save(tmp_path, half, extra={"scheduler": scheduler.state_dict()})
    again, scheduler = begin(resume=tmp_path)
    again.resumed.restore_scheduler(scheduler)
    go(again, scheduler, range(3, 6))
    assert_same(again.bare, whole.bare, rtol=0)


def test_a_methods_factor_on_the_learning_rate_scales_decoupled_decay_too():
    """AdamW with l2 is AdamW's own decay, also while another method halves the rate."""
    runs = []
    for beside in ([FactorDecay(decay="l2")], []):
        method = rankwise.Pufferfish(ranks=4, layers=LOW, warmup_steps=2, lr_factor=0.5)
        run = start([method, *beside], adamw, 0.5)
        train(run, 6)
        runs.append(run)
    assert_same(runs[0].bare, runs[1].bare)


# ------------------------------------------------------------------------------- gradient scaling


def test_gradient_scaling_leaves_the_decay_alone_and_skips_it_with_the_step():
    def run_with(scale: float | None, broken: int | None = None) -> nn.Module:
        run = start(SIFD(ranks=4, layers=LOW), adam, 0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(STEPS):
            run.optimizer.zero_grad()
            loss = loss_of(run.model, step) * (float("inf") if step == broken else 1.0)
            if step == broken and scale is None:
                continue
            scaler.scale(loss).backward()
            scaler.step(run.optimizer)
            scaler.update()
        return run.bare

    assert_same(run_with(1024.0), run_with(None))
    assert_same(run_with(1024.0, broken=2), run_with(None, broken=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_decay_by_grams_in_float32(dtype):
    model = net().to(dtype)
    rankwise.factorize(model, 4, layers=LOW)
    layer: Any = model.low["last"]
    for part in ("u", "v"):
        weight = getattr(layer, part).weight
        weight.data.mul_(300)  # |V|^2 is beyond what float16 holds
        weight.grad = torch.zeros_like(weight)
    u, v = (getattr(layer, part).weight.detach().double() for part in ("u", "v"))
    rankwise.optim.decay.frobenius_decay_(layer, 1e-4)
    expected = 1e-4 * u @ (v @ v.T)
    # No worse than the rounding of the result itself.
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(layer.u.weight.grad, expected.to(dtype), rtol=rounding, atol=0)


def _worker(rank: int, meeting: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    run = start(SIFD(ranks=4, layers=LOW), sgd, 0.3, wrap=DistributedDataParallel)
    for step in range(STEPS):
        run.optimizer.zero_grad()
        loss_of(run.model, step, slice(3 * rank, 3 * rank + 3)).backward()
        run.optimizer.step()
    torch.save(run.bare.state_dict(), f"{results}-{rank}")
    torch.distributed.destroy_process_group()


def test_two_workers_decay_once_and_stay_equal(tmp_path: Path):
    files = (str(tmp_path / "meeting"), str(tmp_path / "result"))
    torch.multiprocessing.spawn(  # pyright: ignore
        _worker, files, nprocs=2
    )
    first, second = (torch.load(f"{files[1]}-{rank}", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    run = start(SIFD(ranks=4, layers=LOW), sgd, 0.3)
    train(run)
    torch.testing.assert_close(first, dict(run.bare.state_dict()), rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("order", [1, -1])
def test_factor_decay_takes_over_at_the_switch(make, order):
    """Before it, the dense weights' own decay; after it l2 on the factors is the same as theirs."""
    methods = [rankwise.Pufferfish(ranks=4, layers=LOW, warmup_steps=2), FactorDecay(decay="l2")]
    run = start(methods[::order], make, 0.3)
    plain = start(rankwise.Pufferfish(ranks=4, layers=LOW, warmup_steps=2), make, 0.3)
    for each in (run, plain):
        train(each, 2)
    assert_same(run.bare, plain.bare, rtol=0)
    groups = {p: g for g in run.optimizer.param_groups for p in g["params"]}
    assert {groups[p]["weight_decay"] for p in factors_of(run.bare)} == {0.0}
    for each in (run, plain):
        train(each, 4, first=2)
    assert_same(run.bare, plain.bare)


@pytest.mark.parametrize("order", [1, -1])
def test_factor_decay_beside_factors_from_the_start(order):
    methods = [rankwise.Factorized(ranks=4, layers=LOW), FactorDecay(decay="l2")]
    run = start(methods[::order], adamw, 0.3)
    plain = start(rankwise.Factorized(ranks=4, layers=LOW), adamw, 0.3)
    groups = {p: g for g in run.optimizer.param_groups for p in g["params"]}
    assert {groups[p]["weight_decay"] for p in factors_of(run.bare)} == {0.0}
    for each in (run, plain):
        train(each)
    assert_same(run.bare, plain.bare)


@pytest.mark.parametrize(
    "methods",
    [
        lambda: SIFD(ranks=4, layers=LOW),
        lambda: [rankwise.Factorized(ranks=4, layers=LOW), FactorDecay()],
        lambda: [FactorDecay(), rankwise.Factorized(ranks=4, layers=LOW)],
    ],
)
def test_an_optimizer_that_a_factory_makes_decays_alike(methods):
    given = start(methods(), adamw, 0.3)
    made = rankwise.start(net(), methods(), lambda m: adamw(m.named_parameters(), weight_decay=0.3))
    groups = {p: g for g in made.optimizer.param_groups for p in g["params"]}
    assert {groups[p]["weight_decay"] for p in factors_of(made.bare)} == {0.0}
    names = [n for g in made.optimizer.param_groups for n in g["param_names"]]
    assert sorted(names) == sorted(n for n, _ in made.bare.named_parameters())
    for each in (given, made):
        train(each)
    assert_same(given.bare, made.bare)


def test_layers_that_the_user_made_low_rank_decay_too():
    model = net()
    rankwise.factorize(model, 4, layers="low.last")
    optimizer = sgd(model.parameters(), weight_decay=0.3)
    method = rankwise.Pufferfish(ranks=4, layers="low.conv", warmup_steps=1)
    run = rankwise.start(model, [method, FactorDecay()], optimizer)
    groups = {p: g for g in run.optimizer.param_groups for p in g["params"]}
    assert {groups[p]["weight_decay"] for p in factors_of(model)} == {0.0}
    train(run, 2)
    groups = {p: g for g in run.optimizer.param_groups for p in g["params"]}
    assert len(factors_of(model)) == 4
    assert {groups[p]["weight_decay"] for p in factors_of(model)} == {0.0}


def test_frobenius_decay_beside_pufferfish_differs_from_weight_decay():
    runs = []
    for beside in ([FactorDecay()], []):
        method = rankwise.Pufferfish(ranks=4, layers=LOW, warmup_steps=2)
        run = start([method, *beside], sgd, 0.3)
        train(run, 6)
        runs.append(run.bare.get_parameter("low.last.u.weight"))
    assert (runs[0] - runs[1]).norm() > 1e-3 * runs[1].norm()


def test_factor_decay_refuses_what_it_cannot_act_on():
    with pytest.raises(CompositionError, match="FactorDecay needs low-rank weights"):
        start([rankwise.Dense(), FactorDecay()], sgd, 0.1)
    with pytest.raises(CompositionError, match="a BatchNorm takes the scale out"):
        start([rankwise.Pufferfish(warmup_steps=2, norm=True), FactorDecay()], sgd, 0.1)
    with pytest.raises(CompositionError, match="would decay twice"):
        start([SIFD(ranks=4), FactorDecay()], sgd, 0.1)


# --------------------------------------------------------------------- ranks, forms, initialisation


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("target", [0.1, 0.33, 0.8])
def test_a_target_ratio_is_met_to_less_than_one_rank(target, separable):
    torch.manual_seed(0)
    model = models.build("resnet-small")
    dense = sum(p.numel() for p in model.parameters())
    method = SIFD(target_ratio=target, separable=separable)
    rankwise.start(model, method, torch.optim.SGD(model.parameters(), lr=0.1))
    got = sum(p.numel() for p in model.parameters())
    assert got <= target * dense
    layers = [m for m in model.modules() if isinstance(m, LowRankLayer)]
    steps = [sum(p.numel() for p in m.new_parameters()) // m.rank for m in layers]
    assert target * dense - got < min(steps), "one more rank would still fit"
    kinds = {tuple(m.u.weight.shape[2:]) for m in layers if m.u.weight.dim() == 4}
    assert ((3, 1) in kinds) == separable


def test_ranks_and_target_ratio_exclude_each_other():
    with pytest.raises(OptionError, match="not both"):
        SIFD(ranks=4, target_ratio=0.5)
    with pytest.raises(PlanError, match="out of reach"):
        start(SIFD(target_ratio=0.001), sgd, 0.1)


def test_three_factors_are_built_where_asked_for():
    run = start(SIFD(ranks=4, layers=LOW, core=True), sgd, 0.1)
    assert all(layer.core is not None for layer in low_rank(run.bare))
    run = start(SIFD(ranks=4, layers=LOW), sgd, 0.1)
    assert all(layer.core is None for layer in low_rank(run.bare))


def test_spectral_initialisation_is_the_nearest_product_and_others_are_not():
    dense = net().low["last"].weight.detach()  # pyright: ignore
    left = dense.square().sum()
    errors = {}
    for init in ("spectral", "default"):
        run = start(SIFD(ranks=4, layers=LOW, init=init), sgd, 0.1)
        errors[init] = (run.bare.low["last"].weight.detach() - dense).square().sum()
    kept = torch.linalg.svdvals(dense)[:4].square().sum()
    torch.testing.assert_close(errors["spectral"], left - kept, rtol=1e-6, atol=0)
    assert errors["default"] > errors["spectral"]


@pytest.mark.parametrize("name", ["sifd", "factor-decay"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "frobenious"}, "did you mean 'frobenius'"),
        ({"strength": -1.0}, "at least 0"),
        ({"attention": "kq"}, "unknown attention"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(OptionError, match=message):
        METHODS[name](**options)
