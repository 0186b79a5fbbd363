"""Laws over whole architectures: full rank is dense, a plan is what one gets, nothing is lost.

Sizes are tiny, weights are drawn anew everywhere (a fresh bias of zeros or norm of ones would
hide a mistake), and the arithmetic is double, so that only a bug can exceed float32 rounding.
"""

from __future__ import annotations

import copy
import functools
import io
import json
from typing import Any

import pytest
import torch
from architectures import ZOO, Architecture
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map_only

from rankwise import accounting, candidates, closing, ranks
from rankwise.errors import SelectionError
from rankwise.layers import LowRankLayer
from rankwise.structure import impose_plan, read_plan

FULL = ranks.Ratio(1.0, allow_growth=True)
QUARTER = ranks.Ratio(0.25, multiple=1, allow_growth=True)
SELECTIONS = ("auto", "*")


@pytest.fixture(params=ZOO, ids=lambda a: a.title)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    if request.param.library:
        pytest.importorskip(request.param.library)
    return request.param


def built(architecture: Architecture) -> tuple[nn.Module, Any]:
    """The tiny network in double precision, all of its weights drawn, and its input."""
    return copy.deepcopy(_built(architecture))


@functools.cache
def _built(architecture: Architecture) -> tuple[nn.Module, Any]:
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, sample = architecture.build()
    choose: Any = getattr(network, "set_experts_implementation", None)
    if choose is not None:
        choose("eager")  # the grouped kernel has no double precision
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    sample = tree_map_only(Tensor, _double, sample)
    return network.double(), sample


def selectable(architecture: Architecture, layers: str) -> tuple[nn.Module, Any]:
    """As `built`, of what has layers to factorise; the others' refusal is tested below."""
    if architecture.refused and layers == "auto":
        pytest.skip(architecture.refused)
    return built(architecture)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def run(network: nn.Module, sample: Any) -> list[Tensor]:
    """All tensors of real numbers in what a forward returns; dropout draws the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        output = network(**sample) if isinstance(sample, dict) else network(sample)
    found = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    assert found
    return found


def outputs(network: nn.Module, sample: Any, *, training: bool) -> list[Tensor]:
    """Of one forward that leaves no trace: in training, running statistics would move."""
    with torch.no_grad():
        return run(copy.deepcopy(network).train(training), sample)


def check_same(found: list[Tensor], expected: list[Tensor], rounding: float = 1e-6) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        # Some architectures compute parts in float32 whatever the weights are.
        assert_close(one, other, rtol=0, atol=rounding * (1 + float(other.abs().max())))


def kinds(network: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in network.named_modules()}


@pytest.mark.parametrize("layers", SELECTIONS)
def test_full_rank_is_dense_in_training_and_evaluation(architecture, layers):
    network, sample = selectable(architecture, layers)
    plan = ranks.plan(network, FULL, sample, layers=layers)
    modes = (True, False)
    expected = [outputs(network, sample, training=mode) for mode in modes]
    ranks.factorize(network, plan)
    assert any(isinstance(module, LowRankLayer) for module in network.modules())
    for mode, dense in zip(modes, expected, strict=True):
        check_same(outputs(network, sample, training=mode), dense)


@pytest.mark.parametrize("layers", SELECTIONS)
def test_a_quarter_trains_as_planned_and_comes_back(architecture, layers):
    network, sample = selectable(architecture, layers)
    dense = kinds(network)
    plan = ranks.plan(network, QUARTER, sample, layers=layers)
    before = accounting.parameters(network).stored
    fresh = copy.deepcopy(network)
    ranks.factorize(network, plan)
    assert (before, accounting.parameters(network).stored) == plan.parameters
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    loss = torch.stack([t.square().mean() for t in run(network.train(), sample)]).sum()
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(p.isfinite().all() for p in network.parameters())
    trained = outputs(network, sample, training=False)
    impose_plan(fresh, json.loads(json.dumps(read_plan(network))))
    fresh.load_state_dict(_saved(network))
    check_same(outputs(fresh, sample, training=False), trained, rounding=0)
    closing.to_dense(network)
    assert kinds(network) == dense
    assert accounting.parameters(network).stored == before
    check_same(outputs(network, sample, training=False), trained)


def _saved(network: nn.Module) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("layers", SELECTIONS)
def test_every_matrix_has_a_rank_or_a_reason(architecture, layers):
    network, sample = built(architecture)
    if architecture.refused and layers == "auto":
        with pytest.raises(SelectionError, match=architecture.refused):
            ranks.plan(network, QUARTER, sample)
        return
    plan = ranks.plan(network, QUARTER, sample, layers=layers)
    assert plan.ranks
    assert all((line.rank is None) == bool(line.reason) for line in plan.layers)
    others = candidates.unlisted(network, candidates.survey(network))
    assert all(type(network.get_submodule(name)).__name__ == kind for name, kind in others.items())
    assert bool(others) == any("no low-rank form" in note for note in plan.notes)
    named = {line.name for line in plan.layers} | others.keys()
    owners = {id(network.get_submodule(name)) for name in named if _is_module(network, name)}
    for name, module in network.named_modules():
        matrices = [k for k, p in module.named_parameters(recurse=False) if p.dim() > 1]
        inside = any(other.startswith(f"{name}.") for other in named)  # attention's projections
        # The network's own parameters (class tokens, positions) are no layer's.
        assert not (name and matrices) or id(module) in owners or inside, (name, matrices)


def _is_module(network: nn.Module, name: str) -> bool:
    try:
        network.get_submodule(name)
    except AttributeError:
        return False
    return True
