"""Add small updates to weights in half precision without losing them.

A bfloat16 weight has 8 bits: an update below 1/512 of it vanishes when rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic", "compensated")

_BITS = {torch.bfloat16: 16, torch.float16: 13}


@torch.no_grad()
def stochastic_(target: Tensor, exact: Tensor, generator: torch.Generator) -> None:
    """Write float32 values into a half-precision tensor, up or down with the right probability.

    The expected value is the exact one: a value between two neighbours becomes the farther one
    with the probability of its distance from the nearer.

    Args:
        target: bfloat16 or float16 tensor, overwritten.
        exact: float32, same shape; overwritten as a scratch pad.
        generator: source of the random bits, on the CPU.
    """
    bits = _BITS[target.dtype]
    noise = torch.randint(
        0, 1 << bits, exact.shape, dtype=torch.int32, generator=generator, device="cpu"
    )
    # Adding noise below the last bit that is kept, then cutting off, carries with the probability
    # of what is cut. Infinities and NaN must not carry into another number.
    finite = exact.isfinite()
    coded = exact.contiguous().view(torch.int32)
    coded = (coded + noise.to(exact.device)) & ~((1 << bits) - 1)
    target.copy_(torch.where(finite, coded.view(torch.float32), exact))


@torch.no_grad()
def compensated_(target: Tensor, exact: Tensor, lost: Tensor) -> None:
    """Write float32 values rounded to nearest, and keep what was lost for the next time.

    Args:
        target: half-precision tensor, overwritten.
        exact: float32, same shape: the new value with what was lost before added in.
        lost: same shape and dtype as target, overwritten by the rounding error.
    """
    target.copy_(exact)
    lost.copy_(exact.sub_(target.to(exact.dtype)))
