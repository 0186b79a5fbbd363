"""The optimizer's state of proxies, seen from outside: whole, or under the weights' own names.

Between steps an optimizer holds proxies, whose states are parts of this worker where weights are
sharded. Checkpoints want them whole; torch.distributed.checkpoint finds states by the names of the
model's parameters, which proxies do not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
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


@contextmanager
def weights_in_place_of_proxies(optimizer: Optimizer) -> Iterator[None]:
    """Within it the optimizer holds the weights, with the states of their proxies.

    Nothing may step within it. Where there is no state yet it is begun, of the proxies' shapes,
    so that a saved one can be read into it; unless one is loaded, it is gone afterwards.
    """
    proxies = [p for p in _held(optimizer) if isinstance(p, Proxy)]
    begun = not optimizer.state and all(p.grad is None for p in _held(optimizer))
    if begun:
        _begin_states(optimizer)
    made = optimizer.state
    _exchange(optimizer, {p: p.stands_for for p in proxies}, _to_whole)
    try:
        yield
    finally:
        back: dict[Parameter, Parameter] = {p.stands_for: p for p in proxies}
        _exchange(optimizer, back, lambda weight, state: _to_parts(back[weight], state))
        if begun and optimizer.state is made:
            optimizer.state.clear()


def _exchange(
    optimizer: Optimizer,
    pairs: Mapping[Parameter, Parameter],
    convert: Callable[[Parameter, State], State],
) -> None:
    for group in optimizer.param_groups:
        group["params"][:] = [pairs.get(p, p) for p in group["params"]]
    for old, new in pairs.items():
        if old in optimizer.state:
            optimizer.state[new] = convert(old, optimizer.state.pop(old))


def _begin_states(optimizer: Optimizer) -> None:
    """One step at rate zero by zero gradients: what lazy optimizers make their states in."""
    held = _held(optimizer)
    proxies = [p for p in held if isinstance(p, Proxy)]
    rates = [group.get("lr") for group in optimizer.param_groups]
    for proxy in proxies:
        proxy.projector.wake()
    for parameter in held:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    try:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if rate is not None:
                group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
        optimizer.step()
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if rate is not None:
                group["lr"] = rate
        for proxy in proxies:
            proxy.projector.rest()
        optimizer.zero_grad()
