"""The options that methods of low-rank weights share: meaning and range, written once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankwise.options import option
from rankwise.ranks.registry import RULE_HELP, as_rule

# Of methods that say which layers are low-rank.
CONFLICTS: Mapping[str, str] = {
    "low-rank weights": "both decide which layers are low-rank and at which rank"
}


def ranks(default: float | str = 0.25) -> Any:
    """The rank rule."""
    return option(default, RULE_HELP, parse=as_rule)


def layers() -> Any:
    """Which layers become low-rank."""
    return option("auto", "which layers: auto, or globs over names, comma between")


def exclude() -> Any:
    """Which do not."""
    return option((), "globs over names that stay dense")


def keep_first() -> Any:
    """The papers' K."""
    return option(1, "layers=auto: first layers that stay dense (K)", at_least=0)


def keep_last() -> Any:
    """The classifier, as a rule."""
    return option(1, "layers=auto: last layers that stay dense", at_least=0)


def core() -> Any:
    """The three-factor form."""
    return option(False, "three factors U C V")


def split() -> Any:
    """Factors for each part of a stacked weight."""
    return option(False, "factors for each part of a fused projection, each gate of an LSTM or GRU")


def separable() -> Any:
    """The separable form of a convolution."""
    return option(False, "2-D convolutions as 1 x k, then k x 1 (2105.01029)")
