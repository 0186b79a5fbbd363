"""What the studies share: resumable rows, training with a curve from step 0, tables and plots.

A row is one run: a JSON line that names its setting and seed, its curve and where it comes from.
Rows are appended as runs end; a study that is started again does only those that are missing.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

import rankwise
from rankwise import data
from rankwise.layers import LowRankLayer

HERE = Path(__file__).parent
RESULTS, PLOTS = HERE / "results", HERE.parent / "docs" / "studies"


class Rows:
    """The rows of a study in a file of JSON lines.

    Args:
        path: the file; made if missing.
        key: fields that tell one run from another.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path, self.key = path, tuple(key)
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.strip()]
        self._done = {self._of(row) for row in self.rows}

    def _of(self, row: dict[str, Any]) -> str:
        return json.dumps([row.get(name) for name in self.key])

    def missing(self, setting: dict[str, Any]) -> bool:
        """Whether a run has still to be done."""
        return self._of(setting) not in self._done

    def find(self, setting: dict[str, Any]) -> dict[str, Any]:
        """The row of a run that has been done."""
        return next(row for row in self.rows if self._of(row) == self._of(setting))

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished run, in memory and in the file."""
        row = {**row, "commit": _commit(), "torch": torch.__version__}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self._done.add(self._of(row))


def _commit() -> str:
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@torch.no_grad()
def measure(model: nn.Module, split: data.Split) -> tuple[float, float | None]:
    """Accuracy and mean loss (None if it is no number) on a split, in evaluation mode."""
    model.eval()
    parts = zip(split.images.split(500), split.labels.split(500), strict=True)
    place = next(model.parameters()).device
    right, loss = 0, 0.0
    for images, labels in ((x.to(place), y.to(place)) for x, y in parts):
        scores = model(images)
        right += int((scores.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(scores, labels, reduction="sum"))
    model.train()
    return right / len(split), loss / len(split) if math.isfinite(loss) else None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long to train, and when to look.

    Attributes:
        steps: optimizer steps in all.
        batch: images in a batch.
        every: steps between two looks at the validation split; step 0 and the last count too.
    """

    steps: int
    batch: int
    every: int


def train(
    model: nn.Module,
    method: Any,
    make: Callable[[nn.Module], Optimizer],
    splits: data.Splits,
    schedule: Schedule,
    seed: int,
    decay_rate: Callable[[Optimizer], Any] | None = None,
) -> dict[str, Any]:
    """Train a model by a method and follow its validation accuracy.

    Args:
        model: dense and freshly built, on the device to train on.
        method: of rankwise.
        make: the optimizer, from the model.
        splits: the data; the test part is looked at once, after the last step.
        schedule: lengths.
        seed: of the method and of the batches.
        decay_rate: a learning-rate scheduler, from the optimizer.

    Returns:
        Curves, test accuracy, stored parameters, the step of the first switch, the ranks at the
        end, and seconds of processor time.
    """
    began, place = time.process_time(), next(model.parameters()).device
    per_epoch = data.steps_per_epoch(splits.train, schedule.batch)
    run = rankwise.start(
        model,
        method,
        make(model),
        seed=seed,
        total_steps=schedule.steps,
        steps_per_epoch=per_epoch,
    )
    scheduler = None if decay_rate is None else decay_rate(run.optimizer)
    looks, accuracies, losses = [0], *([value] for value in measure(run.bare, splits.validation))
    while run.step < schedule.steps:
        epoch = run.step // per_epoch
        for x, y in data.batches(splits.train, batch_size=schedule.batch, seed=seed, epoch=epoch):
            run.optimizer.zero_grad()
            images = cast(torch.Tensor, x).to(place)
            F.cross_entropy(run.model(images), y.to(place)).backward()
            run.optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if run.step % schedule.every == 0 or run.step == schedule.steps:
                accuracy, loss = measure(run.bare, splits.validation)
                looks.append(run.step)
                accuracies.append(accuracy)
                losses.append(loss)
            if run.step == schedule.steps:
                break
    run.finish()
    return {
        "steps": looks,
        "accuracy": accuracies,
        "loss": losses,
        "test": measure(run.bare, splits.test)[0],
        "parameters": sum(p.numel() for p in run.bare.parameters()),
        "seconds": round(time.process_time() - began, 1),
        "switch": next((e["step"] for e in run.events if e["event"] == "switch"), None),
        "ranks": {n: m.rank for n, m in run.bare.named_modules() if isinstance(m, LowRankLayer)},
        "data": splits.name,
        "checksum": splits.checksum,
    }


def spread(values: Iterable[float], scale: float = 100.0, digits: int = 1) -> str:
    """Mean and standard deviation over seeds, in per cent unless another scale is given."""
    values = [scale * value for value in values]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def band(axes: Any, runs: Sequence[dict[str, Any]], **style: Any) -> None:
    """Draw the mean accuracy of runs over steps, and a band of one standard deviation."""
    curves = torch.tensor([run["accuracy"] for run in runs]) * 100
    steps, mean = runs[0]["steps"], curves.mean(0)
    spread = curves.std(0) if len(runs) > 1 else torch.zeros_like(mean)
    (line,) = axes.plot(steps, mean, **style)
    axes.fill_between(steps, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, lw=0)


def one_thread() -> None:
    """Studies run on one thread, so that a run's result does not depend on the machine's cores."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
