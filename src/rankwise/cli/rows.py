"""Rows of the field's results table: the forms in which each of its networks is trained.

Imports no torch: the flags' help names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One form.

    Attributes:
        method: as a recipe names it.
        options: its own, before those of the recipe.
        inherits: takes the recipe's other options of the method, ranks and layers above all.
        hybrid: takes the recipe's `keep_first`, too: so many first layers stay dense.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inherits: bool = True
    hybrid: bool = False


def _decayed(kind: str, *, hybrid: bool = False) -> Row:
    return Row("factorized+factor-decay", {"decay": kind}, hybrid=hybrid)


# Without a regulariser factors have no decay at all; "l2" is the weight decay that an optimizer
# would give them. The strength of each is the recipe's weight decay (--method.strength: another).
NO_DECAY = {"decay": "l2", "strength": 0.0}
ROWS: Mapping[str, Row] = {
    "dense": Row("dense"),
    "low-rank": Row("factorized+factor-decay", NO_DECAY),
    "frobenius": _decayed("frobenius"),
    "kronecker": _decayed("kronecker"),
    "l2": _decayed("l2"),
    "frobenius+kronecker": _decayed("frobenius+kronecker"),
    "frobenius+l2": _decayed("frobenius+l2"),
    "kronecker+l2": _decayed("kronecker+l2"),
    "hybrid": Row("factorized+factor-decay", NO_DECAY, hybrid=True),
    "hybrid+frobenius": _decayed("frobenius", hybrid=True),
    "pufferfish": Row("pufferfish", hybrid=True),
    "cuttlefish": Row("cuttlefish", inherits=False),
}
