"""Measured times kept on this machine, so that the same layer is timed once."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankwise.cache_home import cache_home
from rankwise.errors import PlanError
from rankwise.ranks import entries
from rankwise.ranks.gains.stopwatch import Times

logger = logging.getLogger(__name__)

FORMAT = "rankwise gain cache 3"


def default_place() -> Path:
    """gains.json under $XDG_CACHE_HOME/rankwise, or ~/.cache/rankwise."""
    return cache_home() / "gains.json"


class GainCache:
    """A JSON file of times by key; without a path it only remembers within itself.

    A file that cannot be read or written costs a warning and the time to measure anew, never the
    run. Writers merge what the others have written, and replace the file in one step.

    Args:
        path: the file, or None for none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, Times] = self._read()

    def get(self, key: str) -> Times | None:
        """What was measured under this key, here or by an earlier process."""
        return self._known.get(key)

    def put(self, key: str, times: Times) -> None:
        """Keep a measurement, on the disk too."""
        self._known[key] = times
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                # What others have measured since is newer than what was read at the beginning.
                self._known |= {**self._read(quiet=True), key: times}
                entries.write(self.path, json.dumps(_to_data(self._known), indent=1))
        except OSError as error:
            logger.warning(
                "measured gains are not kept for later runs: %s cannot be written (%s)",
                self.path,
                error.strerror or error,
            )
            self.path = None

    def _read(self, *, quiet: bool = False) -> dict[str, Times]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            return _from_data(entries.read(self.path, "it"))
        except PlanError as error:
            if not quiet:
                logger.warning(
                    "measured gains of earlier runs are ignored, and will be replaced: %s: %s",
                    self.path,
                    error,
                )
            return {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, where the system has locks; the lock ends with its process."""
    try:
        import fcntl
    except ImportError:  # Windows: writers at the same moment may lose a time, never the file
        yield
        return
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _to_data(known: Mapping[str, Times]) -> dict[str, Any]:
    times = {
        key: {
            "dense_ms": each.dense,
            "low_rank_ms": {str(rank): ms for rank, ms in each.low_rank.items()},
            "spread": each.spread,
        }
        for key, each in known.items()
    }
    return {"format": FORMAT, "times": times}


_ENTRY = ("dense_ms", "low_rank_ms", "spread")


def _from_data(data: Any) -> dict[str, Times]:
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise PlanError(f"this is not of the format {FORMAT!r}")
    entries.check_keys("the cache", data, ("format", "times"))
    known = {}
    for key, entry in entries.mapping("times", data["times"]).items():
        entries.check_keys(key, entries.mapping(key, entry), _ENTRY)
        low = entries.times_by_rank(f"{key}: low_rank_ms", entry["low_rank_ms"])
        dense = entries.positive(f"{key}: dense_ms", entry["dense_ms"])
        known[key] = Times(dense, low, entries.share(f"{key}: spread", entry["spread"]))
    return known
