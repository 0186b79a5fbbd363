"""Products W = U V that outlive a call: without gradients W is formed once, while U and V stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_kept: WeakKeyDictionary[nn.Module, tuple[list[object], Tensor]] = WeakKeyDictionary()


def can_keep(factors: Sequence[Any]) -> bool:
    """Whether a product may be kept: in inference in eager mode, on a CPU, of parameters.

    On another device comparing the factors with those of before would wait for it.
    """
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if torch.is_grad_enabled() or tracing:
        return False
    return all(
        type(p) is nn.Parameter and p.device.type == "cpu" and not p.is_inference() for p in factors
    )


def kept(owner: nn.Module, factors: Sequence[Any], form: Callable[[], Tensor]) -> Tensor:
    """A product, formed or as formed by an earlier call.

    It is held until it is asked for with gradients, a factor changes or the layer is gone.

    Args:
        owner: the layer that the factors belong to.
        factors: its parameters that are multiplied.
        form: forms the product.
    """
    if not can_keep(factors):
        if not torch.compiler.is_compiling():
            _kept.pop(owner, None)
        return form()
    now = [fact for factor in factors for fact in _facts(factor)]
    known = _kept.get(owner)
    if known is None or known[0] != now:
        _kept[owner] = known = (now, form())
    return known[1]


def _facts(factor: nn.Parameter) -> list[object]:
    """What tells a parameter from its earlier self, 20 us for 65,000 numbers.

    Writes through `.data` leave the version as it is. Three sums tell those: of the numbers, their
    squares, and products of each with the 16th after it, which an exchange of rows does not keep.
    """
    x = factor.detach().reshape(-1)
    x = x if x.dtype == torch.float64 else x.float()
    sums = torch.stack([x.sum(), x.dot(x), x[16:].dot(x[:-16])]).tolist()
    return [factor.data_ptr(), factor._version, factor.dtype, factor.shape, *sums]
