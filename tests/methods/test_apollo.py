"""APOLLO against its published program, and its limiter where that one freezes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_galore import Llama, distance, loss, matrices, ours, peer

from rankwise.methods.apollo import Apollo
from rankwise.methods.apollo_mini import ApolloMini
from rankwise.optim.projected.engine import ProjectedGradients


def published(model: Llama, betas: tuple[float, float], limit: bool, **options: Any) -> Any:
    rest = [model.embed.weight, model.head.weight]
    rows = {"update_proj_gap": 10**6, "proj": "random", "proj_type": "std", **options}
    groups = [{"params": rest}, {"params": matrices(model), **rows}]
    make = peer("apollo_torch")
    return make(groups, lr=1e-2, eps=1e-30, betas=betas, disable_nl=not limit)


def give_projections(engine: ProjectedGradients, model: Llama, optimizer: Any) -> None:
    """Put our engine's random matrices into the projectors of the published program."""
    # From the optimizer's own module: importing the package would ask for bitsandbytes.
    begin: Any = vars(type(optimizer))["__init__"]
    make = begin.__globals__["GradientProjector"]
    for name, layer in model.block.items():
        matrix = engine.matrices[f"block.{name}.weight"]
        basis = matrix.basis(matrix.sides[0])
        projector = make(matrix.rank, update_proj_gap=10**6)
        projector.ortho_matrix = basis.T if matrix.sides == ("right",) else basis
        projector.update_ortho_matrix = lambda *_, **__: None
        optimizer.state[layer.weight]["projector"] = projector


@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize(
    ("limit", "betas"),
    # Their limiter counts norms before the bias correction, ours after: the same without it.
    [(False, (0.9, 0.999)), (True, (0.0, 0.0))],
)
def test_with_the_same_projections_it_is_the_published_program(
    mini: bool, limit: bool, betas: tuple[float, float]
) -> None:
    chosen: Any = {"layers": "block.*", "every": 0, "growth": 1.01 if limit else 0.0}
    method: Any = ApolloMini(scale=16.0, **chosen) if mini else Apollo(8, scale=1.0, **chosen)
    options: Any = {"rank": 8, "scale": 1.0, "scale_type": "channel"}
    if mini:
        options = {"rank": 1, "scale": 16.0, "scale_type": "tensor"}
    a, b = Llama(), Llama()
    theirs = published(b, betas, limit, **options)
    run = ours(a, method, 0, eps=1e-30)
    for group in run.optimizer.param_groups:
        group["betas"] = betas
    for step in range(60):
        for model, optimizer in ((a, run.optimizer), (b, theirs)):
            optimizer.zero_grad()
            loss(model, step).backward()
            if step == 0 and model is b:
                give_projections(method.engine, b, theirs)
            optimizer.step()
    assert distance(b, Llama()) > 0.05
    assert distance(a, b) < 1e-4


def test_a_step_without_gradient_does_not_freeze_the_limiter() -> None:
    model = Llama()
    run = ours(model, Apollo(8, layers="block.*", every=0), 3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    run.optimizer.zero_grad()
    before = [w.detach().clone() for w in matrices(model)]
    loss(model, 5).backward()
    run.optimizer.step()
    moved = [float((w - b).detach().norm()) for w, b in zip(matrices(model), before, strict=True)]
    assert min(moved) > 1e-3


def test_a_warm_up_of_the_learning_rate_is_not_slowed_by_the_limiter() -> None:
    """Norms count in units of the rate: ten times the rate is ten times the update."""
    moved = []
    for factor in (1.0, 10.0):
        model = Llama()
        run = ours(model, Apollo(8, layers="block.*", every=0), 3, lr=1e-4)
        for group in run.optimizer.param_groups:
            group["lr"] *= factor
        before = [w.detach().clone() for w in matrices(model)]
        loss(model, 3).backward()
        run.optimizer.step()
        pairs = zip(matrices(model), before, strict=True)
        moved.append([float((w - b).detach().norm()) for w, b in pairs])
    for slow, fast in zip(*moved, strict=True):
        assert fast == pytest.approx(10 * slow, rel=1e-2)
