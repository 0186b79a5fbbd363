"""The registry: one line per method. Tests, command line and documentation read it."""

from __future__ import annotations

from rankwise.method import Method
from rankwise.methods.dense import Dense
from rankwise.methods.factorized import Factorized
from rankwise.methods.pufferfish import Pufferfish

METHODS: dict[str, type[Method]] = {
    "dense": Dense,
    "factorized": Factorized,
    "pufferfish": Pufferfish,
}

__all__ = ["METHODS", "Dense", "Factorized", "Pufferfish"]
