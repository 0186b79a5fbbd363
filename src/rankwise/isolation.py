"""What the loop and the run's own work must not do to each other: precision, modes, randomness.

Nor may a start that fails leave half of its work behind.
"""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from rankwise import surgery
from rankwise.method import Change

Probe = Callable[[nn.Module], float]

_NOTHING = nullcontext()
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


def ordinary_mode() -> AbstractContextManager[Any]:
    """Full precision and trainable tensors for the methods' hooks.

    Some loops call step() inside torch.autocast or torch.inference_mode.
    """
    active = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    inference = torch.is_inference_mode_enabled()
    if not active and not inference:
        return _NOTHING
    stack = ExitStack()
    if inference:
        stack.enter_context(torch.inference_mode(False))
    for device in active:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def untraced(hook: Callable[..., Any]) -> Callable[..., None]:
    """The hook as a compiled optimizer step calls it: uncompiled, for it changes modules."""
    plain: Any = torch.compiler.disable(hook)
    return plain


def losses_around(
    change: Change, model: nn.Module, probe: Probe | None
) -> tuple[float | None, float | None]:
    """What the probe says of the model without and with a change of its modules.

    Training goes on as if it had not been called: modes of all modules and random states are put
    back, also if it raises.
    """
    if probe is None or not change.modules:
        return None, None
    with surgery.undone(model, change):
        before = measure(probe, model)
    return before, measure(probe, model)


def measure(probe: Probe | None, model: nn.Module) -> float | None:
    """What the probe says of the model; training goes on as if it had not been called."""
    if probe is None:
        return None
    with aside(model):
        return float(probe(model))


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Put back the modes of all modules and the states of all random generators afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def all_or_nothing(model: nn.Module, optimizer: Any) -> Iterator[ExitStack]:
    """Put model and optimizer back if what is done to them within fails.

    That is modules, hooks, modes, which parameters learn, gradients, groups and states, all by
    reference. Numbers that were written into tensors stay.

    Args:
        model: the bare one.
        optimizer: one that is there already, or a factory, of which nothing has to be kept.

    Yields:
        What is called first if it fails: push onto it whoever must let go.
    """
    back = [_kept(vars(module), 2) for module in model.modules()]
    if isinstance(optimizer, Optimizer):  # groups and what they hold; states of parameters
        back.append(_kept(vars(optimizer), 4))
    learned = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    with ExitStack() as undo:
        try:
            yield undo
        except BaseException:
            undo.close()
            for put_back in back:
                put_back()
            for parameter, learns, gradient in learned:
                parameter.requires_grad_(learns)
                parameter.grad = gradient
            raise
        undo.pop_all()


def _kept(value: Any, depth: int) -> Callable[[], None]:
    """What puts back a container, and so many levels of them, in place."""
    if depth == 0 or type(value) not in _CONTAINERS:
        return lambda: None
    before = value.copy()
    parts = before.values() if isinstance(before, dict) else before
    inner = [_kept(part, depth - 1) for part in parts]

    def put_back() -> None:
        value.clear()
        (value.extend if isinstance(value, list) else value.update)(before)
        for each in inner:
            each()

    return put_back
