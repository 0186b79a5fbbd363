"""Multi-head GaLore: with one head it is GaLore, with a full rank it is dense training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import rankwise
from rankwise import GaLore, LoRAPlus, MultiHeadGaLore, distributed
from rankwise.errors import CompositionError, OptionError
from rankwise.layers import adapted_layers
from test_distributed import Workers, assert_same

LAST = 7
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD, coupled decay": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(tmp_path_factory.mktemp("workers"))
    yield workers
    workers.stop()


def network() -> nn.Sequential:
    """Tall, wide and square matrices, a kernel, and a classifier that stays dense."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.Flatten(),
        nn.Linear(54, 12),
        nn.Tanh(),
        nn.Linear(12, 12),
        nn.Tanh(),
        nn.Linear(12, 20),
        nn.Tanh(),
        nn.Linear(20, 4),
    ).double()


def batch(i: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + i)
    x = torch.randn(12, 2, 3, 3, generator=generator).double()
    y = torch.randint(4, (12,), generator=generator)
    return x.chunk(parts)[part], y.chunk(parts)[part]


def begin(method: Any, make: Any = OPTIMIZERS["AdamW"]) -> Any:
    model = network()
    return rankwise.start(model, method, make(model.parameters()))


def train(run: Any, until: int) -> None:
    while run.step < until:
        x, y = batch(run.step, distributed.worker(), distributed.workers())
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()


def values(run: Any) -> list[Tensor]:
    return [p.detach().clone() for p in run.bare.parameters()]


def dense_rows(run: Any) -> list[Tensor]:
    model = copy.deepcopy(run.bare).eval()
    rankwise.to_dense(model)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("every", [1, 3])
