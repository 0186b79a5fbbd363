"""What is made of a layer's weights and outlives a call: in inference it is made once for many.

A product W = U V, or copies of the factors in the order in which oneDNN reads them. Few steps at a
time, as where a text is continued, would otherwise spend most of their time on these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

Made = TypeVar("Made")
_kept: WeakKeyDictionary[nn.Module, tuple[list[object], Any]] = WeakKeyDictionary()


def can_keep(weights: Sequence[Any]) -> bool:
    """Whether what is made of weights may be kept: in inference in eager mode, on a CPU.

    On another device comparing the weights with those of before would wait for it. Under torch.func
    inputs are no plain tensors, and only operators know what to do with them.
    """
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if torch.is_grad_enabled() or tracing or torch._C._are_functorch_transforms_active():
        return False
    return all(
        type(p) is nn.Parameter and p.device.type == "cpu" and not p.is_inference() for p in weights
    )


def kept(owner: nn.Module, weights: Sequence[Any], make: Callable[[], Made], *use: object) -> Made:
    """What is made of weights, as it was made by an earlier call if it may be kept.

    It is held, one for each owner, until the owner is used with gradients, a weight changes,
    something is made for another use, or the owner is gone.

    Args:
        owner: the layer that holds it.
        weights: the parameters that it is made of.
        make: makes it.
        use: what else it depends on.
    """
    if not can_keep(weights):
        let_go(owner)
        return make()
    now = [*use, *(fact for weight in weights for fact in _facts(weight))]
    known = _kept.get(owner)
    if known is None or known[0] != now:
        _kept[owner] = known = (now, make())
    return known[1]


def let_go(owner: nn.Module) -> None:
    """Keep nothing for a layer."""
    if not torch.compiler.is_compiling():
        _kept.pop(owner, None)


def _facts(weight: nn.Parameter) -> list[object]:
    """What tells a parameter from its earlier self, 12 us for 65,000 numbers.

    Writes through `.data` leave the version as it is. Two sums tell those: of the numbers, and of
    products of each with the 16th after it, which an exchange of rows or columns does not keep.
    """
    x = weight.detach().reshape(-1)
    x = x if x.dtype == torch.float64 else x.float()
    sums = torch.stack([x.sum(), x[16:].dot(x[:-16])]).tolist()
    return [weight.data_ptr(), weight._version, weight.dtype, weight.shape, *sums]
