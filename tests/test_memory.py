"""Predicted bytes are those of the tensors that are really there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankwise
from rankwise import accounting, models
from rankwise.accounting import Memory
from rankwise.errors import OptionError
from rankwise.methods import METHODS


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return models.build("llama-tiny", classes=40, input_shape=(8,)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "make", "states"),
    [
        ("dense", torch.optim.AdamW, 2),
        ("galore", torch.optim.AdamW, 2),
        ("tracked", torch.optim.AdamW, 2),
        ("galore", lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), 1),
    ],
)
def test_a_step_keeps_what_was_predicted(method, make, states, dtype):
    model = network(dtype)
    optimizer = make(model.parameters(), lr=1e-3)
    options = {} if method == "dense" else {"rank": 24}
    run = rankwise.start(model, METHODS[method](**options), optimizer)
    tokens = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    weights = {id(p) for p in model.parameters()}
    stepping: list[int] = []
    optimizer.register_step_pre_hook(
        lambda *_: stepping.append(
            sum(
                p.untyped_storage().nbytes()
                for group in optimizer.param_groups
                for p in group["params"]
                if id(p) not in weights
            )
        )
    )
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in held if p.grad is not None]
    engine = getattr(run.methods[0], "engine", None)
    matrices = {} if engine is None else engine.matrices
    moments = [
        t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.dim()
    ]
    expected = Memory(
        weights=size(*model.parameters()),
        gradients=size(*gradients),
        states=size(*moments),
        bases=size(*(m.basis(side) for m in matrices.values() for side in m.sides)),
        proxies=stepping[-1],
        largest_gradient=max((size(m.weight) for m in matrices.values()), default=0),
    )
    assert len(gradients) == len(held)
    between = sum(p.untyped_storage().nbytes() for p in held if id(p) not in weights)
    assert between <= 8 * len(matrices)  # one number each
    ranks = dict.fromkeys(matrices, 24)
    assert accounting.memory(model, states=states, ranks=ranks) == expected
    assert (expected.bases > 0) == (method != "dense")
    only = accounting.memory(model, states=states, ranks=ranks, only=True)
    rest = accounting.memory(model, states=states)
    assert only.weights == size(*(m.weight for m in matrices.values()))
    assert only.beside_weights <= rest.beside_weights


def test_the_llama_protocol_by_hand():
    with torch.device("meta"):
        model = models.build("llama-130m")
    inner = {n: 192 for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2}
    dense, low = accounting.memory(model), accounting.memory(model, ranks=inner)
    count = 134_105_856
    assert (dense.total, dense.beside_weights) == (16 * count, 12 * count)
    # Of each matrix (M, N): gradient, two moments and proxy of 192 max(M, N), basis 192 min(M, N).
    assert low.at_step == low.total + low.proxies
    small = 12 * 192 * (4 * 768 + 3 * 2048)
    bases = 12 * 192 * 7 * 768
    outside = count - 12 * (4 * 768**2 + 3 * 768 * 2048)
    assert low.gradients == 4 * (small + outside)
    assert low.states == 8 * (small + outside)
    assert (low.proxies, low.bases) == (4 * small, 4 * bases)
    assert low.largest_gradient == 4 * 768 * 2048
    eight = accounting.memory(model, ranks=inner, state_bytes=1 + 4 / 256)
    assert eight.states == round(low.states * (1 + 4 / 256) / 4)


def test_a_rank_that_saves_nothing_keeps_the_dense_gradient():
    model = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(2, 3, 3))
    full = accounting.memory(model, ranks={"0.weight": 4, "1.weight": 3})
    plain = accounting.memory(model)
    assert (full.gradients, full.states, full.bases) == (plain.gradients, plain.states, 0)
    # A kernel is the matrix (out, in * k * k) = (3, 18).
    kernel = accounting.memory(model, ranks={"1.weight": 2}, only=True)
    assert (kernel.gradients, kernel.bases, kernel.weights) == (4 * 2 * 18, 4 * 2 * 3, 4 * 54)


def test_what_is_not_trained_or_shared_counts_once_or_not_at_all():
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    model[1].weight = model[0].weight
    assert accounting.memory(model) == Memory(weights=100, gradients=100, states=200)
    model[0].weight.requires_grad_(False)
    assert accounting.memory(model) == Memory(weights=100, gradients=0, states=0)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"ranks": {"2.weight": 1}}, "ranks names '2.weight', which is no parameter of Sequential"),
        ({"ranks": {"0.bias": 1}}, "0.bias of shape (4,) at rank 1: only a matrix or kernel"),
        ({"ranks": {"0.weight": 0}}, "0.weight of shape (4, 6) at rank 0"),
        ({"states": -1}, "states=-1"),
        ({"state_bytes": -1.0}, "state_bytes=-1.0 must not be negative"),
    ],
)
def test_what_cannot_be_counted_is_refused(how, words):
    with pytest.raises(OptionError) as caught:
        accounting.memory(nn.Sequential(nn.Linear(6, 4)), **how)
    assert words in str(caught.value)
