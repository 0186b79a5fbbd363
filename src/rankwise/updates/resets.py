"""Which moments survive when an update begins anew (2307.05695)."""

from __future__ import annotations

import torch
from torch import Tensor

RESETS = ("random", "magnitude", "full", "none")


def kept_moments(
    parameter: Tensor, reset: str, fraction: float, generator: torch.Generator
) -> float | Tensor:
    """What `Change.rewritten` says of a parameter: a fraction of its entries, or a mask of them.

    One mask serves all moments of a parameter. Pruning each by its own size, as the published
    program does, leaves entries with a first moment and no second one, and Adam's next step there
    is m / eps.

    Args:
        parameter: whose moments.
        reset: "random" and "magnitude" forget a fraction, the latter the smallest; "full", "none".
        fraction: of the entries that are forgotten.
        generator: of the random mask.
    """
    if reset == "random":
        return torch.rand(parameter.shape, generator=generator, device="cpu") >= fraction
    return {"full": 0.0, "none": 1.0, "magnitude": 1 - fraction}[reset]