def test_one_head_of_full_rank_is_dense_sgd(every: int) -> None:
    make = lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1)  # noqa: E731
    chosen = {"layers": "4,6", "rank": 12, "scale": 1.0}
    runs = [
        begin(rankwise.Dense(), make),
        begin(MultiHeadGaLore(heads=1, merge_every=every, **chosen), make),
    ]
    for run in runs:
        train(run, LAST)
        run.finish()
    torch.testing.assert_close(values(runs[1]), values(runs[0]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_head_is_galore_in_the_same_basis(optimizer: str) -> None:
    """Coupled and decoupled decay, a kernel, left and right bases, merges on the way."""
    make = OPTIMIZERS[optimizer]
    ours = begin(MultiHeadGaLore(heads=1, rank=3, merge_every=2, renew=0), make)
    galore = begin(GaLore(rank=3, every=0, basis="random"), make)
    train(galore, 1)  # draws the bases
    galore = begin(galore_in(ours), make)
    for step in range(1, LAST + 1):
        train(ours, step)
        train(galore, step)
        for a, b in zip(dense_rows(ours), values(galore), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def galore_in(run: Any) -> GaLore:
    """GaLore that keeps the bases of a run's only heads."""
    method = GaLore(rank=3, every=0, basis="random")
    bases = {basis.name.partition(".")[0]: basis for basis in run.methods[0].bases.all}

    def resume_with(matrix: Any, side: str) -> Tensor:
        basis = bases[matrix.name.partition(".")[0]]
        assert side == ("right" if basis.part == "v" else "left")
        return basis.columns().detach().clone()

    start = method.prepare

    def prepare(model: nn.Module) -> Any:
        change = start(model)
        vars(method)["engine"].bases._drawn = resume_with
        return change

    vars(method)["prepare"] = prepare
    return method


def test_bases_stay_orthonormal_and_follow_the_gradient() -> None:
    """A fixed quadratic whose gradient has rank 2: two heads must find its directions."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(24, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    model = nn.Sequential(nn.Linear(16, 24, bias=False))
    nn.init.zeros_(model.get_parameter("0.weight"))
    method = MultiHeadGaLore(heads=2, rank=2, merge_every=4, layers="0", scale=1.0)
    run = rankwise.start(model, method, Adam(model.parameters(), lr=1e-2))
    x = torch.eye(16).repeat(2, 1)
    q = torch.linalg.qr(target.mT)[0][:, :2]
    caught = []
    for _ in range(12):
        run.optimizer.zero_grad()
        (model(x) - x @ target.mT).square().sum().backward()
        run.optimizer.step()
        columns = [basis.columns() for basis in method.bases.all]
        for c in columns:
            torch.testing.assert_close(c.mT @ c, torch.eye(2), rtol=1e-5, atol=1e-5)
        caught.append(min(float((q.mT @ c.detach()).square().sum()) / 2 for c in columns))
    assert caught[0] < 0.6
    assert caught[-1] > 0.95
    assert method.bases.kept == 0


@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_what_new_bases_do_to_moments(moments: str) -> None:
    method = MultiHeadGaLore(heads=1, rank=3, merge_every=4, layers="2", moments=moments)
    run = begin(method, lambda p: SGD(p, lr=0.01, momentum=0.9))
    train(run, 3)
    (basis,) = method.bases.all
    old = basis.columns().detach().clone()
    update = copy.deepcopy(basis)
    seen: list[Tensor] = []
    renew = method.bases._renew

    def look(which: Any) -> None:
        seen.append(run.optimizer.state[which.learning]["momentum_buffer"].clone())
        renew(which)

    method.bases._renew = look  # type: ignore[method-assign]
    train(run, 4)
    assert not torch.equal(old, basis.columns())
    assert not torch.equal(update.learning, basis.learning)
    turned = old.mT @ basis.columns()
    expected = {"keep": seen[0], "rotate": turned.mT @ seen[0], "reset": torch.zeros_like(seen[0])}
    now = run.optimizer.state[basis.learning]["momentum_buffer"]
    torch.testing.assert_close(now, expected[moments])


def test_sketches_add_up_over_micro_batches_and_stay_out_of_clipping() -> None:
    found = []
    for parts in (1, 3):
        method = MultiHeadGaLore(heads=1, rank=3, merge_every=2, moments="rotate")
        run = begin(method)
        for i in range(4):
            x, y = batch(i)
            run.optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(run.model(a), b) / parts).backward()
            frozen = [basis.parameter.grad for basis in method.bases.all]
            assert frozen == [None] * len(frozen)
            run.optimizer.step()
        found.append(values(run))
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-9)


def test_gradients_that_are_not_finite_keep_the_basis_and_are_counted() -> None:
    method = MultiHeadGaLore(heads=1, rank=3, merge_every=2, layers="2")
    run = begin(method)
    train(run, 1)
    (basis,) = method.bases.all
    old = basis.columns().clone()
    x, y = batch(1)
    F.cross_entropy(run.model(x * float("inf")), y).backward()
    run.optimizer.step()
    assert method.bases.kept == 1
    assert_same(basis.columns(), old)


def test_bases_do_not_count_as_trained() -> None:
    run = begin(MultiHeadGaLore(heads=2, rank=3, layers="2", others="none"))
    opened = next(event for event in run.events if event["event"] == "updates")
    assert opened["parameters"][1] == 2 * 3 * 54


def test_errors_say_what_to_do() -> None:
    with pytest.raises(OptionError, match=r"merge_every=1 leaves nothing .* take 2 or more"):
        begin(MultiHeadGaLore(rank=3, merge_every=1))
    with pytest.raises(CompositionError, match="a basis that does not learn"):
        begin([MultiHeadGaLore(rank=3), LoRAPlus()])


def _trained() -> list[Tensor]:
    method = MultiHeadGaLore(rank=3, merge_every=3, mode="workers", others="none")
    run = begin(method)
    train(run, LAST)
    method.finalize(run.bare)  # not run.finish(), which would share worker 0's weights
    return values(run)


def test_workers_are_the_heads_of_one_process(together: Workers) -> None:
    first, second = together(_trained)
    run = begin(MultiHeadGaLore(heads=2, rank=3, merge_every=3, others="none"))
    train(run, LAST)
    run.finish()
    assert_same(second, first)
    for a, b in zip(first, values(run), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert (first[2] - network().get_parameter("2.weight")).abs().max() > 1e-3


def _shared(path: str) -> list[list[Tensor]]:
    ends = []
    for resume in (None, path):
        method = MultiHeadGaLore(heads=2, rank=3, merge_every=2)
        model = network()
        optimizer = OPTIMIZERS["AdamW"](model.parameters())
        run: Any = rankwise.start(model, method, optimizer, wrap=distributed.wrap, resume=resume)
        train(run, 3)  # while sketches are gathered
        if resume is None:
            rankwise.save(path, run)
        train(run, LAST)
        assert adapted_layers(run.bare)
        ends.append(values(run))
    return ends


def test_data_parallel_workers_find_the_same_bases(together: Workers, tmp_path: Path) -> None:
    first, second = together(_shared, str(tmp_path))
    assert_same(second, first)
    assert_same(first[1], first[0])
