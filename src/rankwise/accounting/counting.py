"""Parameters and FLOPs of a model, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rankwise.accounting.recurrent import recurrent_flops
from rankwise.accounting.running import Sample, Shape, device_of, forward, undisturbed


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many numbers a model stores; a parameter shared by several modules counts once.

    Tables of papers that say "MB" often mean millions of numbers; in float32 these are four times
    as many megabytes.
    """

    stored: int
    trainable: int  # those that require a gradient
    bytes: int

    @property
    def millions(self) -> float:
        """Stored numbers in units of 10^6."""
        return self.stored / 1e6

    @property
    def megabytes(self) -> float:
        """What they occupy, in units of 10^6 bytes."""
        return self.bytes / 1e6


def parameters(model: nn.Module) -> Parameters:
    """Count the parameters of a model; buffers are not parameters."""
    unique = list(model.parameters())
    return Parameters(
        stored=sum(p.numel() for p in unique),
        trainable=sum(p.numel() for p in unique if p.requires_grad),
        bytes=sum(p.numel() * p.element_size() for p in unique),
    )


def running_statistics(model: nn.Module) -> int:
    """How many layers normalise in eval mode by statistics gathered during training (BatchNorm).

    After a change of the weights before them these are out of date for some training steps.
    """
    return sum(getattr(m, "running_mean", None) is not None for m in model.modules())


def flops(model: nn.Module, sample: Sample) -> int:
    """Count the FLOPs of the matrix products of one forward in eval mode: 2 per multiply-add.

    Many papers and counters (fvcore, thop, ptflops) call half of it FLOPs; that is `macs`. Looking
    up an embedding costs none; norms, activations, biases and softmax are not counted.

    Exact for linear and recurrent layers, convolutions and attention, whatever kernels would run:
    the count is made on meta tensors, without memory or time for the arithmetic. A model that needs
    values (data-dependent control flow, tensors that are neither parameters nor buffers) is run
    once for real, with the kernels that the counter cannot see through turned off.

    Args:
        model: any module; afterwards it is exactly as before.
        sample: as for `trace`.
    """
    counter = partial(FlopCounterMode, display=False, custom_mapping=_UNCOUNTED)
    with undisturbed(model):
        with (
            suppress(RuntimeError, TypeError, ValueError),
            counter() as count,
            recurrent_flops(model, count.get_total_flops) as unseen,
        ):
            forward(model, sample, torch.device("meta"), detached=True)
            return count.get_total_flops() + unseen()
        with (
            _transparent_kernels(),
            counter() as count,
            recurrent_flops(model, count.get_total_flops) as unseen,
        ):
            forward(model, sample, device_of(model), detached=True)
        return count.get_total_flops() + unseen()


def macs(model: nn.Module, sample: Sample) -> int:
    """Count the multiply-adds of the matrix products of one forward: half of `flops`."""
    return flops(model, sample) // 2


def _trilinear_flops(a: Shape, weight: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * a[0] * prod(weight)  # (B, I), (O, I, J), (B, J) -> (B, O)


# What nn.Bilinear dispatches to; the counter knows no formula for it and would say 0.


_UNCOUNTED: dict[Any, Callable[..., int]] = {torch.ops.aten._trilinear: _trilinear_flops}


@contextmanager
def _transparent_kernels() -> Iterator[None]:
    """Only kernels that dispatch to matrix products the counter knows."""
    # Not `mkldnn.flags`: it sets TF32 too, and warns where there is no such hardware.
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        with torch.backends.cudnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled)
