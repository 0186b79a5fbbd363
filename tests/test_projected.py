"""Projected gradients: the laws of the engine, whichever method chose its settings."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import rankwise
from rankwise.errors import CompositionError, LifeCycleError, SelectionError
from rankwise.method import Method
from rankwise.methods.apollo import Apollo
from rankwise.methods.dion import Dion
from rankwise.methods.fira import Fira
from rankwise.methods.frugal import Frugal
from rankwise.methods.galore import GaLore
from rankwise.methods.ldadam import LDAdam
from rankwise.methods.pufferfish import Pufferfish
from rankwise.methods.tracked import Tracked
from rankwise.optim.projected.engine import ProjectedGradients
from rankwise.optim.projected.gradient import LowRankGrad

Make = Callable[[nn.Module], Optimizer]
Batch = tuple[Tensor, Tensor]

METHODS: dict[str, Callable[[], Method]] = {
    "plain": partial(GaLore, 4, every=5),
    "first basis stays": partial(GaLore, 4, every=0),
    "rotated": partial(GaLore, 4, every=3, moments="rotate"),
    "exact": partial(GaLore, 4, every=5, basis="svd"),
    "two-sided": partial(GaLore, 4, every=5, side="both"),
    "residual": partial(Fira, 4, every=5),
    "scaling": partial(Apollo, 4, every=5),
    "signs": partial(Frugal, 4, every=5),
    "feedback": partial(LDAdam, 4),
    "orthonormal": partial(Dion, 4),
    "tracked": partial(Tracked, 4),
    "tracked, residual": partial(Tracked, 4, residual=True),
}
all_methods = pytest.mark.parametrize("name", METHODS)


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 8)
    ).to(dtype)


def batches(count: int, size: int = 16, seed: int = 1) -> Iterator[Batch]:
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(24, 8, generator=g)
    for _ in range(count):
        x = torch.randn(size, 24, generator=g)
        yield x, (x @ target).argmax(1)


def adamw(model: nn.Module, **options: Any) -> Optimizer:
    return AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.0, **options})


def sgd(model: nn.Module, **options: Any) -> Optimizer:
    return SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def begin(model: nn.Module, method: Method, make: Make = adamw, **options: Any) -> rankwise.Run:
    return rankwise.start(model, method, make(model), **options)


def loss_of(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(
    run: rankwise.Run,
    data: Iterator[Batch] | list[Batch],
    *,
    zero: Callable[[], None] | None = None,
    micro: int = 1,
    clip: Callable[[], object] | None = None,
    scheduler: Any = None,
) -> None:
    for x, y in data:
        for piece in zip(x.chunk(micro), y.chunk(micro), strict=True):
            (loss_of(run.model, piece) / micro).backward()
        if clip is not None:
            clip()
        run.optimizer.step()
        if scheduler is not None:
            scheduler.step()
        (zero or run.optimizer.zero_grad)()


def dense(model: nn.Module, optimizer: Optimizer, data: Iterator[Batch]) -> None:
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def gap(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def engine_of(run: rankwise.Run) -> ProjectedGradients:
    return run.methods[0].engine  # type: ignore[attr-defined]


# ---------------------------------------------------------------- the dense model is the oracle


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("basis", ["power", "svd", "random"])
def test_a_square_basis_with_sgd_and_momentum_is_dense_sgd(basis: str, decay: float) -> None:
    a, b = mlp(), mlp()
    make = partial(sgd, weight_decay=decay)
    dense(a, make(a), batches(40))
    method = GaLore(99, every=7, scale=1.0, basis=basis, moments="rotate", layers="*")
    run = begin(b, method, make)
    for matrix in engine_of(run).matrices.values():
        # At full rank the engine would take the identity; the law is about the basis itself.
        assert matrix.identity
        matrix.sides = ("right",) if matrix.shape[0] >= matrix.shape[1] else ("left",)
    train(run, batches(40))
    assert gap(a, mlp()) > 0.05
    assert gap(a, b) < 1e-4


@pytest.mark.parametrize(
    "make", [partial(sgd, weight_decay=0.05), partial(adamw, weight_decay=0.1)]
)
def test_full_rank_is_the_identity_and_any_optimizer_steps_as_if_alone(make: Make) -> None:
    a, b = mlp(), mlp()
    dense(a, make(a), batches(40))
    run = begin(b, GaLore(99, every=7, scale=1.0, layers="*"), make)
    train(run, batches(40))
    assert all(m.identity for m in engine_of(run).matrices.values())
    assert gap(a, mlp()) > 0.05
    assert gap(a, b) < 1e-5


def test_decoupled_decay_acts_on_the_weight() -> None:
    model = mlp()
    run = begin(model, GaLore(4), partial(adamw, weight_decay=0.1))
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a, b * (1 - 1e-3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("maximize", [False, True])
def test_the_projected_step_is_that_of_the_projected_gradient(maximize: bool) -> None:
    """One step of SGD with coupled decay: W - lr scale P P^T (G + decay W)."""
    model, (x, y) = mlp(), next(batches(1))
    decay, sign = 0.05, -1.0 if maximize else 1.0
    make = partial(sgd, weight_decay=decay, momentum=0.0, maximize=maximize)
    run = begin(model, GaLore(4, scale=0.5), make)
    before = copy.deepcopy(model)
    loss_of(before, (x, y)).backward()
    train(run, [(x, y)])
    for index in (0, 2):
        matrix = engine_of(run).matrices[f"{index}.weight"]
        weight = before[index].weight
        total = sign * weight.grad + decay * weight.detach()
        basis = matrix.basis(matrix.sides[0])
        part = total @ basis @ basis.T if matrix.sides == ("right",) else basis @ basis.T @ total
        expected = weight.detach() - 0.1 * 0.5 * part
        torch.testing.assert_close(model[index].weight.detach(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(basis.T @ basis, torch.eye(4), rtol=0, atol=1e-5)


@all_methods
def test_maximizing_the_negated_loss_is_minimizing_the_loss(name: str) -> None:
    models = []
    for sign in (1, -1):
        model = mlp()
        run = begin(
            model, METHODS[name](), partial(sgd, maximize=sign < 0, weight_decay=0.05, lr=0.05)
        )
        for batch in batches(6):
            (sign * loss_of(model, batch)).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        models.append(model)
    assert gap(models[0], mlp()) > 1e-3
    assert gap(*models) < 1e-5


# ---------------------------------------------------------------- accumulation, zeroing, clipping


@all_methods
def test_micro_batches_are_one_batch(name: str) -> None:
    models = []
    for micro in (1, 4):
        model = mlp()
        train(begin(model, METHODS[name](), sgd), batches(12), micro=micro)
        models.append(model)
    assert gap(models[0], mlp()) > 1e-3
    assert gap(*models) < 2e-4


@all_methods
@pytest.mark.parametrize("to_none", [True, False])
def test_either_zero_grad_clears_the_same_gradient(name: str, to_none: bool) -> None:
    models = []
    for by_model in (False, True):
        model = mlp()
        run = begin(model, METHODS[name]())
        owner: Any = model if by_model else run.optimizer
        train(run, batches(12), zero=partial(owner.zero_grad, set_to_none=to_none))
        models.append(model)
    assert gap(*models) == 0


@all_methods
def test_the_gradients_of_weight_and_proxy_are_one(name: str) -> None:
    model = mlp()
    run = begin(model, METHODS[name]())
    data = list(batches(8))
    train(run, data[:7])
    loss_of(model, data[7]).backward()
    matrix = engine_of(run).matrices["0.weight"]
    held, small = model[0].weight.grad, matrix.proxy.grad
    assert isinstance(held, LowRankGrad)
    assert held.shape == (40, 24)
    assert small is not None
    assert small.shape == matrix.proxy.shape
    before = small.clone()
    held.mul_(0.5)
    torch.testing.assert_close(matrix.proxy.grad, before * 0.5, rtol=0, atol=0)
    dense_before = held + 0.0
    small.mul_(3.0)
    torch.testing.assert_close(held + 0.0, dense_before * 3, rtol=1e-5, atol=1e-7)
    model.zero_grad()
    assert matrix.proxy.grad is None


def test_the_full_gradient_is_freed_and_reads_show_the_lifted_one() -> None:
    model = mlp()
    run = begin(model, GaLore(4, every=0))
    data = list(batches(2))
    train(run, data[:1])
    loss_of(model, data[1]).backward()
    held, matrix = model[0].weight.grad, engine_of(run).matrices["0.weight"]
    assert isinstance(held, LowRankGrad)
    assert held.full is None
    lifted = matrix.lift(held.look())
    torch.testing.assert_close(held.norm(), lifted.norm())
    torch.testing.assert_close(torch.linalg.vector_norm(held), lifted.norm())
    assert torch.equal(held.abs().max(), lifted.abs().max())
    assert torch.equal(torch.histc(held * 2, 5), torch.histc(lifted * 2, 5))
    assert torch.equal(copy.deepcopy(held), lifted)


@pytest.mark.parametrize("name", ["plain", "residual", "scaling", "feedback", "tracked"])
def test_clipping_by_model_by_optimizer_and_by_the_run(name: str) -> None:
    """The norms of residual methods are those of the dense gradient where the model is asked."""
    models = {}
    for kind in ("none", "model", "optimizer", "run"):
        model = mlp()
        options = {"clip_norm": 0.05} if kind == "run" else {}
        run = begin(model, METHODS[name](), sgd, **options)
        by_optimizer = [p for g in run.optimizer.param_groups for p in g["params"]]
        held = {"model": list(model.parameters()), "optimizer": by_optimizer}.get(kind)
        clip = None if held is None else partial(nn.utils.clip_grad_norm_, held, 0.05)
        train(run, batches(12), clip=clip)
        models[kind] = model
    assert gap(models["none"], models["model"]) > 1e-3
    assert gap(models["model"], models["run"]) < 1e-6
    if not METHODS[name]().choices().update.keeps_full:  # type: ignore[attr-defined]
        assert gap(models["optimizer"], models["run"]) < 1e-6


def test_the_clipped_norm_of_a_residual_method_is_the_dense_one() -> None:
    model = mlp()
    begin(model, Apollo(1), sgd)
    other = mlp()
    batch = next(batches(1))
    loss_of(model, batch).backward()
    loss_of(other, batch).backward()
    a = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    b = nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    torch.testing.assert_close(a, b)


def test_unscaling_by_the_optimizer_and_clipping_by_the_model_count_once() -> None:
    """A scaler edits what the optimizer sees, the clip what the model sees: both reach G once."""
    models = []
    for scaled in (False, True):
        model = mlp()
        run = begin(model, Fira(4, every=5), sgd)
        for batch in batches(6):
            (loss_of(model, batch) * (64 if scaled else 1)).backward()
            if scaled:
                for group in run.optimizer.param_groups:
                    for p in group["params"]:
                        p.grad.mul_(1 / 64)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            run.optimizer.step()
            run.optimizer.zero_grad()
        models.append(model)
    assert gap(*models) < 1e-6


@pytest.mark.parametrize(
    "method",
    [
        partial(GaLore, 4, every=0),
        partial(Fira, 4, every=0),
        METHODS["feedback"],
        METHODS["tracked"],
    ],
)
def test_scaling_between_micro_batches_reaches_what_came_before_alone(method: Any) -> None:
    """Once the first bases stand: one that is found at the look sees the first part alone."""
    models = []
    for apart in (False, True):
        model = mlp()
        run = begin(model, method(), partial(sgd, lr=0.02))
        train(run, batches(2))
        for first, second in zip(batches(5), batches(5, seed=2), strict=True):
            if apart:
                loss_of(model, first).backward()
                for group in run.optimizer.param_groups:
                    for p in group["params"]:
                        p.grad.mul_(0.25)
                loss_of(model, second).backward()
            else:
                (loss_of(model, first) / 4 + loss_of(model, second)).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        models.append(model)
    assert gap(models[0], mlp()) > 1e-3
    assert gap(*models) < 1e-5


def test_edits_that_have_no_meaning_in_the_subspace_are_refused() -> None:
    model = mlp()
    run = begin(model, GaLore(4, every=0))
    data = list(batches(2))
    train(run, data[:1])
    loss_of(model, data[1]).backward()
    with pytest.raises(LifeCycleError, match=r"gradient of 0.weight in place.*clip_grad_norm_"):
        nn.utils.clip_grad_value_(model.parameters(), 1e-4)
    with pytest.raises(LifeCycleError, match=r"0\.weight"):
        model[0].weight.grad.sign_()  # type: ignore[union-attr]
    held = [p for g in run.optimizer.param_groups for p in g["params"]]
    nn.utils.clip_grad_value_(held, 1e-4)
    small = engine_of(run).matrices["0.weight"].proxy.grad
    assert small is not None
    assert float(small.abs().max()) <= 1e-4


def test_a_dense_tensor_can_be_added_to_the_gradient() -> None:
    """As in a penalty that a loop adds by hand: linear, so its projection is added."""
    model = mlp()
    run = begin(model, GaLore(4, every=0))
    data = list(batches(2))
    train(run, data[:1])
    loss_of(model, data[1]).backward()
    matrix, held = engine_of(run).matrices["0.weight"], model[0].weight.grad
    assert isinstance(held, LowRankGrad)
    expected = held.look() + 0.1 * matrix.project(model[0].weight.detach())
    held.add_(model[0].weight.detach(), alpha=0.1)
    torch.testing.assert_close(matrix.proxy.grad, expected)


# ---------------------------------------------------------------- scalers


@pytest.mark.parametrize("by_model", [False, True])
@pytest.mark.parametrize("name", ["plain", "residual", "feedback", "tracked"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_skips_broken_steps_and_changes_nothing_else(
    name: str, fused: bool, by_model: bool
) -> None:
    a, b = mlp(), mlp()
    good = list(batches(10))
    train(begin(a, METHODS[name](), partial(adamw, fused=fused)), good)
    run = begin(b, METHODS[name](), partial(adamw, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for batch in [None, *good[:5], None, *good[5:]]:  # the broken ones come at refreshes
        loss = loss_of(b, batch or good[0])
        scaler.scale(loss * (float("inf") if batch is None else 1)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        (b if by_model else run.optimizer).zero_grad()
    assert scaler.get_scale() == 2.0**8
    assert run.step == 10
    assert gap(a, b) < 5e-5


# ---------------------------------------------------------------- resume


@all_methods
@pytest.mark.parametrize("stop", [1, 4, 5, 6])
@pytest.mark.parametrize("make", [adamw, sgd, partial(adamw, fused=True)])
def test_resume_is_exact_between_refreshes_too(
    name: str, stop: int, make: Make, tmp_path: Path
) -> None:
    data, whole, first = list(batches(9)), mlp(), mlp()
    train(begin(whole, METHODS[name](), make), data)
    run = begin(first, METHODS[name](), make)
    train(run, data[:stop])
    rankwise.save(tmp_path, run)
    again = mlp(seed=5)
    train(begin(again, METHODS[name](), make, resume=tmp_path), data[stop:])
    assert gap(whole, again) == 0


def test_a_basis_keeps_its_precision_through_a_resume_of_a_half_precision_model(
    tmp_path: Path,
) -> None:
    data = [(x.bfloat16(), y) for x, y in batches(8)]
    model = mlp(dtype=torch.bfloat16)
    run = begin(model, GaLore(4, every=5))
    train(run, data)
    rankwise.save(tmp_path, run)
    again = begin(mlp(dtype=torch.bfloat16), GaLore(4, every=5), resume=tmp_path)
    for name, matrix in engine_of(again).matrices.items():
        basis = matrix.basis(matrix.sides[0])
        assert basis.dtype == torch.float32
        assert torch.equal(basis, engine_of(run).matrices[name].basis(matrix.sides[0]))


def test_resuming_with_other_layers_names_one_of_them(tmp_path: Path) -> None:
    run = begin(mlp(), GaLore(4))
    train(run, batches(2))
    rankwise.save(tmp_path, run)
    with pytest.raises(LifeCycleError, match=r"2\.weight"):
        begin(mlp(), GaLore(4, layers="0"), resume=tmp_path)


# ---------------------------------------------------------------- models


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(20, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(torch.tanh(self.mix(torch.tanh(self.mix(h)))))  # mix is used twice


@pytest.mark.parametrize("rank", [99, 12])
def test_tied_and_twice_used_weights_get_the_sum_of_their_gradients(rank: int) -> None:
    model, other = Tied(), Tied()
    run = begin(model, GaLore(rank, scale=1.0, layers="*"), partial(sgd, momentum=0.0))
    if rank == 12:
        run.finish()
        run = begin(model, GaLore(11, scale=1.0, layers="*"), partial(sgd, momentum=0.0))
    optimizer = sgd(other, momentum=0.0)
    assert set(engine_of(run).matrices) == {"embed.weight", "mix.weight"}
    for i in range(8):
        x = torch.randint(0, 20, (30,), generator=torch.Generator().manual_seed(i))
        for m, o in ((model, run.optimizer), (other, optimizer)):
            F.cross_entropy(m(x), x.roll(1)).backward()
            if m is model:
                parts = [p.grad for p in m.parameters() if isinstance(p.grad, LowRankGrad)]
                assert len(parts) == 2
            o.step()
            o.zero_grad()
    if rank == 99:
        assert gap(model, other) < 1e-5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rank", [4, 999])
def test_convolutions_through_their_matrix_view(
    rank: int, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    first: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.Flatten()
    )
    first = first.to(memory_format=memory_format)
    second, reference = copy.deepcopy(first), copy.deepcopy(first)
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    run = begin(second, GaLore(rank, scale=1.0, every=3, layers="*"), partial(sgd, momentum=0.0))
    optimizer = sgd(first, momentum=0.0)
    for model, o in ((first, optimizer), (second, run.optimizer)):
        for _ in range(1 if rank == 4 else 6):
            model(x).square().mean().backward()
            o.step()
            if rank == 999:
                o.zero_grad()
    if rank == 999:
        assert gap(first, second) < 1e-5
        return
    # One step: the projection of what dense SGD did.
    for name, matrix in engine_of(run).matrices.items():
        old, new = reference.get_parameter(name), second.get_parameter(name)
        moved = (first.get_parameter(name) - old).detach()
        expected = matrix.lift(matrix.project(moved))
        torch.testing.assert_close((new - old).detach(), expected, rtol=1e-4, atol=1e-6)
        assert new.stride() == old.stride()


def test_an_unused_matrix_is_not_moved_by_what_was_left() -> None:
    model = mlp()
    model.append(nn.Linear(24, 24))
    run = begin(model, GaLore(4, every=3, layers="*"))
    model[5](torch.ones(1, 24)).sum().backward()
    run.optimizer.step()
    model.zero_grad()
    before = model[5].weight.detach().clone()
    loss_of(model[:5], next(batches(1))).backward()
    run.optimizer.step()
    assert torch.equal(before, model[5].weight.detach())


def test_proxies_take_memory_during_the_step_alone() -> None:
    model = mlp()
    run = begin(model, GaLore(4))
    proxy = engine_of(run).matrices["0.weight"].proxy
    during = []
    run.optimizer.register_step_pre_hook(lambda *_: during.append(proxy.untyped_storage().nbytes()))
    train(run, batches(2))
    assert during == [4 * 40 * 4] * 2
    assert proxy.untyped_storage().nbytes() == 4
    assert torch.equal(proxy.detach(), torch.zeros(40, 4)), "it can be read all the same"
    assert torch.equal(copy.deepcopy(proxy.detach()), torch.zeros(40, 4))


def test_copies_of_the_model_while_a_gradient_is_held() -> None:
    model = mlp()
    run = begin(model, GaLore(4, every=0))
    train(run, batches(1))
    loss_of(model, next(batches(1))).backward()
    assert gap(model, copy.deepcopy(model)) == 0
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() > 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(backend: str) -> None:
    a, b = mlp(), mlp()
    train(begin(a, GaLore(4, every=5)), batches(7), micro=2)
    compiled = partial(torch.compile, backend=backend)
    train(begin(b, GaLore(4, every=5), wrap=compiled), batches(7), micro=2)
    assert gap(a, b) < 1e-5


# ---------------------------------------------------------------- optimizers and groups


def test_a_scheduler_drives_the_proxies_and_is_stepped_once() -> None:
    a, b = mlp(), mlp()
    once = torch.optim.lr_scheduler.OneCycleLR
    plain = sgd(a)
    schedule = once(plain, 0.2, total_steps=30)
    for batch in batches(20):
        plain.zero_grad()
        loss_of(a, batch).backward()
        plain.step()
        schedule.step()
    run = begin(b, GaLore(99, scale=1.0, layers="*"), sgd)
    train(run, batches(20), scheduler=once(run.optimizer, 0.2, total_steps=30))
    assert gap(a, b) < 1e-5


def test_several_parameter_groups_keep_their_rates_and_decays() -> None:
    """The projected matrices of two groups against dense SGD at full rank."""

    def grouped(model: Any) -> Optimizer:
        rows = [
            {"params": model[0].parameters(), "lr": 0.1, "weight_decay": 0.1},
            {"params": model[2].parameters(), "lr": 0.02},
            {"params": model[4].parameters(), "lr": 0.05, "weight_decay": 0.2},
        ]
        return AdamW(rows, weight_decay=0.0)

    a, b = mlp(), mlp()
    dense(a, grouped(a), batches(10))
    train(begin(b, GaLore(99, scale=1.0, layers="*"), grouped), batches(10))
    assert gap(a, b) < 2e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda p: AdamW(p, lr=3e-2),
        lambda p: AdamW(p, lr=3e-2, foreach=True),
        lambda p: AdamW(p, lr=3e-2, fused=True),
        lambda p: AdamW(p, lr=3e-2, amsgrad=True),
        lambda p: torch.optim.NAdam(p, lr=3e-2),
        lambda p: torch.optim.RAdam(p, lr=3e-2),
        lambda p: torch.optim.RMSprop(p, lr=1e-2),
        lambda p: torch.optim.Adagrad(p, lr=1e-1),
        lambda p: SGD(p, lr=0.3, momentum=0.9, nesterov=True),
    ],
)
@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_any_optimizer_learns(make: Callable[[Any], Optimizer], moments: str) -> None:
    model, data = mlp(), list(batches(50))
    first = float(loss_of(model, data[-1]).detach())
    method = GaLore(8, every=10, scale=1.0, moments=moments)
    train(begin(model, method, lambda m: make(m.parameters())), data)
    assert float(loss_of(model, data[-1]).detach()) < 0.9 * first


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
def test_muon_is_scaled_by_the_shape_of_the_weight(rule: str) -> None:
    """Its rate depends on the shape, for which it sees the proxy's 32x4 instead of W's 32x8."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32, bias=False))
    muon = partial(torch.optim.Muon, lr=0.05, weight_decay=0.0, adjust_lr_fn=rule)
    run = begin(model, GaLore(4, scale=1.0, layers="*"), lambda m: muon(m.parameters()))
    before: Any = copy.deepcopy(model)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    (model(x) - 1).square().mean().backward()
    matrix = engine_of(run).matrices["0.weight"]
    alone = nn.Parameter(torch.zeros(32, 4))
    small = matrix.proxy.grad
    assert small is not None
    alone.grad = small.clone()
    muon([alone]).step()
    run.optimizer.step()
    seen, meant = ((32 / 4) ** 0.5, (32 / 8) ** 0.5) if rule == "original" else (1.0, 1.0)
    expected = matrix.lift(alone.detach()) * (meant / seen)
    weight: Any = model.get_parameter("0.weight")
    torch.testing.assert_close(weight - before[0].weight, expected, rtol=1e-4, atol=1e-6)


