"""Projected runs in torch's distributed checkpoints: states under the weights' names, both ways."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as torch_states
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.optim import SGD, Adagrad, AdamW, Optimizer

import rankwise
from rankwise import distributed
from rankwise.errors import LifeCycleError
from rankwise.method import Method
from rankwise.methods.qgalore import QGaLore
from test_distributed import Workers
from test_projected import METHODS, batches, engine_of, gap, mlp, train
from test_shards import KINDS, SAVED, STEPS, data, gathered, mine, sharded, tall

MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda m: AdamW(m.parameters(), lr=1e-2),
    "fused": lambda m: AdamW(m.parameters(), lr=torch.tensor(1e-2), fused=True),
    "momentum": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9),
    "stateless": lambda m: SGD(m.parameters(), lr=0.1),
    "eager": lambda m: Adagrad(m.parameters(), lr=0.1),
    "groups": lambda m: AdamW(
        [{"params": list(m[:2].parameters()), "lr": 1e-2}, {"params": list(m[2:].parameters())}]
    ),
}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(tmp_path_factory.mktemp("workers"))
    yield workers
    workers.stop()


LOCAL: dict[str, Callable[[], Method]] = {
    **METHODS,
    "weights of 8 bits": lambda: QGaLore(4, every=3, weight_bits=8),
}


def started(method: str, optimizer: str = "AdamW") -> tuple[nn.Module, rankwise.Run]:
    model = mlp()
    return model, rankwise.start(model, LOCAL[method](), MAKE[optimizer](model))


def steps(first: int = 0, last: int = STEPS) -> Any:
    return iter(list(batches(STEPS))[first:last])


def through_a_file(value: Any) -> Any:
    content = io.BytesIO()
    torch.save(value, content)
    content.seek(0)
    return torch.load(content, weights_only=True)


def held(run: rankwise.Run) -> list[str]:
    return [type(p).__name__ for group in run.optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        ("plain", "AdamW"),
        ("rotated", "fused"),
        ("plain", "momentum"),
        ("plain", "stateless"),
        ("two-sided", "eager"),
        ("feedback", "groups"),
        ("tracked, residual", "AdamW"),
        ("weights of 8 bits", "AdamW"),
    ],
)
def test_what_torch_gets_it_sets_exactly(method: str, optimizer: str) -> None:
    model, run = started(method, optimizer)
    train(run, steps(0, SAVED))
    before = held(run)
    with rankwise.states_by_weight(run) as stepped:
        weights, states = torch_states.get_state_dict(model, stepped)
    assert held(run) == before
    saved = through_a_file((weights, states, rankwise.methods_state(run)))
    train(run, steps(SAVED))
    other, resumed = started(method, optimizer)
    with rankwise.states_by_weight(resumed) as stepped:
        torch_states.set_state_dict(
            other, stepped, model_state_dict=saved[0], optim_state_dict=saved[1]
        )
    rankwise.restore_methods(resumed, saved[2])
    assert (resumed.step, held(resumed)) == (SAVED, before)
    train(resumed, steps(SAVED))
    assert gap(model, other) == 0
    assert gap(model, mlp()) > 1e-3


def test_moments_have_names_and_the_projected_shape() -> None:
    model, run = started("plain")
    train(run, steps(0, 2))
    with rankwise.states_by_weight(run) as stepped:
        options = torch_states.StateDictOptions(flatten_optimizer_state_dict=True)
        flat = torch_states.get_optimizer_state_dict(model, stepped, options=options)
    assert flat["state.0.weight.exp_avg"].shape == (40, 4)  # type: ignore[union-attr]
    assert flat["state.2.weight.exp_avg"].shape == (4, 40)  # type: ignore[union-attr]
    assert {name for name in flat if name.endswith("exp_avg")} == {
        f"state.{name}.exp_avg" for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize("optimizer", ["AdamW", "momentum", "stateless"])
def test_looking_at_a_fresh_run_leaves_no_trace(optimizer: str) -> None:
    model, run = started("plain", optimizer)
    other, untouched = started("plain", optimizer)
    with rankwise.states_by_weight(run) as stepped:
        states = torch_states.get_optimizer_state_dict(model, stepped)
    assert optimizer == "stateless" or states["state"]
    assert gap(model, other) == 0
    assert not run.optimizer.state
    assert run.step == 0
    assert all(m.failures == 0 for m in engine_of(run).matrices.values())
    train(run, steps())
    train(untouched, steps())
    assert gap(model, other) == 0


def test_gradients_held_when_looking_stay() -> None:
    """In the middle of an accumulation, and before the very first step."""
    for count in (0, 2):
        runs = [started("plain") for _ in range(2)]
        for (model, run), looks in zip(runs, (True, False), strict=True):
            train(run, steps(0, count))
            x, y = next(steps(count))
            nn.functional.cross_entropy(model(x), y).backward()
            if looks:
                with rankwise.states_by_weight(run) as stepped:
                    torch_states.get_optimizer_state_dict(model, stepped)
            run.optimizer.step()
            run.optimizer.zero_grad()
            train(run, steps(count + 1))
        assert gap(runs[0][0], runs[1][0]) == 0


@pytest.mark.parametrize("count", [0, 2])
def test_outside_of_it_torch_is_told_what_to_do(count: int) -> None:
    model, run = started("plain")
    train(run, steps(0, count))
    with rankwise.states_by_weight(run) as stepped:
        states = torch_states.get_optimizer_state_dict(model, stepped)
    with pytest.raises(LifeCycleError, match="states_by_weight"):
        torch_states.get_optimizer_state_dict(model, run.optimizer)
    with pytest.raises((LifeCycleError, KeyError), match="states_by_weight"):
        torch_states.set_optimizer_state_dict(model, run.optimizer, copy.deepcopy(states))
    assert [group["lr"] for group in run.optimizer.param_groups] == [1e-2]
    run.optimizer.zero_grad()
    run.optimizer.state_dict()  # of everybody else
    train(run, steps(count))
    other, untouched = started("plain")
    train(untouched, steps())
    assert gap(model, other) == 0


def test_methods_are_restored_into_their_like_alone() -> None:
    _, run = started("plain")
    train(run, steps(0, 2))
    state = rankwise.methods_state(run)
    with pytest.raises(LifeCycleError, match="before its first step"):
        rankwise.restore_methods(run, state)
    with pytest.raises(LifeCycleError, match=r"\['GaLore'\], this one uses \['Fira'\]"):
        rankwise.restore_methods(started("residual")[1], state)
    model = mlp()
    factored = rankwise.start(model, rankwise.Factorized(4), MAKE["AdamW"](model))
    with pytest.raises(LifeCycleError, match=r"rankwise\.save alone"):
        rankwise.methods_state(factored)


# ---------------------------------------------------------------- shards, through files


def _begun(name: str) -> tuple[nn.Module, rankwise.Run]:
    model = sharded(tall())
    return model, rankwise.start(model, KINDS[name](), AdamW(model.parameters(), lr=1e-2))


def _saved_and_loaded(name: str, directory: str) -> float:
    model, run = _begun(name)
    train(run, mine(data(0, SAVED)))
    with rankwise.states_by_weight(run) as stepped:
        weights, states = torch_states.get_state_dict(model, stepped)
        state_dict_saver.save({"model": weights, "optimizer": states}, checkpoint_id=directory)
    rest = rankwise.methods_state(run)
    if distributed.worker() == 0:
        torch.save(rest, Path(directory, "methods.pt"))
    torch.distributed.barrier()
    train(run, mine(data(SAVED)))
    other, resumed = _begun(name)
    with rankwise.states_by_weight(resumed) as stepped:
        weights, states = torch_states.get_state_dict(other, stepped)
        state_dict_loader.load({"model": weights, "optimizer": states}, checkpoint_id=directory)
        torch_states.set_state_dict(
            other, stepped, model_state_dict=weights, optim_state_dict=states
        )
    rest = torch.load(Path(directory, "methods.pt"), weights_only=True)
    rankwise.restore_methods(resumed, rest)
    train(resumed, mine(data(SAVED)))
    return gap(gathered(model), gathered(other))


@pytest.mark.parametrize("name", ["right", "feedback"])
def test_distributed_checkpoints_of_shards_resume_exactly(
    together: Workers, tmp_path: Path, name: str
) -> None:
    assert together(_saved_and_loaded, name, str(tmp_path)) == [0.0, 0.0]
