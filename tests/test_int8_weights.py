"""Weights stored in 8 bits: what is read, written, trained and saved."""

from __future__ import annotations

import copy
import io
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import rankwise
from rankwise import checkpoint
from rankwise.errors import LifeCycleError, OptionError
from rankwise.methods.qgalore import QGaLore
from rankwise.optim.projected.int8 import BLOCK, Int8Weight, encode
from test_projected import adamw, batches, begin, gap, loss_of, mlp, train

METHOD = partial(QGaLore, 4, every=3, weight_bits=8)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (7, 37), (3, 5, 3, 3), (300, 2)])
def test_nearest_codes_are_half_a_step_away(shape: tuple[int, ...]) -> None:
    values = drawn(*shape)
    stored = Int8Weight.of(values)
    flat = nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    step = (flat.abs().amax(1, keepdim=True) / 127).expand_as(flat)
    bound = step.flatten()[: values.numel()].view(shape) * 0.5001
    assert bool(((stored.decoded() - values).abs() <= bound).all())
    again = Int8Weight.of(stored.decoded())
    torch.testing.assert_close(again.decoded(), stored.decoded(), rtol=1e-6, atol=0)


def test_stochastic_codes_are_right_on_average() -> None:
    values, generator = drawn(40, 30), torch.Generator().manual_seed(1)
    stored, total = Int8Weight.of(values), torch.zeros(40, 30)
    for _ in range(400):
        stored.write_(values, generator)
        total += stored.decoded()
    step = float(values.abs().max()) / 127
    # The mean of 400 draws between two codes has a deviation of at most step / 40.
    torch.testing.assert_close(total / 400, values, rtol=0, atol=step / 40 * 5)
    assert float((stored.decoded() - values).abs().max()) < step


