"""Turn the optimizer's moments along with a basis, so that they speak of the new directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import LifeCycleError
from rankwise.optim.rebind import STATE_KINDS

Turn = Callable[[Tensor], Tensor]


def first_moment(state: Mapping[str, Any]) -> Tensor | None:
    """The moment linear in the gradients, in float32 or better; None if there is none.

    RMSprop's buffer holds updates already divided by sqrt(v), so it is none.
    """
    normalised = "square_avg" in state
    for key, value in state.items():
        linear = STATE_KINDS.get(key) == "first" and not (normalised and key == "momentum_buffer")
        if linear and isinstance(value, Tensor) and value.dim() > 0:
            return widened(value)
    return None


def widened(state: Tensor) -> Tensor:
    """An optimizer's state in float32 or better; quantised ones are dequantised."""
    dequantize = getattr(state, "dequantize", None)
    if type(state) is not Tensor and dequantize is not None:
        state = dequantize()
    return state if state.dtype == torch.float64 else state.float()


@torch.no_grad()
def rotate_(
    state: Mapping[str, Any], group: Mapping[str, Any], turn: Turn, square: Turn, name: str
) -> None:
    """Express every moment of one proxy in a new basis, in place.

    First moments turn linearly. A second moment turns by LDAdam's rule (2410.16103),
    v <- (1 - b2^t) |(C o C)(vhat - mhat^2) + (C mhat)^2|: variances turn by the squares of the
    cosines, means linearly. Without a first moment it turns by the squares alone.

    Args:
        state: of the proxy, as the optimizer keeps it.
        group: the proxy's options, for the betas of bias correction.
        turn: multiplies by the cosines C between old and new directions.
        square: multiplies by their squares.
        name: of the weight, for messages.

    Raises:
        LifeCycleError: a moment in a form that this cannot turn.
    """
    mean, scale_mean, scale_second = first_moment(state), 1.0, 1.0
    if "betas" in group and "step" in state:
        steps = float(state["step"])
        scale_mean = 1 - group["betas"][0] ** steps
        scale_second = 1 - group["betas"][1] ** steps
    _refuse_unknown(state, name)
    for key, value in state.items():
        moment = isinstance(value, Tensor) and value.dim() > 0
        if moment and STATE_KINDS.get(key) == "second":
            variance = widened(value) / scale_second
            if mean is None:
                turned = square(variance)
            else:
                centre = mean / scale_mean
                turned = square(variance - centre.square()).add_(turn(centre).square_()).abs_()
            value.copy_(turned.mul_(scale_second))
    for key, value in state.items():
        if STATE_KINDS.get(key) == "first" and isinstance(value, Tensor) and value.dim() > 0:
            value.copy_(turn(widened(value)))


@torch.no_grad()
def reset_(state: Mapping[str, Any], name: str) -> None:
    """Zero every moment of one proxy, in place; step counts stay.

    Raises:
        LifeCycleError: a moment in a form of which it is not known what zero is.
    """
    _refuse_unknown(state, name)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() > 0 and STATE_KINDS[key] != "counter":
            value.copy_(torch.zeros_like(widened(value)))


def _refuse_unknown(state: Mapping[str, Any], name: str) -> None:
    for key, value in state.items():
        if key not in STATE_KINDS and isinstance(value, Tensor) and value.dim() > 0:
            raise LifeCycleError(
                f"the optimizer keeps {key!r} ({type(value).__name__}) for {name}, of which it is "
                "not known how it follows a new basis; give the method moments='keep'"
            )
