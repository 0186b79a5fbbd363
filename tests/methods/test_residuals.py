"""Methods beyond plain projection, against the steps of their papers written plainly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise.method import Method
from rankwise.methods.dion import Dion
from rankwise.methods.fira import Fira
from rankwise.methods.frugal import Frugal
from rankwise.methods.ldadam import LDAdam
from rankwise.methods.qgalore import QGaLore
from rankwise.methods.tracked import Tracked
from rankwise.optim.projected.matrix import ProjectedMatrix
from rankwise.optim.projected.updates import limit_growth_

SHAPES = [(12, 8), (8, 12), (8, 8)]
R, LR = 3, 0.02
shapes = pytest.mark.parametrize("shape", SHAPES)


def gradients(shape: tuple[int, int], count: int) -> list[Tensor]:
    """Drifting, of full rank, with a part that stays."""
    g = torch.Generator().manual_seed(3)
    stays = torch.randn(*shape, generator=g)
    return [stays + torch.randn(*shape, generator=g) for _ in range(count)]


class Single:
    """One weight, whose gradients are given."""

    def __init__(self, shape: tuple[int, int], method: Any, make: Any, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False), nn.Linear(1, 1))
        self.weight: Any = self.model.get_parameter("0.weight")
        optimizer = make(self.model.parameters(), **options)
        self.run = rankwise.start(self.model, method, optimizer)
        engine: Any = method
        self.matrix: ProjectedMatrix = engine.engine.matrices["0.weight"]

    def step(self, gradient: Tensor) -> Tensor:
        """What one step adds to the weight."""
        before = self.weight.detach().clone()
        (self.weight * gradient).sum().backward()
        self.run.optimizer.step()
        self.run.optimizer.zero_grad()
        return self.weight.detach() - before

    def basis(self) -> Tensor:
        return self.matrix.basis(self.matrix.sides[0])

    @property
    def right(self) -> bool:
        return self.matrix.sides == ("right",)


class Adam:
    """Bias-corrected Adam of one matrix, moments open to the test."""

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.b1, self.b2, self.t = beta1, beta2, 0
        self.m: Any = 0.0
        self.v: Any = 0.0

    def direction(self, g: Tensor) -> Tensor:
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        return (self.m / (1 - self.b1**self.t)) / ((self.v / (1 - self.b2**self.t)).sqrt() + 1e-8)


def adamw(method: Method, shape: tuple[int, int], **options: Any) -> Single:
    return Single(shape, method, torch.optim.AdamW, lr=LR, weight_decay=0.0, **options)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-5)


@shapes
def test_fira_adds_the_residual_at_the_gain_of_its_channel(shape: tuple[int, int]) -> None:
    one = adamw(Fira(R, every=0, scale=0.5, layers="0", growth=1.05), shape)
    adam, last = Adam(), None
    for g in gradients(shape, 6):
        moved = one.step(g)
        q = one.basis()
        g = g if one.right else g.T
        small = g @ q
        n = adam.direction(small)
        rest = (g - small @ q.T) * (n.norm(dim=1) / small.norm(dim=1))[:, None]
        if last is not None and rest.norm() > 1.05 * last:
            rest = rest / rest.norm() * 1.05 * last
        last = rest.norm()
        expected = -LR * 0.5 * (n @ q.T + rest)
        assert_same(moved, expected if one.right else expected.T)


def test_the_limiter_remembers_the_last_step_that_had_a_gradient() -> None:
    """And never lets a norm of nothing, or of no number, be what growth is counted from."""
    memory: dict[str, Tensor] = {}
    norms = []
    for size in (1.0, 0.0, 100.0, float("inf"), 100.0):
        update = torch.full((4,), size / 2)
        limit_growth_(update, memory, 1.1, 1.0)
        norms.append(float(update.norm()))
    assert norms[:3] == pytest.approx([1.0, 0.0, 1.1])
    assert norms[4] == pytest.approx(1.21)


@shapes
def test_frugal_steps_by_signs_outside_and_starts_moments_anew(shape: tuple[int, int]) -> None:
    one = adamw(Frugal(R, every=3, sign_rate=0.5, layers="0", stagger=False), shape)
    adam = Adam()
    seen: Any = None
    for i, g in enumerate(gradients(shape, 7)):
        moved = one.step(g)
        q = one.basis()
        if i in (3, 6):
            assert not torch.equal(q, seen), "drawn anew"
            adam.m, adam.v = 0.0, 0.0  # the step count stays
        seen = q
        g = g if one.right else g.T
        small = g @ q
        rest = g - small @ q.T
        expected = -LR * (adam.direction(small) @ q.T + 0.5 * rest.sign())
        expected = expected if one.right else expected.T
        # Signs of entries that are zero to rounding are anybody's.
        sure = (rest if one.right else rest.T).abs() > 1e-5
        assert_same(moved[sure], expected[sure])


@shapes
def test_ldadam_feeds_back_what_projection_and_rotation_lose(shape: tuple[int, int]) -> None:
    rho = 0.7
    one = adamw(LDAdam(R, rho=rho, layers="0"), shape)
    adam, error = Adam(), 0.0
    old: Any = None
    mean: Any = None
    for g in gradients(shape, 6):
        moved = one.step(g)
        q = one.basis()
        total = (g if one.right else g.T) + error
        if old is not None:
            mean = adam.m @ old.T
            blend = rho * mean + (1 - rho) * total
            same_span(q, torch.linalg.qr(blend.T @ (blend @ old))[0])
            turn = old.T @ q
            b1, b2, t = adam.b1, adam.b2, adam.t
            m, v = adam.m / (1 - b1**t), adam.v / (1 - b2**t)
            turned = (v - m * m) @ turn.square() + (m @ turn).square()
            adam.m, adam.v = adam.m @ turn, turned.abs() * (1 - b2**t)
        small = total @ q
        error = total - small @ q.T
        if old is not None:
            error = error + adam.b1 / (1 - adam.b1) * (mean - adam.m @ q.T)
        old = q
        expected = -LR * adam.direction(small) @ q.T
        assert_same(moved, expected if one.right else expected.T)


def same_span(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a @ a.T, b @ b.T, rtol=1e-3, atol=1e-4)


@shapes
def test_dion_orthonormalises_a_momentum_with_error_feedback(shape: tuple[int, int]) -> None:
    mu = 0.9
    one = Single(shape, Dion(R, mu=mu, layers="0"), torch.optim.SGD, lr=LR)
    momentum: Any = 0.0
    factor: Any = None
    for g in gradients(shape, 6):
        moved = one.step(g)
        q = one.basis()
        total = momentum + (g if one.right else g.T)
        if factor is not None:
            same_span(q, torch.linalg.qr(total.T @ factor)[0])
        small = total @ q
        momentum = total - (1 - mu) * small @ q.T
        factor = small / small.norm(dim=0)
        expected = -LR * (shape[0] / shape[1]) ** 0.5 * factor @ q.T
        assert_same(moved, expected if one.right else expected.T)
        values = torch.linalg.svdvals(moved)
        assert float(values[R:].max()) < 1e-4, "of rank R"


@shapes
def test_a_tracked_basis_is_one_power_step_on_momentum_and_gradient(
    shape: tuple[int, int],
) -> None:
    rho = 0.6
    one = adamw(Tracked(R, rho=rho, scale=1.0, layers="0"), shape)
    adam = Adam()
    for i, g in enumerate(gradients(shape, 6)):
        old = one.matrix.basis(one.matrix.sides[0]).clone() if i else None
        moved = one.step(g)
        turned = one.basis()
        if old is None:  # the first step finds a basis; there is no momentum to track by
            old = turned
        g = g if one.right else g.T
        before = adam.m
        expected = -LR * adam.direction(g @ old) @ old.T
        assert_same(moved, expected if one.right else expected.T)
        if i:
            target = rho * before @ old.T + (1 - rho) * g
            same_span(turned, torch.linalg.qr(target.T @ before)[0])
            turn = old.T @ turned
            b1, b2, t = adam.b1, adam.b2, adam.t
            m, v = adam.m / (1 - b1**t), adam.v / (1 - b2**t)
            adam.v = ((v - m * m) @ turn.square() + (m @ turn).square()).abs() * (1 - b2**t)
            adam.m = adam.m @ turn


def test_tracking_captures_nearly_what_the_best_basis_does() -> None:
    """Gradients of rank 3 in a subspace that turns by 3 degrees a step, with noise."""
    g = torch.Generator().manual_seed(3)
    rows, spin = torch.randn(12, R, generator=g), torch.randn(8, 8, generator=g)
    spin = torch.matrix_exp(0.02 * (spin - spin.T))
    columns = torch.linalg.qr(torch.randn(8, R, generator=g))[0]
    one, kept, best = adamw(Tracked(R, layers="0"), (12, 8)), [], []
    first = columns
    for i in range(40):
        columns = spin @ columns
        gradient = rows @ columns.T + 0.3 * torch.randn(12, 8, generator=g)
        one.step(gradient)
        if i >= 20:
            kept.append(float((gradient @ one.basis()).square().sum()))
            best.append(float(torch.linalg.svdvals(gradient).square()[:R].sum()))
    gone = float((rows @ columns.T @ first).square().sum() / rows.square().sum())
    assert gone < 0.7, "the first subspace is of little use any more"
    assert sum(kept) > 0.85 * sum(best)


def test_q_galore_refreshes_half_as_often_when_the_basis_hardly_turns() -> None:
    """The same gradient again and again: after five refreshes the period doubles, and again."""
    one = adamw(QGaLore(R, every=2, layers="0", stagger=False, similarity=0.4), (12, 8))
    g = gradients((12, 8), 1)[0]
    periods = []
    for _ in range(32):
        one.step(g)
        periods.append(one.matrix.period)
    # Refreshes at steps 2, 4, ... 10: the fifth doubles the period; the next five at 14 ... 30.
    assert periods == [2] * 10 + [4] * 20 + [8] * 2


def test_q_galore_keeps_its_period_when_the_basis_turns() -> None:
    one = adamw(QGaLore(R, every=1, layers="0", stagger=False, similarity=1.0), (12, 8))
    for g in gradients((12, 8), 12):
        one.step(g)
    assert one.matrix.period == 1


def test_a_tracked_basis_needs_a_momentum() -> None:
    one = Single((12, 8), Tracked(R, layers="0"), torch.optim.SGD, lr=LR)
    with pytest.raises(rankwise.errors.LifeCycleError, match=r"first moment.*0\.weight"):
        one.step(gradients((12, 8), 1)[0])
