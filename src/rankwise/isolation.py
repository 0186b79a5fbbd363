"""What the loop and the run's own work must not do to each other: precision, modes, randomness."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from rankwise import surgery
from rankwise.method import Change

Probe = Callable[[nn.Module], float]

_NOTHING = nullcontext()


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
) -> tuple[float, float] | tuple[None, None]:
    """What the probe says of the model without and with a change of its modules.

    Training goes on as if it had not been called: modes of all modules and torch's random state
    are put back, also if it raises.
    """
    if probe is None or not change.modules:
        return None, None
    with surgery.undone(model, change):
        before = _measure(probe, model)
    return before, _measure(probe, model)


def _measure(probe: Probe, model: nn.Module) -> float:
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            return float(probe(model))
        finally:
            for module, mode in modes:
                module.training = mode