def test_a_factory_gets_its_weights_replaced_too() -> None:
    models = []
    for factory in (False, True):
        model = mlp()
        optimizer = adamw if factory else adamw(model)
        run = rankwise.start(model, GaLore(4, every=5), optimizer)
        train(run, batches(6))
        models.append(model)
    assert gap(*models) == 0


def test_weights_of_another_optimizer_are_left_alone() -> None:
    model, other = mlp(), mlp()
    rest = SGD(model[2].parameters(), lr=0.1)
    run = rankwise.start(
        model, GaLore(4, layers="0,2"), AdamW([*model[0].parameters(), *model[4].parameters()])
    )
    batch = next(batches(1))
    loss_of(model, batch).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    rest.zero_grad()
    loss_of(model, batch).backward()
    assert type(model[2].weight.grad) is Tensor
    assert set(engine_of(run).matrices) == {"0.weight"}
    del other


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_gradient_that_is_not_fit_keeps_the_basis_is_counted_and_reported(value: float) -> None:
    model = mlp()
    run = begin(model, GaLore(4, every=1, stagger=False))
    train(run, batches(3))
    matrix = engine_of(run).matrices["0.weight"]
    basis = matrix.basis(matrix.sides[0]).clone()
    loss_of(model, next(batches(1))).backward()
    model[0].weight.grad = None
    (model[0].weight.sum() * value).backward()
    matrix.proxy.grad  # noqa: B018 - the look
    assert torch.equal(matrix.basis(matrix.sides[0]), basis)
    assert matrix.failures == 1
    model.zero_grad()
    train(run, batches(1))
    kept = [e for e in run.events if e["event"] == "basis kept"]
    assert [(e["first"], e["failures"]) for e in kept] == [("0.weight", 1)]
    assert not torch.equal(matrix.basis(matrix.sides[0]), basis), "it is due until it succeeds"


