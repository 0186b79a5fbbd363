"""start and Run: the user's loop, optimizer, scheduler and scaler stay theirs."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

import rankwise
from rankwise.errors import CompositionError, LifeCycleError, OptionError, SelectionError
from rankwise.layers import LowRankLayer
from rankwise.method import NO_CHANGE, Change, Method, Successors

SWITCH = 4


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def batch(i: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + i)
    x = torch.randn(size, 10, generator=generator)
    return x, torch.randint(4, (size,), generator=generator)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def pufferfish(**options: Any) -> rankwise.Pufferfish:
    return rankwise.Pufferfish(**{"ranks": 8, "warmup_steps": SWITCH, **options})


def train(
    model: Any, optimizer: Optimizer, steps: range, micro: int = 1, scheduler: Any = None
) -> None:
    for i in steps:
        x, y = batch(i)
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(micro), y.chunk(micro), strict=True):
            (F.cross_entropy(model(part_x), part_y) / micro).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same(a: nn.Module, b: nn.Module, rtol: float = 0.0, atol: float = 0.0) -> None:
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_the_loop_of_the_readme() -> None:
    model = network()
    optimizer = sgd(model)
    run = rankwise.start(model, pufferfish(), optimizer)
    train(model, optimizer, range(10))
    assert run.finish() is model
    assert isinstance(model[2], LowRankLayer)
    assert run.step == 10
    assert [e["event"] for e in run.events] == ["plan", "plan", "switch"]


def test_a_plan_decided_at_the_last_step_is_announced_at_the_end() -> None:
    model = network()
    optimizer = sgd(model)
    run = rankwise.start(model, pufferfish(ranks="energy=0.4,multiple=1"), optimizer)
    train(model, optimizer, range(SWITCH))
    assert [e["event"] for e in run.events] == ["plan", "plan", "switch"]
    run.finish()
    last = run.events[-1]
    assert (last["event"], last["step"]) == ("plan", SWITCH)
    ranks = {layer["name"]: layer["rank"] for layer in last["layers"]}
    assert ranks["2"] == run.plan.ranks["2"]  # pyright: ignore[reportOptionalMemberAccess]


def test_before_the_switch_training_is_exactly_dense() -> None:
    dense, model = network(), network()
    plain, optimizer = sgd(dense), sgd(model)
    run = rankwise.start(model, pufferfish(), optimizer)
    train(dense, plain, range(SWITCH - 1))
    train(model, optimizer, range(SWITCH - 1))
    assert_same(model, dense)
    run.finish()


def test_at_the_switch_the_function_is_the_truncation_and_the_event_says_so() -> None:
    x, y = batch(99)

    def loss(m: nn.Module) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(m(x), y))

    dense, model = network(), network()
    train(dense, sgd(dense), range(SWITCH))
    optimizer = sgd(model)
    run = rankwise.start(model, pufferfish(), optimizer, probe=loss)
    train(model, optimizer, range(SWITCH))
    event = run.events[-1]
    assert event["event"] == "switch"
    assert event["step"] == SWITCH
    assert event["loss_before"] == loss(dense)
    assert event["loss_after"] == loss(model)
    assert event["loss_before"] != event["loss_after"]
    weight: Any = dense[2].weight
    u, s, vh = torch.linalg.svd(weight.detach())
    low: Any = model[2]
    best = u[:, :8] * s[:8] @ vh[:8]
    torch.testing.assert_close(low.weight.detach(), best, rtol=1e-5, atol=1e-6)
    stored = sum(p.numel() for p in model.parameters())
    assert event["parameters"] == [sum(p.numel() for p in dense.parameters()), stored]


def test_full_rank_factors_give_the_dense_function_at_the_switch() -> None:
    dense, model = network(), network()
    train(dense, sgd(dense), range(SWITCH))
    optimizer = sgd(model)
    rule = rankwise.ranks.Ratio(1.0, allow_growth=True)
    rankwise.start(model, pufferfish(ranks=rule), optimizer)
    train(model, optimizer, range(SWITCH))
    x, _ = batch(50)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro", [2, 4])
def test_micro_batches_equal_one_batch(micro: int) -> None:
    one, many = network(), network()
    for model, parts in ((one, 1), (many, micro)):
        optimizer = sgd(model)
        rankwise.start(model, pufferfish(), optimizer)
        train(model, optimizer, range(10), micro=parts)
    assert_same(one, many, rtol=1e-3, atol=1e-5)


def test_every_scheduler_keeps_driving_every_group() -> None:
    model = network()
    optimizer = torch.optim.SGD(
        [
            {"params": model[0].parameters(), "lr": 0.1},
            {"params": [*model[2].parameters(), *model[4].parameters()], "lr": 0.2},
        ],
        momentum=0.9,
    )
    rankwise.start(model, pufferfish(), optimizer)
    scheduler = StepLR(optimizer, step_size=2, gamma=0.5)
    seen = []
    for i in range(8):
        train(model, optimizer, range(i, i + 1), scheduler=scheduler)
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert seen == [[0.1 * 0.5 ** ((i + 1) // 2), 0.2 * 0.5 ** ((i + 1) // 2)] for i in range(8)]


@pytest.mark.parametrize(
    "make",
    [lambda o: OneCycleLR(o, 0.1, total_steps=12), lambda o: LambdaLR(o, lambda s: 1 / (s + 1))],
)
def test_the_switch_leaves_the_schedule_alone(make: Callable[[Optimizer], Any]) -> None:
    rates = []
    for method in (rankwise.Dense(), pufferfish()):
        model = network()
        optimizer = sgd(model)
        rankwise.start(model, method, optimizer)
        scheduler = make(optimizer)
        own = []
        for i in range(10):
            train(model, optimizer, range(i, i + 1), scheduler=scheduler)
            own.append(optimizer.param_groups[0]["lr"])
        rates.append(own)
    assert rates[0] == rates[1]


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_declared_lr_factor_acts_on_the_step_and_is_put_back(tensor_lr: bool) -> None:
    lr: Any = torch.tensor(0.1) if tensor_lr else 0.1
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    run = rankwise.start(model, pufferfish(lr_factor=0.5), optimizer)
    used = []
    step = optimizer.register_step_pre_hook(
        lambda o, *_: used.append(float(o.param_groups[0]["lr"]))
    )
    train(model, optimizer, range(SWITCH + 2))
    step.remove()
    torch.testing.assert_close(used, [0.1] * SWITCH + [0.05] * 2, rtol=1e-6, atol=0.0)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    assert run.events[-1]["lr_factor"] == 0.5
    if tensor_lr:
        assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler_plain_and_fused_with_steps_it_skips(fused: bool) -> None:
    """Same weights and counts as an unscaled run of the finite steps alone."""

    def run_scaled(scale: float, broken: tuple[int, ...]) -> tuple[nn.Module, Any]:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        run = rankwise.start(model, pufferfish(), optimizer, clip_norm=0.1)
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=scale, growth_interval=10_000, backoff_factor=1.0 - 1e-9
        )
        for i in range(10):
            for bad in (True, False) if i in broken else (False,):
                x, y = batch(i)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y) * (float("inf") if bad else 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        return model, run

    expected, plain = run_scaled(1.0, ())
    scaled, run = run_scaled(1024.0, (1, SWITCH - 1, SWITCH, 7))
    assert run.step == plain.step == 10
    assert_same(scaled, expected, rtol=1e-5, atol=1e-6)
    for state in run.optimizer.state.values():
        assert int(state["step"]) == 10


def test_fused_and_plain_adam_end_with_the_same_weights() -> None:
    models = []
    choices: tuple[dict[str, Any], ...] = ({"fused": True}, {"foreach": True}, {"foreach": False})
    for options in choices:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
        rankwise.start(model, pufferfish(), optimizer)
        train(model, optimizer, range(10))
        models.append(model)
    assert_same(models[0], models[1], rtol=1e-4, atol=1e-5)
    assert_same(models[1], models[2], rtol=1e-4, atol=1e-5)


def test_clip_norm_equals_clipping_in_the_loop() -> None:
    ours, theirs = network(), network()
    optimizer = sgd(ours)
    rankwise.start(ours, pufferfish(), optimizer, clip_norm=0.05)
    train(ours, optimizer, range(8))
    optimizer = sgd(theirs)
    rankwise.start(theirs, pufferfish(), optimizer)
    for i in range(8):
        x, y = batch(i)
        optimizer.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        optimizer.step()
    assert_same(ours, theirs)


def test_without_hooks_the_loop_calls_them_itself() -> None:
    hooked, manual = network(), network()
    optimizer = sgd(hooked)
    rankwise.start(hooked, pufferfish(lr_factor=0.5), optimizer)
    train(hooked, optimizer, range(8))
    optimizer = sgd(manual)
    run = rankwise.start(manual, pufferfish(lr_factor=0.5), optimizer, hooks=False)

    def closure() -> Tensor:
        optimizer.zero_grad()
        x, y = batch(run.step)
        loss = F.cross_entropy(manual(x), y)
        loss.backward()
        run.before_step()
        return loss

    for _ in range(8):
        optimizer.step(closure)  # pyright: ignore[reportCallIssue, reportArgumentType]
        run.after_step()
    assert_same(hooked, manual)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_is_waited_for(by_keyword: bool) -> None:
    """It computes and clips within the step; the methods see what it leaves."""
    plain, closed = network(), network()
    optimizer = sgd(plain)
    rankwise.start(plain, pufferfish(lr_factor=0.5), optimizer)
    train(plain, optimizer, range(8))
    optimizer = sgd(closed)
    run = rankwise.start(closed, pufferfish(lr_factor=0.5), optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        x, y = batch(run.step)
        loss = F.cross_entropy(closed(x), y)
        loss.backward()
        return loss

    step: Any = optimizer.step
    for _ in range(8):
        loss = step(closure=closure) if by_keyword else step(closure)
        assert isinstance(loss, Tensor)
    assert run.step == 8
    assert_same(plain, closed)


def test_a_closure_that_is_evaluated_twice_is_refused() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    model = network()
    optimizer = Twice(model.parameters(), lr=0.1)
    rankwise.start(model, pufferfish(), optimizer)
    with pytest.raises(LifeCycleError, match="evaluates its closure several times"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("closed", [False, True])
def test_a_step_that_calls_its_parents_is_one_step(closed: bool) -> None:
    """torch hangs hooks on the step of every class that was built, also on the parent's."""

    class Louder(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    plain, louder = network(), network()
    optimizer = sgd(plain)  # from now on SGD.step calls hooks
    rankwise.start(plain, pufferfish(lr_factor=0.5), optimizer)
    train(plain, optimizer, range(8))
    optimizer = Louder(louder.parameters(), **optimizer.defaults)
    run = rankwise.start(louder, pufferfish(lr_factor=0.5), optimizer)
    with pytest.raises(ZeroDivisionError):  # a step that fails leaves nothing open
        optimizer.step(lambda: 1 / 0)
    for step in range(8):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(louder(x), y).backward()
        optimizer.step((lambda: 0.0) if closed else None)
    assert run.step == 8
    assert_same(plain, louder)


def test_none_as_closure_by_position_is_no_closure() -> None:
    model = network()
    optimizer = sgd(model)
    run = rankwise.start(model, rankwise.Dense(), optimizer)
    optimizer.step(None)
    assert run.step == 1


def test_start_after_a_scheduler_is_detected() -> None:
    model = network()
    optimizer = sgd(model)
    _ = StepLR(optimizer, 1)
    with pytest.raises(LifeCycleError, match=r"scheduler was built .* before rankwise\.start"):
        rankwise.start(model, pufferfish(), optimizer)


def test_an_optimizer_of_another_model_is_detected() -> None:
    with pytest.raises(LifeCycleError, match="none of the parameters of Sequential"):
        rankwise.start(network(), pufferfish(), sgd(network()))


def test_wrapped_and_compiled_models_are_refused_with_the_way_out() -> None:
    model = network()
    with pytest.raises(LifeCycleError, match=r"wrap=torch\.compile"):
        rankwise.start(torch.compile(model), pufferfish(), sgd(model))  # pyright: ignore[reportArgumentType]
    with pytest.raises(LifeCycleError, match="wrap=DataParallel"):
        rankwise.start(nn.DataParallel(model), pufferfish(), sgd(model))


def test_lbfgs_is_refused() -> None:
    model = network()
    with pytest.raises(LifeCycleError, match="LBFGS"):
        rankwise.start(model, pufferfish(), torch.optim.LBFGS(model.parameters()))


def test_a_factory_is_called_with_the_prepared_model() -> None:
    seen: list[nn.Module] = []

    def factory(model: nn.Module) -> Optimizer:
        seen.append(copy.deepcopy(model))
        return sgd(model)

    model = network()
    run = rankwise.start(model, rankwise.Factorized(8), factory)
    assert isinstance(seen[0].get_submodule("2"), LowRankLayer)
    train(model, run.optimizer, range(3))
    other = network()
    optimizer = sgd(other)
    rankwise.start(other, rankwise.Factorized(8), optimizer)
    train(other, optimizer, range(3))
    assert_same(model, other)


def test_the_first_forward_is_watched_once_and_only_once() -> None:
    model = network()
    optimizer = sgd(model)
    run = rankwise.start(model, pufferfish(), optimizer)
    assert run.context.trace is None
    train(model, optimizer, range(1))
    assert run.context.trace is not None
    assert run.context.trace.order == ("0", "2", "4")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert run.plan is not None
    assert run.plan.flops is not None


def test_a_sample_gives_the_plan_before_the_first_step() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    run = rankwise.start(model, pufferfish(), sgd(model), sample=batch(0)[0][:2])
    assert run.plan is not None
    assert run.plan.flops is not None
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_an_averaged_copy_follows_the_switch() -> None:
    model = network()
    optimizer = sgd(model)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    run = rankwise.start(model, pufferfish(), optimizer)
    run.follow(average)
    for i in range(SWITCH + 8):
        train(model, optimizer, range(i, i + 1))
        average.update_parameters(model)
        if run.step == SWITCH:
            ours: Any = model[2]
            theirs: Any = average.module.get_submodule("2")
            torch.testing.assert_close(theirs.v.weight, ours.v.weight, rtol=0, atol=0)
    assert rankwise.read_plan(average.module) == rankwise.read_plan(model)
    assert {id(p) for p in average.module.parameters()}.isdisjoint(map(id, model.parameters()))
    # The average of factors must still be a network near the model: same loss within a tenth.
    x, y = batch(7)
    ours_loss = F.cross_entropy(model(x), y)
    torch.testing.assert_close(F.cross_entropy(average(x), y), ours_loss, rtol=0.1, atol=0.0)


def test_finish_takes_the_hooks_off_and_says_what_never_happened(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = network()
    optimizer = sgd(model)
    run = rankwise.start(model, pufferfish(warmup_steps=100), optimizer)
    train(model, optimizer, range(2))
    with caplog.at_level(logging.WARNING):
        run.finish()
    assert "never switches: the run ends after step 2" in caplog.text
    train(model, optimizer, range(2))
    assert run.step == 2


def test_composition_is_decided_by_what_methods_declare() -> None:
    model = network()
    with pytest.raises(CompositionError, match="Pufferfish and Factorized do not go together"):
        rankwise.start(model, [pufferfish(), rankwise.Factorized(8)], sgd(model))
    with pytest.raises(CompositionError, match=r"write Dense\(\)"):
        rankwise.start(model, rankwise.Dense, sgd(model))  # pyright: ignore[reportArgumentType]
    with pytest.raises(CompositionError, match="no method given"):
        rankwise.start(model, [], sgd(model))
    run = rankwise.start(model, [rankwise.Dense(), pufferfish()], sgd(model))
    assert len(run.methods) == 2


def test_a_method_serves_one_run() -> None:
    method = pufferfish()
    model = network()
    rankwise.start(model, method, sgd(model))
    other = network()
    with pytest.raises(LifeCycleError, match="its own instance"):
        rankwise.start(other, method, sgd(other))


@pytest.mark.parametrize(
    ("options", "context", "error", "words"),
    [
        ({"warmup_epochs": 2}, {}, OptionError, "steps_per_epoch"),
        ({}, {}, OptionError, "warmup_epochs or warmup_steps"),
        ({"warmup_epochs": 1, "warmup_steps": 1}, {}, OptionError, "not both"),
        ({"warmup_steps": 0}, {}, OptionError, "at least 1"),
        ({"warmup_steps": 1, "lr_factor": 0.0}, {}, OptionError, "above 0"),
        ({"warmup_steps": 1, "layers": "blocks.*"}, {}, SelectionError, "matches none"),
    ],
)
def test_options_that_do_not_fit_fail_at_the_start(
    options: dict[str, Any], context: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = network()
    with pytest.raises(error, match=words):
        rankwise.start(model, rankwise.Pufferfish(**options), sgd(model), **context)


def test_epochs_and_fractions_become_steps() -> None:
    cases: tuple[tuple[dict[str, Any], int], ...] = (
        ({"warmup_epochs": 0.5}, 10),
        ({"warmup_epochs": 2.0}, 40),
        ({}, 80),
    )
    for options, expected in cases:
        model, method = network(), rankwise.Pufferfish(**options)
        rankwise.start(model, method, sgd(model), steps_per_epoch=20, total_steps=300)
        assert method.switch_step == expected


@dataclass
class Recorder(Method):
    """Counts its hooks, moves its factors to a role of their own, and edits gradients."""

    provides: ClassVar[frozenset[str]] = frozenset({"records"})

    def __post_init__(self) -> None:
        self.calls: list[str] = []

    def roles(self) -> dict[str, dict[str, Any]]:
        return {"free of decay": {"weight_decay": 0.0}}

    def prepare(self, model: nn.Module) -> Change:
        change = rankwise.factorize(model, {"2": 4})
        return Change(
            {
                p: Successors(s.parameters, s.carry, "free of decay")
                for p, s in change.replaced.items()
            },
            modules=change.modules,
        )

    def before_step(self, model: nn.Module, step: int) -> None:
        self.calls.append(f"before {step}")

    def after_step(self, model: nn.Module, step: int) -> Change:
        self.calls.append(f"after {step}")
        return NO_CHANGE

    def on_change(self, model: nn.Module, change: Change) -> None:
        self.calls.append("change")


def test_the_order_of_the_hooks_and_the_group_of_a_role() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    method = Recorder()
    rankwise.start(model, method, optimizer)
    train(model, optimizer, range(2))
    assert method.calls == ["before 1", "after 1", "before 2", "after 2"]
    assert [len(g["params"]) for g in optimizer.param_groups] == [5, 2]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]


def test_state_of_a_run_loads_with_weights_only(tmp_path: Any) -> None:
    for steps in (2, 8):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters())
        run = rankwise.start(model, pufferfish(), optimizer)
        train(model, optimizer, range(steps))
        torch.save(run.state_dict(), tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        assert loaded["step"] == steps
        assert set(loaded["plan"]) == ({"2"} if steps > SWITCH else set())


def test_state_of_another_composition_is_refused() -> None:
    model = network()
    run = rankwise.start(model, pufferfish(), sgd(model))
    state = run.state_dict()
    other = network()
    fresh = rankwise.start(other, rankwise.Dense(), sgd(other))
    with pytest.raises(LifeCycleError, match=r"0:Pufferfish.*0:Dense"):
        fresh.load_state_dict(state, model.state_dict())


def test_a_method_can_be_tried_again_after_a_failed_start() -> None:
    model, method = network(), pufferfish(layers="nothing")
    optimizer = sgd(model)
    for _ in range(2):
        with pytest.raises(SelectionError, match="'nothing' matches none"):
            rankwise.start(model, method, optimizer)


def test_an_optimizer_belongs_to_one_run_at_a_time() -> None:
    model = network()
    optimizer = sgd(model)
    run = rankwise.start(model, rankwise.Dense(), optimizer)
    with pytest.raises(LifeCycleError, match="already belongs to a run"):
        rankwise.start(model, rankwise.Dense(), optimizer)
    run.finish()
    rankwise.start(model, rankwise.Dense(), optimizer)


def test_a_copy_made_while_the_first_forward_is_awaited_is_free_of_hooks_after_its_own() -> None:
    model = network()
    optimizer = sgd(model)
    run = rankwise.start(model, pufferfish(), optimizer)
    twin = copy.deepcopy(model)
    twin(batch(0)[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    assert run.context.trace is None
    train(model, optimizer, range(1))
    assert run.context.trace is not None


def test_the_dense_weight_is_freed_at_the_switch() -> None:
    model = network()
    optimizer = sgd(model)
    run = rankwise.start(model, pufferfish(), optimizer, probe=lambda m: 0.0)
    weight: Any = model[2].weight
    gone = weakref.ref(weight)
    kept = list(model.parameters())
    train(model, optimizer, range(SWITCH + 1))
    assert weight.grad is None, "a list of parameters kept by the loop would clip by it"
    del weight, kept
    gc.collect()
    assert gone() is None
    assert run.step == SWITCH + 1


def test_a_scheduler_that_begins_anew_after_a_resume_is_warned_of(
    caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    model = network()
    optimizer = sgd(model)
    run = rankwise.start(model, pufferfish(), optimizer)
    scheduler = LambdaLR(optimizer, lambda s: 0.5**s)
    train(model, optimizer, range(2), scheduler=scheduler)
    rankwise.save(tmp_path, run, extra={"scheduler": scheduler.state_dict()})
    for restored in (True, False):
        caplog.clear()
        model = network()
        optimizer = sgd(model)
        run = rankwise.start(model, pufferfish(), optimizer, resume=tmp_path)
        scheduler = LambdaLR(optimizer, lambda s: 0.5**s)
        if restored:
            assert run.resumed is not None
            run.resumed.restore_scheduler(scheduler)
        train(model, optimizer, range(2, 4), scheduler=scheduler)
        assert ("begins anew" in caplog.text) != restored


def test_a_learning_rate_tensor_shared_by_groups_is_scaled_once_and_restored() -> None:
    lr = torch.tensor(0.1)
    model = network()
    layers: Any = model
    optimizer = torch.optim.SGD(
        [
            {"params": layers[0].parameters()},
            {"params": [*layers[2].parameters(), *layers[4].parameters()]},
        ],
        lr=lr,
    )
    rankwise.start(model, pufferfish(lr_factor=0.5), optimizer)
    used = []
    optimizer.register_step_pre_hook(lambda *_: used.append(float(lr)))
    train(model, optimizer, range(SWITCH + 2))
    torch.testing.assert_close(used, [0.1] * SWITCH + [0.05] * 2, rtol=1e-6, atol=0.0)
    assert float(lr) == pytest.approx(0.1)


def test_a_first_forward_that_raises_is_forgotten_and_the_next_one_watched() -> None:
    model = network()
    optimizer = sgd(model)
    run = rankwise.start(model, pufferfish(), optimizer)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(2, 3))
    train(model, optimizer, range(2))
    assert run.context.trace is not None
    assert run.context.trace.order == ("0", "2", "4")


def test_a_probe_leaves_modes_and_random_state_as_they_were() -> None:
    def probe(m: nn.Module) -> float:
        m.eval()
        return float(torch.rand(()))

    runs = []
    for with_probe in (True, False):
        model = network()
        model[3] = nn.Dropout(0.5)
        model[0].eval()
        optimizer = sgd(model)
        rankwise.start(model, pufferfish(), optimizer, probe=probe if with_probe else None)
        train(model, optimizer, range(8))
        assert not model[0].training
        assert model[2].training
        assert model[3].training
        runs.append(model)
    assert_same(*runs)


def test_a_probe_that_raises_leaves_the_optimizer_in_step_with_the_model() -> None:
    def probe(m: nn.Module) -> float:
        raise ArithmeticError("on purpose")

    model = network()
    optimizer = sgd(model)
    rankwise.start(model, pufferfish(), optimizer, probe=probe)
    with pytest.raises(ArithmeticError, match="on purpose"):
        train(model, optimizer, range(SWITCH))
    assert isinstance(model[2], LowRankLayer)
    held = optimizer.param_groups[0]["params"]
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))


def test_a_switch_inside_autocast_is_made_in_full_precision() -> None:
    models, states = [], []
    for autocast in (True, False):
        model = network()
        optimizer = sgd(model)
        rankwise.start(model, pufferfish(), optimizer)
        for i in range(SWITCH):
            x, y = batch(i)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                optimizer.step()
        models.append(model)
        states.append([optimizer.state[p]["momentum_buffer"] for p in model.parameters()])
    assert_same(*models)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_a_switch_inside_inference_mode_makes_trainable_factors() -> None:
    models = []
    for inference in (True, False):
        model = network()
        optimizer = sgd(model)
        rankwise.start(model, pufferfish(), optimizer)
        for i in range(8):
            x, y = batch(i)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.inference_mode(inference):
                optimizer.step()
        models.append(model)
    assert_same(*models)


@dataclass
class Traced(Method):
    """Notes whether its hook runs inside a compiler's trace."""

    def __post_init__(self) -> None:
        self.seen: list[bool] = []

    def after_step(self, model: nn.Module, step: int) -> Change:
        self.seen.append(torch.compiler.is_compiling())
        return NO_CHANGE


@pytest.mark.slow
def test_a_compiled_step_does_not_trace_the_hooks() -> None:
    torch._dynamo.reset()
    models = []
    for compiled in (True, False):
        model, method = network(), Traced()
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2))
        run = rankwise.start(model, [pufferfish(lr_factor=0.5), method], optimizer)
        step: Any = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for i in range(8):
            x, y = batch(i)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            step()
        assert run.step == 8
        assert method.seen == [False] * 8
        models.append(model)
    # The compiled optimizer rounds differently, which the SVD amplifies.
    assert_same(*models, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_hooks_on_replaced_parameters_are_missed_aloud(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    weight: Any = model[2].weight
    weight.register_hook(lambda gradient: None)
    optimizer = sgd(model)
    rankwise.start(model, pufferfish(), optimizer)
    train(model, optimizer, range(SWITCH))
    assert "1 replaced parameters had hooks of yours" in caplog.text


def test_a_wrap_that_returns_nothing_is_refused() -> None:
    def nothing(m: nn.Module) -> Any:
        return None

    model = network()
    with pytest.raises(LifeCycleError, match="wrap returned None"):
        rankwise.start(model, rankwise.Dense(), sgd(model), wrap=nothing)


def test_replaced_weights_that_the_optimizer_does_not_hold_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two optimizers over one model: the factors would silently not train."""
    for frozen in (True, False):
        caplog.clear()
        model = network()
        weight: Any = model[2].weight
        weight.requires_grad_(not frozen)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p is not weight], lr=0.1)
        rankwise.start(model, pufferfish(), optimizer)
        train(model, optimizer, range(SWITCH))
        assert ("factors are not trained by it" in caplog.text) != frozen


def test_a_switch_due_after_the_last_step_is_announced_at_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = network()
    rankwise.start(model, pufferfish(warmup_steps=11), sgd(model), total_steps=10)
    assert "the run ends after step 10, the switch is due after 11" in caplog.text


@dataclass
class Finalizer(Method):
    """Counts what it is told, in order."""

    def __post_init__(self) -> None:
        self.calls: list[str] = []

    def prepare(self, model: nn.Module) -> Change:
        self.calls.append("prepare")
        return NO_CHANGE

    def after_step(self, model: nn.Module, step: int) -> Change:
        self.calls.append(f"after {step}")
        return NO_CHANGE

    def on_change(self, model: nn.Module, change: Change) -> None:
        self.calls.append(f"change of {', '.join(change.modules)}")

    def finalize(self, model: nn.Module) -> Change:
        self.calls.append("finalize")
        return NO_CHANGE


def test_finishing_twice_finalises_once() -> None:
    model, method = network(), Finalizer()
    run = rankwise.start(model, method, sgd(model))
    assert run.finish() is model
    assert run.finish() is model
    assert method.calls == ["prepare", "finalize"]


def test_methods_hear_of_others_changes_once_and_after_their_own_preparation() -> None:
    orders = {
        "first": ["prepare", "after 1", "change of 2", "after 2"],
        "second": ["prepare", "after 1", "after 2", "change of 2"],
    }
    for place, expected in orders.items():
        model, method = network(), Finalizer()
        optimizer = sgd(model)
        # Called before the switching method's `after_step` the change comes behind one's own.
        methods = [pufferfish(warmup_steps=2), method]
        rankwise.start(model, methods if place == "first" else methods[::-1], optimizer)
        train(model, optimizer, range(2))
        assert method.calls == expected
    for methods, expected in (
        ([rankwise.Factorized(8), Finalizer()], ["prepare"]),
        ([Finalizer(), rankwise.Factorized(8)], ["prepare", "change of 2"]),
    ):
        model = network()
        run = rankwise.start(model, methods, sgd(model))
        method = next(m for m in run.methods if isinstance(m, Finalizer))
        assert method.calls == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip_norm": 0.0}, r"clip_norm=0\.0 must be above 0"),
        ({"clip_norm": -1.0}, r"clip_norm=-1\.0 must be above 0"),
        ({"clip_norm": float("nan")}, "clip_norm=nan must be above 0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0 must be at least 1"),
        ({"total_steps": -4}, "total_steps=-4 must be at least 1"),
    ],
)
def test_numbers_out_of_range_fail_at_the_start(options: dict[str, Any], words: str) -> None:
    model = network()
    with pytest.raises(OptionError, match=words):
        rankwise.start(model, rankwise.Dense(), sgd(model), **options)


def test_what_is_no_optimizer_is_refused_with_the_way_out() -> None:
    model = network()
    for wrong in (torch.optim.SGD, model.parameters(), lambda m: list(m.parameters())):
        with pytest.raises(LifeCycleError, match=r"optimizer.*pass an instance.*lambda model"):
            rankwise.start(model, rankwise.Dense(), wrong)  # pyright: ignore[reportArgumentType]


def test_one_instance_of_a_method_given_twice_is_refused() -> None:
    model, method = network(), rankwise.Dense()
    with pytest.raises(CompositionError, match="same method instance is given twice"):
        rankwise.start(model, [method, method], sgd(model))


def test_a_handle_is_copied_as_the_bare_model_pickled_and_set_through() -> None:
    model = network()
    optimizer = sgd(model)
    run = rankwise.start(model, pufferfish(), optimizer, wrap=nn.DataParallel)
    twin = copy.deepcopy(run.model)
    assert type(twin) is nn.Sequential
    assert_same(twin, model)
    assert {id(p) for p in twin.parameters()}.isdisjoint(map(id, model.parameters()))
    again = pickle.loads(pickle.dumps(run.model))
    x, _ = batch(0)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    run.model.dim = 1
    assert vars(run.model)["_current"].dim == 1


def test_a_new_wrapper_is_in_the_mode_of_the_model() -> None:
    model = network()
    optimizer = sgd(model)
    run = rankwise.start(model, pufferfish(), optimizer, wrap=nn.DataParallel)
    run.model.eval()
    train(run.model, optimizer, range(SWITCH))
    assert not run.model.training


@pytest.mark.slow
def test_compiled_model_goes_on_after_the_switch() -> None:
    torch._dynamo.reset()
    model = network()
    optimizer = sgd(model)
    run = rankwise.start(
        model, pufferfish(), optimizer, wrap=lambda m: torch.compile(m, backend="aot_eager")
    )
    train(run.model, optimizer, range(8))
    plain = network()
    optimizer = sgd(plain)
    rankwise.start(plain, pufferfish(), optimizer)
    train(plain, optimizer, range(8))
    assert_same(model, plain, rtol=1e-4, atol=1e-5)
    with contextlib.suppress(AttributeError):
        run.model.train()
    torch._dynamo.reset()
