"""The options that methods of low-rank updates share: meaning and range, written once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankwise.layers.adapted import DRAWS
from rankwise.options import option

PROVIDES = frozenset({"low-rank updates"})
CONFLICTS: Mapping[str, str] = {
    "low-rank updates": "both would freeze the same weights and open updates of them",
    "low-rank weights": "a switch looks for dense weights where this one has opened updates",
}
ONE_FACTOR: Mapping[str, str] = {
    "rates of the factors": "one factor is a basis that does not learn: nothing to balance"
}
ROUNDINGS = ("stochastic", "nearest")


def rank(default: int) -> Any:
    """R of an update."""
    return option(default, "rank of the update of each layer (of each head)", at_least=1)


def alpha(default: float) -> Any:
    """What the scale is computed from."""
    return option(default, "the update is scaled by alpha / rank", above=0)


def layers() -> Any:
    """Which layers are adapted."""
    return option("auto", "which layers: auto (all but embeddings and the last), or globs, comma")


def exclude() -> Any:
    """Which are not."""
    return option((), "globs over names that get no update")


def others(default: str) -> Any:
    """What else is trained."""
    return option(default, "other parameters that go on learning: all, none, or globs over names")


def draw(default: str = "kaiming") -> Any:
    """How V begins; U is zero."""
    return option(default, "how V is drawn; U begins at zero", choices=DRAWS)


def split() -> Any:
    """Fused projections."""
    return option(
        False, "updates of its own for each part of a fused qkv, each gate of an LSTM or GRU"
    )


def dtype() -> Any:
    """Of the heads."""
    return option("weight", "of the factors", choices=("weight", "float32"))


def rounding() -> Any:
    """How merges survive in half precision."""
    return option("stochastic", "of merges into half-precision weights", choices=ROUNDINGS)