def test_an_svd_that_does_not_converge_keeps_the_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    run = begin(model, GaLore(4, every=1, basis="svd", stagger=False))
    train(run, batches(2))
    matrix = engine_of(run).matrices["0.weight"]
    basis = matrix.basis(matrix.sides[0]).clone()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    train(run, batches(2))
    assert torch.equal(matrix.basis(matrix.sides[0]), basis)
    assert matrix.failures == 2
    assert sum(e["event"] == "basis kept" for e in run.events) == 1, "said once, not every step"


class ReadsTheValue(Optimizer):
    """A trust ratio, as in LAMB: the step is as long as the parameter."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / p.grad.norm() * p.norm() * group["lr"])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (torch.optim.Adafactor, "root mean square"),
        (ReadsTheValue, "moved two parameters of different values differently"),
    ],
)
def test_optimizers_that_read_values_are_refused_and_nothing_is_left_behind(
    make: Callable[[Any], Optimizer], reason: str
) -> None:
    model = mlp()
    method = GaLore(4)
    with pytest.raises(LifeCycleError, match=rf"{make.__name__}, which .*{reason}"):
        rankwise.start(model, method, make(model.parameters()))
    loss_of(model, next(batches(1))).backward()
    assert type(model[0].weight.grad) is Tensor
    run = begin(model, method)  # the same instance can be tried again
    train(run, batches(2))
    assert isinstance(run.methods[0], GaLore)


def test_a_compiled_step_is_refused_with_the_reason() -> None:
    model = mlp()
    run = begin(model, GaLore(4))
    loss_of(model, next(batches(1))).backward()
    with pytest.raises(LifeCycleError, match=r"compiled.*fused=True"):
        torch.compile(run.optimizer.step, backend="eager")()


def test_a_closure_gives_the_weights_of_the_plain_loop() -> None:
    plain, closed = mlp(), mlp()
    train(begin(plain, GaLore(4, every=2)), batches(5))
    run = begin(closed, GaLore(4, every=2))
    for batch in batches(5):

        def closure(batch: Batch = batch) -> Any:
            run.optimizer.zero_grad()
            loss = loss_of(closed, batch)
            loss.backward()
            return loss

        run.optimizer.step(closure)
    for one, other in zip(plain.parameters(), closed.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_a_switch_of_the_weights_does_not_go_with_it() -> None:
    methods = [Pufferfish(warmup_steps=3), GaLore(4)]
    model = mlp()
    with pytest.raises(CompositionError, match="proxies"):
        rankwise.start(model, methods, adamw(model))


def test_rank_above_every_short_side_is_an_error_under_auto() -> None:
    with pytest.raises(SelectionError, match=r"0\.weight \(40, 24\) at rank 128.*lower the rank"):
        begin(mlp(), GaLore(128))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("encoder.*", r"'encoder\.\*' matches none of the 3 .*'0\.weight'"),
        ("0.wieght", r"closest are '0\.weight'"),
        ("*.bias", r"matches none"),
        (lambda name, p: False, r"no weight matrix of Sequential is left"),
        (3, r"no glob"),
    ],
)
def test_a_pattern_that_selects_nothing_is_an_error(layers: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        begin(mlp(), GaLore(4, layers=layers))


def test_finish_gives_the_weights_back_to_the_optimizer() -> None:
    model = mlp()
    run = begin(model, GaLore(4))
    train(run, batches(3))
    run.finish()
    held = [p for g in run.optimizer.param_groups for p in g["params"]]
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    before = copy.deepcopy(model)
    dense(model, run.optimizer, batches(1))
    assert type(model[0].weight.grad) is Tensor
    assert gap(model, before) > 0


@pytest.mark.parametrize("wide", [False, True])
def test_a_warm_refresh_shares_the_projection_of_its_step(wide: bool) -> None:
    """Q <- orth(G^T (G Q)) after a step in Q: two products, of which the step makes one anyway."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(24, 16) if wide else nn.Linear(16, 24))
    method = GaLore(4, every=1, layers="*.weight", scale=1.0, moments="keep")
    run = begin(model, method, lambda m: SGD(m.parameters(), lr=0.1))
    (matrix,) = engine_of(run).matrices.values()
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        parts = [torch.randn(model[0].weight.shape, generator=generator) for _ in range(3)]
        for part in parts:
            (model[0].weight * part).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        full = sum(parts[1:], parts[0])
        facing = full.mT if wide else full
        weight = model[0].weight.detach().clone()
        basis = matrix.basis(matrix.sides[0]).clone()
        run.optimizer.step()
        run.optimizer.zero_grad()
        if step == 0:
            continue  # the first basis is looked for at once, from a cold start
        within = facing @ basis @ basis.mT
        moved = (weight - model[0].weight.detach()) / 0.1
        moved = moved.mT if wide else moved
        cosine = F.cosine_similarity(moved.flatten(), within.flatten(), dim=0)
        assert float(cosine) > 1 - 1e-5
        new, expected = (
            matrix.basis(matrix.sides[0]),
            torch.linalg.qr(facing.mT @ facing @ basis)[0],
        )
        torch.testing.assert_close(new @ new.mT, expected @ expected.mT, rtol=0, atol=1e-4)