def test_what_is_not_finite_is_seen_and_zeros_stay() -> None:
    values = torch.zeros(4, 200)
    assert bool((Int8Weight.of(values).decoded() == 0).all())
    values[0, 3] = torch.nan
    assert bool(Int8Weight.of(values).decoded().isnan().any())
    codes, scales = encode(torch.full((256,), 1e-45))
    assert bool(((codes * scales) >= 0).all())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(24, 40), (5, 24)),
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 5)),
        (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9)),
    ],
)
def test_a_layer_computes_with_the_decoded_weight(layer: Any, shape: tuple[int, ...]) -> None:
    dense: Any = copy.deepcopy(layer)
    layer.weight = nn.Parameter(Int8Weight.of(layer.weight))
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
    gradients = []
    for one in (layer, dense):
        x = drawn(*shape).requires_grad_()
        y = one(one(x) @ drawn(40, 24)) if isinstance(layer, nn.Linear) else one(x)  # shared
        y.square().sum().backward()
        gradients.append((y.detach(), x.grad, one.weight.grad, one.bias.grad))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_no_float_copy_waits_for_backward() -> None:
    """Memory is the point: autograd keeps the codes of a weight, not what they decode to."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    model: Any = mlp()
    run = begin(model, METHOD())
    x, y = next(batches(1, size=5))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss_of(run.model, (x.requires_grad_(), y)).backward()
    weights = [t for t in kept if set(t.shape) in ({40, 24}, {16, 40})]
    assert [type(t) for t in weights] == [Int8Weight] * 2


def test_the_float_weights_are_gone_while_training_and_back_afterwards() -> None:
    model: Any = mlp()
    seen = weakref.ref(model[0].weight)
    run = begin(model, METHOD())
    assert seen() is None
    assert [type(p) for p in model.parameters()].count(Int8Weight) == 2
    train(run, batches(4))
    before = loss_of(model, next(batches(1)))
    run.finish()
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    torch.testing.assert_close(loss_of(model, next(batches(1))), before, rtol=0, atol=0)
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert set(map(id, held)) == set(map(id, model.parameters()))
    loss_of(model, next(batches(1))).backward()
    run.optimizer.step()


def test_a_start_that_fails_leaves_floats() -> None:
    model = mlp()
    with pytest.raises(ZeroDivisionError):
        begin(model, METHOD(), wrap=lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


def test_small_updates_are_not_lost() -> None:
    """300 updates of 1/80 of a code each, against the same in float32."""
    moved = {}
    for bits in (8, None):
        model: Any = nn.Sequential(nn.Linear(16, 24, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(drawn(24, 16).clamp_(-1, 1))
        start = model[0].weight.detach().clone()
        method = QGaLore(16, scale=1.0, every=0, layers="*", weight_bits=bits)
        run = begin(model, method, lambda m: SGD(m.parameters(), lr=1e-4))
        for _ in range(300):
            model[0].weight.sum().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        moved[bits] = float((model[0].weight.detach() - start).mean())
    assert moved[None] == pytest.approx(-0.03, rel=1e-3)
    assert moved[8] == pytest.approx(moved[None], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_rate_zero_leave_the_codes(dtype: torch.dtype) -> None:
    """Decoding in half precision before writing back would let weights wander by themselves."""
    model: Any = mlp(dtype=dtype)
    run = begin(model, METHOD(), partial(adamw, lr=0.0))
    before = model[0].weight.codes.clone()
    train(run, [(x.to(dtype), y) for x, y in batches(20)])
    changed = int((model[0].weight.codes != before).sum())
    assert changed <= 2, "of 960; a scale may differ in its last bit"


def test_it_learns_as_float_weights_do() -> None:
    losses = {}
    data = list(batches(60))
    for bits in (8, None):
        model = mlp()
        train(begin(model, QGaLore(4, every=10, weight_bits=bits)), data)
        losses[bits] = sum(float(loss_of(model, b).detach()) for b in data) / len(data)
    start = sum(float(loss_of(mlp(), b).detach()) for b in data) / len(data)
    assert losses[8] < start - 0.8 * (start - losses[None])


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, decay: float) -> None:
    data, make = list(batches(8)), partial(adamw, weight_decay=decay)
    whole, first, again = mlp(), mlp(), mlp(5)
    train(begin(whole, METHOD(), make), data)
    run = begin(first, METHOD(), make)
    train(run, data[:4])
    rankwise.save(tmp_path, run)
    saved = checkpoint.load(tmp_path).weights
    assert {type(t) for t in saved.values()} == {Tensor}
    train(begin(again, METHOD(), make, resume=tmp_path), data[4:])
    assert gap(whole, again) == 0


def test_floats_and_codes_resume_each_other(tmp_path: Path) -> None:
    data = list(batches(8))
    for ours, theirs in ((8, None), (None, 8)):
        model, again = mlp(), mlp(5)
        run = begin(model, QGaLore(4, every=3, weight_bits=ours))
        train(run, data[:4])
        rankwise.save(tmp_path / str(ours), run)
        method = QGaLore(4, every=3, weight_bits=theirs)
        resumed = begin(again, method, resume=tmp_path / str(ours))
        assert gap(model, again) <= (0 if ours else 1 / 127)
        train(resumed, data[4:])


def test_copies_and_pickles_are_whole() -> None:
    model: Any = mlp()
    begin(model, METHOD())
    twin = copy.deepcopy(model)
    assert type(twin[0].weight) is Int8Weight
    assert isinstance(twin[0].weight, nn.Parameter)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert float(model[0].weight.detach().abs().max()) > 0
    content = io.BytesIO()
    torch.save(dict(model.state_dict()), content)
    content.seek(0)
    loaded = torch.load(content, weights_only=True)
    dense = mlp(3)
    dense.load_state_dict(loaded)
    assert gap(dense, model) == 0
    model.load_state_dict(mlp(3).state_dict())
    assert gap(model, mlp(3)) < 1 / 127


def test_writes_in_place_are_encoded_and_lists_refused() -> None:
    stored: Any = nn.Parameter(Int8Weight.of(drawn(20, 30)))
    values = stored.decoded().detach()
    with torch.no_grad():
        stored.mul_(0.5).clamp_(-0.5, 0.5)
        torch.testing.assert_close(
            stored.decoded(), (values / 2).clamp(-0.5, 0.5), rtol=0, atol=1e-2
        )
        with pytest.raises(LifeCycleError, match="one at a time"):
            torch._foreach_mul_([stored, torch.ones(2)], 2.0)  # pyright: ignore


@pytest.mark.parametrize("bits", [4, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(OptionError, match="weight_bits"):
        QGaLore(4, weight_bits=bits)


def test_half_precision_and_autocast() -> None:
    half = mlp(dtype=torch.bfloat16)
    run = begin(half, METHOD())
    train(run, [(x.bfloat16(), y) for x, y in batches(3)])
    assert all(bool(p.isfinite().all()) for p in half.parameters())
    model = mlp()
    run = begin(model, METHOD())
    for batch in batches(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(run.model, batch)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert gap(model, mlp()) > 1e-3
