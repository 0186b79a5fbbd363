"""Two workers with projected gradients train as one process does, and send less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import rankwise
from rankwise import distributed
from rankwise.method import Context
from rankwise.methods.galore import GaLore
from rankwise.optim.groups import Options
from rankwise.optim.projected.choices import Choices
from rankwise.optim.projected.engine import ProjectedGradients
from rankwise.optim.rebind import rebind
from test_distributed import Workers
from test_projected import METHODS, adamw, batches, engine_of, gap, loss_of, mlp, sgd, train

STEPS = 8


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(tmp_path_factory.mktemp("workers"))
    yield workers
    workers.stop()


def _alone(name: str, clip: float | None) -> nn.Module:
    model = mlp()
    run = rankwise.start(model, METHODS[name](), sgd(model))
    by_model = partial(nn.utils.clip_grad_norm_, list(model.parameters()), clip or 1.0)
    train(run, batches(STEPS), clip=None if clip is None else by_model)
    return model


def _shared(
    name: str, micro: int = 1, clip: float | None = None, scale: float = 1.0, seeds: bool = False
) -> dict[str, Any]:
    rank = distributed.worker()
    model = mlp(rank if seeds else 0)  # worker 0's weights must win
    run = rankwise.start(model, METHODS[name](), sgd(model), wrap=distributed.wrap)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
    for x, y in batches(STEPS):
        xs, ys = x[rank::2].chunk(micro), y[rank::2].chunk(micro)
        for j in range(micro):
            last = j == micro - 1
            with contextlib.nullcontext() if last else run.model.no_sync():
                scaler.scale(loss_of(run.model, (xs[j], ys[j])) / micro).backward()
        if clip is not None:
            scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
    return {"weights": model.state_dict(), "sent": engine_of(run).mean.sent}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("first basis stays", {"seeds": True}),
        ("rotated", {"micro": 2}),
        ("exact", {"clip": 0.1, "scale": 256.0}),
        ("two-sided", {}),
        ("residual", {"micro": 2, "clip": 0.1}),
        ("scaling", {}),
        ("signs", {}),
        ("feedback", {"micro": 2}),
        ("orthonormal", {}),
        ("tracked", {"micro": 2}),
    ],
)
def test_two_workers_are_one(together: Workers, name: str, options: dict[str, Any]) -> None:
    answers = together(partial(_shared, name, **options))
    alone = _alone(name, options.get("clip"))
    assert gap(alone, mlp()) > 1e-3
    for answer in answers:
        model = mlp()
        model.load_state_dict(answer["weights"])
        assert gap(model, alone) < 2e-5


def test_what_is_sent_is_the_projected_gradient(together: Workers) -> None:
    """Rank 4 of 40x24 and 16x40: 4 * (40 + 40) numbers a step once the first bases stand."""
    first, second = together(partial(_shared, "first basis stays"))
    dense = 40 * 24 + 16 * 40  # the first bases are found from whole gradients
    expected = 4 * (dense + (STEPS - 1) * 4 * (40 + 40))
    assert first["sent"] == second["sent"] == expected
    assert expected < 4 * STEPS * dense / 3


def _wrapped_by_hand() -> float:
    """A loop that puts DDP around the bare model itself, after start."""
    rank, model = distributed.worker(), mlp()
    run = rankwise.start(model, METHODS["plain"](), sgd(model))
    wrapped = nn.parallel.DistributedDataParallel(model)
    for x, y in batches(STEPS):
        loss_of(wrapped, (x[rank::2], y[rank::2])).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    return gap(model, _alone_in_group("plain"))


def _alone_in_group(name: str) -> nn.Module:
    model = mlp()  # no wrapper, the whole batch: nothing is reduced
    train(rankwise.start(model, METHODS[name](), sgd(model)), batches(STEPS))
    return model


def test_a_wrapper_made_after_start_reduces_too(together: Workers) -> None:
    assert max(together(_wrapped_by_hand)) < 2e-5


def _everything_projected() -> float:
    rank = distributed.worker()
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(24, 8, bias=False)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    method = GaLore(4, layers="*", every=3)
    run = rankwise.start(models[0], method, sgd(models[0]), wrap=distributed.wrap)
    other = rankwise.start(models[1], GaLore(4, layers="*", every=3), sgd(models[1]))
    for x, y in batches(STEPS):
        loss_of(run.model, (x[rank::2], y[rank::2])).backward()
        loss_of(models[1], (x, y)).backward()
        for r in (run, other):
            r.optimizer.step()
            r.optimizer.zero_grad()
    return gap(*models)


def test_a_model_of_projected_weights_alone(together: Workers) -> None:
    """DDP refuses a model with nothing to reduce; the projected gradients must be reduced still."""
    assert max(together(_everything_projected)) < 2e-5


def _engine_step(
    model: nn.Module, choices: Choices, optimizer: torch.optim.Optimizer
) -> ProjectedGradients:
    weights = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    context = Context()
    engine = ProjectedGradients(model, weights, choices, context)
    rebind(optimizer, engine.begin())
    context.options = Options(optimizer)
    optimizer.register_step_pre_hook(lambda *_: engine.before_step())
    optimizer.register_step_post_hook(lambda *_: engine.after_step(engine.bases.step + 1))
    return engine


def _sharded(every: int, micro: int, sync: bool, clip: float | None, track: float | None) -> float:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, mesh, model = distributed.worker(), init_device_mesh("cpu", (2,)), mlp()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rule = "keep" if track is None else "rotate"
    choices = Choices(4, every=every, side="right", moments=rule, track=track)
    optimizer = adamw(model)
    _engine_step(model, choices, optimizer)
    for x, y in batches(STEPS):
        xs, ys = x[rank::2].chunk(micro), y[rank::2].chunk(micro)
        for j in range(micro):
            model.set_requires_gradient_sync(sync or j == micro - 1)
            (loss_of(model, (xs[j], ys[j])) / micro).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    full = mlp(1)
    with torch.no_grad():
        for p, q in zip(full.parameters(), model.parameters(), strict=True):
            p.copy_(q.full_tensor())
    return gap(full, _unsharded(choices, clip))


def _unsharded(choices: Choices, clip: float | None) -> nn.Module:
    model = mlp()
    optimizer = adamw(model)
    _engine_step(model, choices, optimizer)
    for batch in batches(STEPS):
        loss_of(model, batch).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("every", "micro", "sync", "clip", "track"),
    [
        (0, 1, True, None, None),
        (3, 1, True, None, None),
        (3, 2, True, None, None),
        (3, 2, False, None, None),
        (3, 1, True, 0.1, None),
        (0, 2, True, None, 0.9),
    ],
)
def test_the_engine_on_weights_sharded_by_rows(
    together: Workers,
    every: int,
    micro: int,
    sync: bool,
    clip: float | None,
    track: float | None,
) -> None:
    """FSDP2: every worker projects its own rows; only the r columns of a power step are summed."""
    assert max(together(_sharded, every, micro, sync, clip, track)) < 2e-5
