"""The tree of errors: what was asked, on what, why not, and what to do, in every message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankwiseError(Exception):
    """Root of everything this library raises on purpose."""


class SelectionError(RankwiseError, ValueError):
    """A layer selection matches nothing, or nothing that can be factorised."""


class PlanError(RankwiseError, ValueError):
    """A rank, ratio, budget or saved plan does not fit the model."""


class FactorizeError(RankwiseError, ValueError):
    """A layer's weight cannot be factorised: unsupported kind, non-finite values."""


class OptionError(RankwiseError, ValueError):
    """An option, method, model or data set is unknown, or its value is out of range."""


class CompositionError(RankwiseError, ValueError):
    """Two methods do not go together, or one lacks what it needs."""


class LifeCycleError(RankwiseError, RuntimeError):
    """The hooks were reached in an order in which they cannot work."""


class WorkersDisagreeError(RankwiseError, RuntimeError):
    """Data-parallel workers hold different structures or gradients."""


class CheckpointError(RankwiseError, RuntimeError):
    """A checkpoint cannot be written, or is corrupt, foreign, unsafe or of another run."""


class DataError(RankwiseError, ValueError):
    """A data set is missing or malformed."""


class NonFiniteLossError(RankwiseError, ArithmeticError):
    """Training met a loss that is not a number or infinite."""


def nearest(name: str, choices: Iterable[str], *, limit: int = 3) -> list[str]:
    """The valid names closest to a wrong one, best first; empty when none is close."""
    return difflib.get_close_matches(name, list(choices), n=limit, cutoff=0.5)


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """Say that `name` is no `kind`, name the closest valid one, and list what there is.

    Example:
        >>> unknown("method", "puferfish", ["dense", "pufferfish"])
        "unknown method 'puferfish'; did you mean 'pufferfish'? Known: dense, pufferfish"
    """
    known = sorted(choices)
    close = nearest(name, known, limit=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"unknown {kind} '{name}'; {hint}Known: {', '.join(known) or 'none'}"
