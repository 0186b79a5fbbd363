"""Low-rank training for PyTorch: low-rank weights behind one small interface."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise import errors, layers, linalg, ranks
    from rankwise.checkpoint import load, save
    from rankwise.method import Change, Context, Method
    from rankwise.methods import METHODS, Dense, Factorized, Pufferfish
    from rankwise.optim.rebind import rebind
    from rankwise.ranks import Plan, factorize, plan
    from rankwise.run import Run, start
    from rankwise.structure import impose_plan, read_plan
    from rankwise.surgery import to_dense

__version__ = "0.1.0"

# Loaded at first use: `rankwise --help` must not wait for torch.
_HOME = {
    "errors": "rankwise.errors",
    "layers": "rankwise.layers",
    "linalg": "rankwise.linalg",
    "ranks": "rankwise.ranks",
    "Change": "rankwise.method",
    "Context": "rankwise.method",
    "Method": "rankwise.method",
    "METHODS": "rankwise.methods",
    "Dense": "rankwise.methods",
    "Factorized": "rankwise.methods",
    "Pufferfish": "rankwise.methods",
    "rebind": "rankwise.optim.rebind",
    "Plan": "rankwise.ranks",
    "factorize": "rankwise.ranks",
    "plan": "rankwise.ranks",
    "Run": "rankwise.run",
    "start": "rankwise.run",
    "load": "rankwise.checkpoint",
    "save": "rankwise.checkpoint",
    "impose_plan": "rankwise.structure",
    "read_plan": "rankwise.structure",
    "to_dense": "rankwise.surgery",
}

__all__ = [
    "METHODS",
    "Change",
    "Context",
    "Dense",
    "Factorized",
    "Method",
    "Plan",
    "Pufferfish",
    "Run",
    "errors",
    "factorize",
    "impose_plan",
    "layers",
    "linalg",
    "load",
    "plan",
    "ranks",
    "read_plan",
    "rebind",
    "save",
    "start",
    "to_dense",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rankwise' has no attribute '{name}'")
    home = importlib.import_module(_HOME[name])
    return home if _HOME[name] == f"rankwise.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
