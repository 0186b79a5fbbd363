"""The options that methods of projected gradients share: meaning and range, written once."""

from __future__ import annotations

from typing import Any

from rankwise.optim.projected.choices import MOMENTS, as_rank
from rankwise.optim.projected.matrix import SIDES
from rankwise.optim.projected.rounding import ROUNDINGS
from rankwise.optim.projected.subspace import BASES
from rankwise.options import option


def rank(default: float) -> Any:
    """How many directions of each matrix."""
    meaning = "directions per matrix; below 1 a fraction of its short side"
    return option(default, meaning, above=0, parse=as_rank)


def every(default: int = 200) -> Any:
    """How often a basis is renewed."""
    return option(default, "steps between refreshes of a basis; 0 keeps the first", at_least=0)


def scale(default: float, meaning: str = "factor on the update") -> Any:
    """What the update is multiplied by."""
    return option(default, meaning, above=0)


def growth(default: float) -> Any:
    """The limiter of the update's norm."""
    meaning = "by which the update's norm may grow a step; 0: no limit"
    return option(default, meaning, at_least=0)


def basis(default: str = "power") -> Any:
    """Where a basis comes from."""
    return option(default, "how a basis is found", choices=BASES)


def moments(default: str = "keep") -> Any:
    """What becomes of the optimizer's state when the basis changes."""
    return option(default, "what a refresh does to moments", choices=MOMENTS)


def side(default: str = "short") -> Any:
    """Rows, columns or both."""
    return option(default, "which side is projected", choices=SIDES)


def stagger() -> Any:
    """Whether the refreshes are spread over the steps."""
    return option(True, "refresh matrices in turn instead of all in one step")


def rounding() -> Any:
    """How small updates survive in half precision."""
    return option("nearest", "of half-precision weights", choices=ROUNDINGS)


def weight_bits() -> Any:
    """Whether the weights themselves are stored in few bits while training."""
    meaning = "of the projected weights while training: 8; none as they are"
    return option(None, meaning, at_least=8, at_most=8)


def layers() -> Any:
    """Whose gradients are projected."""
    return option("auto", "which weights: auto, or globs over names, comma between")


def exclude() -> Any:
    """Whose gradients are not."""
    return option((), "globs over names that are trained unprojected")
