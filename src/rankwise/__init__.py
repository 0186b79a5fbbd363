"""Low-rank training for PyTorch: low-rank weights and gradients behind one small interface."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise import errors, layers, linalg, ranks
    from rankwise.checkpoint import load, methods_state, restore_methods, save, states_by_weight
    from rankwise.closing import to_dense
    from rankwise.integrations.peft import export_peft, import_peft
    from rankwise.method import Change, Context, Method
    from rankwise.methods import (
        LTE,
        METHODS,
        SIFD,
        AdaLoRA,
        Apollo,
        ApolloMini,
        Cuttlefish,
        Dense,
        Dion,
        FactorDecay,
        Factorized,
        Fira,
        Frugal,
        GaLore,
        LDAdam,
        LoRA,
        LoRAPlus,
        MultiHeadGaLore,
        Pufferfish,
        QGaLore,
        ReLoRA,
        Tracked,
    )
    from rankwise.optim.decay import frobenius_decay_
    from rankwise.optim.rebind import rebind
    from rankwise.ranks import Plan, factorize, plan
    from rankwise.run import Run, start
    from rankwise.structure import impose_plan, read_plan
    from rankwise.updates import adapt

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
    "AdaLoRA": "rankwise.methods",
    "Apollo": "rankwise.methods",
    "ApolloMini": "rankwise.methods",
    "Cuttlefish": "rankwise.methods",
    "Dense": "rankwise.methods",
    "Dion": "rankwise.methods",
    "FactorDecay": "rankwise.methods",
    "Factorized": "rankwise.methods",
    "Fira": "rankwise.methods",
    "Frugal": "rankwise.methods",
    "GaLore": "rankwise.methods",
    "LDAdam": "rankwise.methods",
    "LTE": "rankwise.methods",
    "LoRA": "rankwise.methods",
    "LoRAPlus": "rankwise.methods",
    "MultiHeadGaLore": "rankwise.methods",
    "Pufferfish": "rankwise.methods",
    "QGaLore": "rankwise.methods",
    "ReLoRA": "rankwise.methods",
    "SIFD": "rankwise.methods",
    "Tracked": "rankwise.methods",
    "frobenius_decay_": "rankwise.optim.decay",
    "rebind": "rankwise.optim.rebind",
    "Plan": "rankwise.ranks",
    "factorize": "rankwise.ranks",
    "plan": "rankwise.ranks",
    "Run": "rankwise.run",
    "start": "rankwise.run",
    "adapt": "rankwise.updates",
    "load": "rankwise.checkpoint",
    "methods_state": "rankwise.checkpoint",
    "restore_methods": "rankwise.checkpoint",
    "save": "rankwise.checkpoint",
    "states_by_weight": "rankwise.checkpoint",
    "impose_plan": "rankwise.structure",
    "read_plan": "rankwise.structure",
    "to_dense": "rankwise.closing",
    "export_peft": "rankwise.integrations.peft",
    "import_peft": "rankwise.integrations.peft",
}

__all__ = [
    "LTE",
    "METHODS",
    "SIFD",
    "AdaLoRA",
    "Apollo",
    "ApolloMini",
    "Change",
    "Context",
    "Cuttlefish",
    "Dense",
    "Dion",
    "FactorDecay",
    "Factorized",
    "Fira",
    "Frugal",
    "GaLore",
    "LDAdam",
    "LoRA",
    "LoRAPlus",
    "Method",
    "MultiHeadGaLore",
    "Plan",
    "Pufferfish",
    "QGaLore",
    "ReLoRA",
    "Run",
    "Tracked",
    "adapt",
    "errors",
    "export_peft",
    "factorize",
    "frobenius_decay_",
    "import_peft",
    "impose_plan",
    "layers",
    "linalg",
    "load",
    "methods_state",
    "plan",
    "ranks",
    "read_plan",
    "rebind",
    "restore_methods",
    "save",
    "start",
    "states_by_weight",
    "to_dense",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rankwise' has no attribute '{name}'")
    home = importlib.import_module(_HOME[name])
    return home if _HOME[name] == f"rankwise.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
