"""The one voice of a run: worker 0's records and reporter."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rankwise import checkpoint, data, distributed
from rankwise.method import Method
from rankwise.run import Run
from rankwise.training import environment, records
from rankwise.training.recipe import Recipe
from rankwise.training.report import Reporter, Silent


class Journal:
    """Worker 0's records and reporter; the other workers write and show nothing."""

    def __init__(self, out: Path, report: Reporter | None) -> None:
        leads = distributed.worker() == 0
        self.out = out
        self.report: Reporter = report if leads and report is not None else Silent()
        self._leads = leads
        self._file: records.Records | None = None
        self._early: list[dict[str, Any]] = []

    def record(self, event: str, **values: Any) -> dict[str, Any]:
        """Write a line, and return it as written; before `start` it is kept until then."""
        record = {"event": event, **values}
        if self._file is not None:
            return self._file.append(**record)
        if self._leads:
            self._early.append(record)
        return record

    def start(
        self,
        recipe: Recipe,
        splits: data.DataSet,
        device: torch.device,
        methods: Sequence[Method],
        saved: checkpoint.Checkpoint | None,
        run: Run,
        begun: Sequence[dict[str, Any]],
    ) -> None:
        """Open the records with the first line of a run, or of its continuation; show its plan.

        Called once everything is known to fit, so that a mistake leaves no folder behind.
        """
        facts: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "method": " + ".join(map(repr, methods)),
            "versions": environment.versions(),
            "hardware": environment.hardware(device, distributed.workers()),
            "commit": environment.commit(),
            "data": {
                "name": splits.name,
                "task": splits.task,
                "checksum": splits.checksum,
                f"{splits.train.unit}s": [
                    len(part) * part.units
                    for part in (splits.train, splits.validation, splits.test)
                ],
            },
        }
        if isinstance(splits, data.PairSplits):
            facts["data"]["pairs_left_out"] = splits.left_out
        if self._leads:
            self._file = records.Records(self.out)
        if saved is None:
            facts = self.record("start", recipe=recipe.as_dict(), **facts)
        else:
            facts = self.record("resume", step=saved.step, **facts)
        for record in (*begun, *self._early):
            self.record(**record)
        self._early.clear()
        self.report.start(recipe, self.out, facts)
        if run.plan is not None:
            self.report.plan(run.plan)
        for event in (*begun, *run.events):
            if event["event"] in ("weights", "updates"):  # which no plan shows
                self.report.decision(event)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            self._file.__exit__(*error)