def test_a_step_that_a_scaler_skips_leaves_the_refresh_due() -> None:
    model = mlp()
    run = begin(model, GaLore(4, every=1))
    train(run, batches(2))
    matrix = engine_of(run).matrices["0.weight"]
    before, due = matrix.basis("right").clone(), matrix.next_refresh
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(loss_of(model, next(batches(1)))).backward()
    model[4].weight.grad.fill_(torch.inf)
    scaler.unscale_(run.optimizer)
    scaler.step(run.optimizer)
    scaler.update()
    run.optimizer.zero_grad()
    torch.testing.assert_close(matrix.basis("right"), before, rtol=0, atol=0)
    assert matrix.next_refresh == due
    train(run, batches(1))
    assert matrix.next_refresh > due
    assert float((matrix.basis("right") - before).abs().max()) > 0


def test_refreshes_are_spread_over_the_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(9)))
    run = begin(model, GaLore(3, every=4))
    matrices = list(engine_of(run).matrices.values())
    counts = []
    for i in range(13):
        before = [m.basis(m.sides[0]) if m.has_basis() else None for m in matrices]
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(i))
        run.optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        run.optimizer.step()
        after = [m.basis(m.sides[0]) for m in matrices]
        counts.append(sum(a is not b for a, b in zip(before, after, strict=True)))
    assert counts == [8, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]


def test_autocast_around_backward_leaves_projections_in_full_precision() -> None:
    model, other = mlp(), mlp()
    run = begin(model, GaLore(4, every=0), partial(sgd, lr=0.0, momentum=0.0))
    data = list(batches(2))
    train(run, data[:1])
    for each in (model, other):
        loss = loss_of(each, data[1])
        with torch.autocast("cpu"):
            loss.backward()
    matrix = engine_of(run).matrices["0.weight"]
    gradient = other[0].weight.grad
    torch.testing.assert_close(matrix.proxy.grad, matrix.project(gradient), rtol=0, atol=0)
