"""Showing a run: live in a terminal, a line per epoch elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rankwise.cli import tables
from rankwise.cli.screen import console
from rankwise.ranks import Plan
from rankwise.reports.decisions import in_words
from rankwise.reports.words import short
from rankwise.training import Recipe, Result
from rankwise.training.report import Progress as Position
from rankwise.training.report import Silent, Switch
from rankwise.training.task import TASKS, Score


class Plain(Silent):
    """Lines that a log can keep."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._epochs = 0
        self._task = "classification"

    def start(self, recipe: Recipe, out: Path, facts: Mapping[str, Any]) -> None:
        self._epochs = recipe.epochs
        hardware = facts["hardware"]
        self._task = facts["data"]["task"]
        counts = facts["data"][f"{TASKS[self._task].unit}s"]
        again = f", resumed at step {facts['step']}" if facts["event"] == "resume" else ""
        self.say(f"{facts['method']}", style="bold")
        self.say(
            f"{recipe.model} on {facts['data']['name']} ({counts[0]:,} train, {counts[1]:,} "
            f"validation, {counts[2]:,} test), seed {recipe.seed}{again}"
        )
        self.say(
            f"{hardware['processor']}, device {hardware['device']}, {hardware['threads']} "
            f"thread(s), {hardware['workers']} worker(s); records in {out}",
            style="dim",
        )

    def plan(self, plan: Plan) -> None:
        self.say()
        self.say(tables.plan(plan))
        self.say()

    def epoch(self, record: Mapping[str, Any]) -> None:
        step_ms = record["step_ms"]
        score = Score(record["validation_loss"], record["validation_accuracy"])
        self.say(
            f"epoch {record['epoch']:>3}/{self._epochs}  loss {record['loss']:.4f}  "
            f"validation loss {score.loss:.4f}  {TASKS[self._task].describe(score):<15}  "
            f"step {step_ms or 0:.1f} ms  {record['seconds']:.0f} s"
        )

    def decision(self, event: Mapping[str, Any]) -> None:
        words = in_words(dict(event))
        if words:
            self.say(words, style="cyan")

    def switch(self, switch: Switch) -> None:
        self.say()
        for line in describe(switch):
            self.say(line, style="bold green")
        self.say()

    def finish(self, result: Result) -> None:
        score = Score(result.test_loss, result.test_accuracy, result.test_bleu)
        self.say(
            f"test {TASKS[result.task].describe(score)} (loss {result.test_loss:.4f}) after "
            f"{result.epochs} epochs, {result.steps} steps, {result.seconds:.1f} s; parameters "
            f"{result.parameters[0]:,} stored, {result.parameters[1]:,} trainable "
            f"(dense {result.dense_parameters[0]:,})",
            style="bold",
        )

    def close(self) -> None:
        """Leave the terminal as it was; called however the run ended."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def say(self, content: Any = "", *, style: str | None = None) -> None:
        """Print above the progress display, if there is one."""
        if not self.quiet:
            console.print(content, style=style, markup=False)


class Live(Plain):
    """The same, with a line that moves."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Progress | None = None

    def loading(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("reading images"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(compact=True),
                console=console,
                transient=True,
            )
            self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done)
        if done == total:
            self.close()

    def step(self, progress: Position) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
                BarColumn(bar_width=24),
                TextColumn("step {task.completed}/{task.total}"),
                TextColumn("loss {task.fields[loss]:.4f}"),
                TextColumn("lr {task.fields[lr]:.4f}"),
                TextColumn("{task.fields[rate]:.0f} {task.fields[unit]}s/s"),
                TimeRemainingColumn(compact=True),
                console=console,
                transient=True,
            )
            self._bar.add_task("", total=progress.steps, **_fields(progress))
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=progress.step, **_fields(progress))

    def finish(self, result: Result) -> None:
        self.close()
        super().finish(result)

    def close(self) -> None:
        """Take the moving line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _fields(progress: Position) -> dict[str, Any]:
    return {
        "epoch": progress.epoch,
        "epochs": progress.epochs,
        "loss": progress.loss,
        "lr": progress.lr,
        "rate": progress.units_per_second,
        "unit": progress.unit,
    }


def describe(switch: Switch) -> list[str]:
    """The lines of a switch: when, what it did to the loss, to the size, to the step."""
    event = switch.event
    before, after = event["parameters"]
    lines = [
        f"switch after epoch {switch.epoch:.2f} (step {event['step']}): {event['method']}, "
        f"{event['layers']} layer{'' if event['layers'] == 1 else 's'} low-rank, "
        f"in {event['seconds']:.2f} s"
    ]
    if event["loss_before"] is not None:
        lines.append(f"  validation loss  {event['loss_before']:.4f} -> {event['loss_after']:.4f}")
        if event.get("loss_calibrated") is not None:
            lines.append(
                f"                   -> {event['loss_calibrated']:.4f} with BatchNorm's running "
                "statistics gathered anew"
            )
        elif event.get("running_statistics"):
            lines.append(
                "                   (by the dense layers' BatchNorm statistics, which now adapt)"
            )
    lines.append(f"  parameters       {short(before)} -> {short(after)} ({after / before:.0%})")
    if switch.step_ms_before and switch.step_ms_after:
        lines.append(
            f"  training step    {switch.step_ms_before:.1f} -> {switch.step_ms_after:.1f} ms "
            f"({switch.step_ms_after / switch.step_ms_before:.0%})"
        )
    moments = event["moments"]
    lines.append(
        f"  optimizer        {moments['carried']} carried, {moments['fresh']} fresh moments"
    )
    return lines
