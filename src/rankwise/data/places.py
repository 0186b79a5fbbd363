"""Where data sets are looked for: published ones in folders, others inside packages."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from rankwise.errors import DataError


def roots() -> list[Path]:
    """Folders that hold data sets: $RANKWISE_DATA, rankwise's cache, Debian's, ./data."""
    own = os.environ.get("RANKWISE_DATA")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [
        *([Path(own).expanduser()] if own else []),
        Path(cache, "rankwise", "data"),
        Path("/usr/share/datasets"),
        Path("data"),
    ]


def places(names: Sequence[str]) -> list[Path]:
    """Paths of a set below every root, in the order in which they are tried.

    Args:
        names: what its folder or file may be called.
    """
    return [root / name for root in roots() for name in names]


def found(names: Sequence[str]) -> Path | None:
    """The first of these paths that exists."""
    return next((path for path in places(names) if path.exists()), None)


def installed(package: str) -> Path | None:
    """The folder of an installed package, for the data inside.

    It is not imported: its modules may ask for others, or be of another age.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def missing(name: str, names: Sequence[str], obtain: str) -> DataError:
    """The error for a set that is in none of its places.

    Args:
        name: of the set.
        names: what its folder or file may be called.
        obtain: what to do.
    """
    where = ", ".join(str(root) for root in roots())
    return DataError(
        f"{name}: none of {', '.join(names)} was found in {where}; {obtain}; then put it into one "
        f"of these folders, or name it: {name}:PATH, or RANKWISE_DATA in the environment"
    )
