"""Training from a recipe: typed options, a loop to read in one go, records of what happened."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rankwise.training.recipe import Recipe

if TYPE_CHECKING:
    from rankwise.training.interrupt import Interrupted
    from rankwise.training.loop import train
    from rankwise.training.report import Progress, Reporter, Result

__all__ = ["Interrupted", "Progress", "Recipe", "Reporter", "Result", "train"]

# Loaded at first use: the command line reads the recipe's fields without waiting for torch.
_HOME = {
    "Interrupted": "interrupt",
    "Progress": "report",
    "Reporter": "report",
    "Result": "report",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rankwise.training' has no attribute '{name}'")
    return getattr(importlib.import_module(f"rankwise.training.{_HOME[name]}"), name)
