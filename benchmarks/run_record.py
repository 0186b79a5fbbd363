"""What a study has run: a line a run, known by its row, learning rate and seed.

A row is tuned with seed 0, by validation loss, and then trained with every seed at its best rate. A
study that is called again goes on where its record ends. The first line says how it was measured,
and a record of other settings is refused.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rankwise.training import environment

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)


class RunRecord:
    """The lines of a record, read at the start and added to after every run.

    Attributes:
        runs: (row, learning rate, seed) -> what is known of the run.
        others: lines about something else than a run.
    """

    def __init__(
        self,
        path: Path,
        facts: Mapping[str, Any] | None,
        *,
        loss: str = "validation_loss",
        rate_of: Mapping[str, str] | None = None,
    ) -> None:
        """Read the file, or begin it.

        Args:
            path: of the record.
            facts: its first line, with `settings`; None: whatever they were, it is only read.
            loss: the entry of a run that tunes; None in a run that diverged.
            rate_of: rows that are trained at the best rate of another one.
        """
        self.path, self.loss, self.rate_of = path, loss, rate_of or {}
        self.runs: dict[tuple[str, float, int], dict[str, Any]] = {}
        self.others: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.exists() else ():
            entry = json.loads(line)
            if "row" in entry:
                self.runs[entry["row"], entry["lr"], entry["seed"]] = entry
            elif "settings" not in entry:
                self.others.append(entry)
            elif facts is not None and entry["settings"] != facts["settings"]:
                raise SystemExit(f"{path} was made with other settings; choose another --record")
        if facts is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(facts)

    def _write(self, entry: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def add(self, entry: dict[str, Any]) -> None:
        """Write down something else than a run."""
        self.others.append(entry)
        self._write(entry)

    def once(self, row: str, lr: float, seed: int, run: Callable[[], dict[str, Any]]) -> float:
        """The loss of a run: read, or trained and written down; infinite if it diverged."""
        key = (row, lr, seed)
        if key not in self.runs:
            self.runs[key] = {"row": row, "lr": lr, "seed": seed, **run()}
            self._write(self.runs[key])
            shown = f"validation {self.runs[key][self.loss]}"
            print(f"{row:<30} lr {lr:<8g} seed {seed}  {shown}", flush=True)
        found = self.runs[key][self.loss]
        return math.inf if found is None else found

    def tried(self, row: str) -> dict[float, float | None]:
        """The loss of seed 0 by learning rate, the lowest rate first; None where it diverged."""
        found = {
            lr: run[self.loss]
            for (name, lr, seed), run in self.runs.items()
            if (name, seed) == (row, 0)
        }
        return dict(sorted(found.items()))

    def grid(self, row: str, digits: int) -> str:
        """What was tried, in a line."""
        shown = {lr: "-" if v is None else f"{v:.{digits}f}" for lr, v in self.tried(row).items()}
        return "  ".join(f"{lr:g}: {loss}" for lr, loss in shown.items())

    def best(self, row: str) -> float | None:
        """The rate with the lowest loss; None where none is known."""
        tried = self.tried(self.rate_of.get(row, row))
        known = {lr: loss for lr, loss in tried.items() if loss is not None}
        return min(known, key=lambda lr: known[lr], default=None)

    def chosen(self, row: str) -> list[dict[str, Any]]:
        """A row's runs at its best rate, by seed."""
        rate = self.best(row)
        keys = [] if rate is None else [(row, rate, seed) for seed in SEEDS]
        return [self.runs[key] for key in keys if key in self.runs]


def facts(settings: Mapping[str, Any], **about: Any) -> dict[str, Any]:
    """The first line of a record: settings, which must stay the same, and where it was made."""
    return {
        "settings": settings,
        **about,
        "commit": environment.commit(),
        "versions": environment.versions(),
        "hardware": environment.hardware(torch.device("cpu"), 1),
    }


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation; the mean alone of one value, nothing of none."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
