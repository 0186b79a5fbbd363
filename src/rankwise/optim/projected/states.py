"""The optimizer's state of proxies, seen from outside.

Between steps an optimizer holds proxies, whose states are parts of this worker where weights are
sharded; checkpoints want them whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from rankwise import distributed, sharding
from rankwise.errors import CheckpointError
from rankwise.optim.projected.gradient import Proxy

State = dict[str, Any]


def _held(optimizer: Optimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _sharded(parameter: Parameter) -> bool:
    return sharding.is_sharded(getattr(parameter, "stands_for", parameter))


def _to_whole(parameter: Parameter, state: Mapping[str, Any]) -> State:
    if not isinstance(parameter, Proxy):
        return dict(state)
    see = parameter.projector.as_whole
    return {key: see(v) if isinstance(v, Tensor) else v for key, v in state.items()}


def _to_parts(parameter: Parameter, state: Mapping[str, Any]) -> State:
    if isinstance(parameter, Proxy):
        take = parameter.projector.as_part
        return {key: take(v) if isinstance(v, Tensor) else v for key, v in state.items()}
    if not _sharded(parameter):
        return dict(state)
    fits = {k for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape}
    return {k: sharding.cut(v, parameter) if k in fits else v for k, v in state.items()}


def whole_states(optimizer: Optimizer) -> State:
    """The optimizer's state dict, with DTensors for whatever belongs to sharded weights.

    A collective if any weight is sharded.

    Raises:
        CheckpointError: on every worker: a state of a sharded weight is not of its shape, or of
            few bits, so that the workers' parts do not add up to one.
    """
    held, state_dict = _held(optimizer), optimizer.state_dict()
    if not any(map(_sharded, held)):
        return state_dict
    states = state_dict["state"]
    problems = (_problem(held[index], state) for index, state in states.items())
    problem = next(filter(None, distributed.gather(next(filter(None, problems), ""))), "")
    if problem:
        raise CheckpointError(
            f"the optimizer's state {problem} belongs to rows of one worker and does not add up "
            "to that of the whole matrix; a sharded run is saved with an optimizer whose states "
            "have the shape of what it steps, such as AdamW"
        )
    whole = {index: _to_whole(held[index], state) for index, state in states.items()}
    return {**state_dict, "state": whole}


def _problem(parameter: Parameter, state: Mapping[str, Any]) -> str:
    if not _sharded(parameter):
        return ""
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if value.shape != parameter.shape or type(sharding.local(value)) is not Tensor:
            return f"{key!r} ({type(sharding.local(value)).__name__} of {tuple(value.shape)})"
    return ""


def part_states(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> State:
    """This worker's part of a state dict that `whole_states` gave, whole tensors or DTensors."""
    held = _held(optimizer)
    states = state_dict["state"].items()
    return {**state_dict, "state": {i: _to_parts(held[i], state) for i, state in states}}
