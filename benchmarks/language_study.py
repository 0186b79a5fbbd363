"""Loss on real text at equal tokens, learning rates tuned for every row: what studies share.

A small LLaMA (width 128, 4 layers; `llama-tiny`) reads bytes in windows of 64. Every row is tuned
by itself: learning rates a factor of 2 apart, on the validation split, with seed 0; the grid grows
until its best value is not at its edge. Then the seeds 0, 1, 2 are trained at that rate, and their
loss on the test split is the figure. All have the same windows in the same order, AdamW as the base
but for Muon's row, warm-up and cosine to zero, clipping at norm 1, no decay.

The record has a line a run. A second call goes on where it ends; with --table it only reads.
`gradient_study.py` and `update_study.py` say which rows.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import rankwise
from rankwise import data, models
from rankwise.methods import METHODS
from rankwise.training.task import evaluate
from run_record import RESULTS, SEEDS, RunRecord, facts, spread

BATCH, CONTEXT, STEPS, WARMUP = 8, 64, 400, 40
VALIDATION_TOKENS = 65_536
CURVE = 50  # steps that a point of the training curve is the mean of


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: of the registry, "muon" for torch's Muon on the matrices, or "frozen" for blocks
            whose matrices stay as they were drawn.
        options: of the method.
        lr: the learning rates that tuning begins with.
        others: factor on the rate of all but the blocks' matrices. GaLore's scale of 1/4 acts on
            its matrices alone, so the other parameters move 4 times as far as under AdamW.
        beside: further methods of the run, name -> options.
    """

    method: str
    lr: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    others: float = 1.0
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def rates(middle: float) -> tuple[float, ...]:
    """Where a grid begins."""
    return (middle / 2, middle, middle * 2)


def schedule(step: int) -> float:
    """Factor on the rate at a step, from 0: a linear rise, then half a cosine to zero."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


def adamw(parameters: Any, lr: float) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


class Trainer:
    """A model with its row's optimizers, and what they need at every step."""

    def __init__(self, row: Row, model: nn.Module, lr: float, seed: int) -> None:
        self.model = model
        self.schedulers: list[LambdaLR] = []
        self.run: rankwise.Run | None = None
        inner = [p for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2]
        chosen = set(inner)
        others = [p for p in model.parameters() if p not in chosen]
        if row.method == "muon":
            # Its update has the root mean square of AdamW's, so that one rate serves both.
            muon = torch.optim.Muon(inner, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self.optimizers: list[Optimizer] = [muon, adamw(others, lr)]
            return
        if row.method == "frozen":
            self.optimizers = [adamw(others, lr)]
            return
        groups = [{"params": inner}, {"params": others, "lr": lr * row.others}]
        self.optimizers = [adamw(groups, lr)]
        named = {row.method: row.options, **row.beside}
        method = [METHODS[name](**options) for name, options in named.items()]
        sample = models.sample("llama-tiny", input_shape=(CONTEXT,))
        self.run = rankwise.start(
            model, method, self.optimizers[0], total_steps=STEPS, sample=sample, seed=seed
        )

    def step(self, inputs: Any, targets: torch.Tensor) -> float:
        if not self.schedulers:  # a method has added its parameter groups by now
            self.schedulers = [LambdaLR(each, schedule) for each in self.optimizers]
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        held = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(held, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()
        return float(loss.detach())

    def state_numbers(self) -> int:
        """Numbers that the optimizers and methods keep beside the weights."""
        held = [v for o in self.optimizers for state in o.state.values() for v in state.values()]
        kept = [t for t in held if isinstance(t, torch.Tensor) and t.dim() > 0]
        if self.run is not None:
            kept += [t for method in self.run.methods for t in _tensors(method.state_dict())]
        return sum(t.numel() for t in kept)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    # A projected matrix's own "weight", stored in 8 bits, is no state beside it.
    items = (
        [v for key, v in value.items() if key != "weight"] if isinstance(value, Mapping) else value
    )
    if isinstance(value, (Mapping, list, tuple)):
        return [tensor for item in items for tensor in _tensors(item)]
    return []


def train(row: Row, splits: data.TextSplits, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """One run; a loss above 20, or none at all, ends it early as diverged."""
    began, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    model = models.build("llama-tiny", classes=len(splits.classes), input_shape=(CONTEXT,))
    trainer = Trainer(row, model, lr, seed)
    losses: list[float] = []
    per_epoch = data.steps_per_epoch(splits.train, BATCH)
    while len(losses) < steps:
        epoch, start = divmod(len(losses), per_epoch)
        windows = data.batches(splits.train, batch_size=BATCH, seed=seed, epoch=epoch, start=start)
        for inputs, targets in windows:
            losses.append(trainer.step(inputs, targets))
            if len(losses) == steps or not losses[-1] < 20:
                break
        if not losses[-1] < 20:
            break
    diverged = len(losses) < steps
    score = partial(evaluate, model, move=lambda x: x, precision=torch.no_grad, classes=256)
    units = None if steps == STEPS else CONTEXT
    validation = score(split=splits.validation, units=units or VALIDATION_TOKENS).loss
    return {
        "steps": len(losses),
        "tokens": len(losses) * BATCH * CONTEXT,
        "diverged": diverged,
        "validation": None if diverged else validation,
        "test": None if diverged else score(split=splits.test, units=units).loss,
        "curve": [round(statistics.fmean(part), 4) for part in _parts(losses)],
        "state_numbers": trainer.state_numbers(),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def _parts(losses: Sequence[float]) -> list[Sequence[float]]:
    return [losses[i : i + CURVE] for i in range(0, len(losses), CURVE)]


def tune(
    name: str,
    row: Row,
    record: RunRecord,
    run: Callable[[float, int], dict[str, Any]],
    *,
    grow: bool = True,
) -> float:
    """The best rate for seed 0, on a grid that grows until it is inside."""
    grid = {lr: record.once(name, lr, 0, partial(run, lr, 0)) for lr in row.lr}
    while True:
        best = min(grid, key=lambda lr: grid[lr])
        too_high = best == min(grid) or math.isinf(grid[best])  # where all diverged, say
        beyond = min(grid) / 2 if too_high else best * 2 if best == max(grid) else None
        if beyond is None or not grow:
            return best
        grid[beyond] = record.once(name, beyond, 0, partial(run, beyond, 0))


def table(record: RunRecord, names: Sequence[str]) -> None:
    """Test loss over the seeds at each row's best rate, the difference to AdamW, and the grid."""
    dense = {run["seed"]: run["test"] for run in record.chosen("AdamW")}
    print(f"{'row':<24}{'lr':>9}{'test loss':>18}{'- AdamW':>18}{'state':>8}  validation by lr")
    for name in names:
        runs = record.chosen(name)
        tested = [r["test"] for r in runs if r["test"] is not None]
        if not tested:
            continue
        gaps = [r["test"] - dense[r["seed"]] for r in runs if r["seed"] in dense and r["test"]]
        state = runs[0]["state_numbers"] / 1e6
        figures = f"{spread(tested, 4):>18}{spread(gaps, 4):>18}{state:>7.2f}M"
        print(f"{name:<24}{record.best(name):>9g}{figures}  {record.grid(name, 3)}")


def _existing(name: str) -> Path:
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"there is no record {name}")
    return Path(name)


def arguments(rows: Mapping[str, Row], about: str, argv: Sequence[str] | None) -> Any:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--data", default="shakespeare", help="text:FILE, or shakespeare")
    parser.add_argument("--rows", nargs="+", choices=list(rows), default=list(rows), metavar="NAME")
    parser.add_argument("--at", type=float, help="every seed at this rate, beside the tuned one")
    parser.add_argument("--record", type=Path, help="lines of earlier runs, and of these")
    parser.add_argument("--earlier", type=_existing, nargs="+", default=[], help="to read alone")
    parser.add_argument("--table", action="store_true", help="show what is recorded, train nothing")
    parser.add_argument("--smoke", action="store_true", help="few steps: seconds, not an hour")
    return parser.parse_args(argv)


def main(name: str, rows: Mapping[str, Row], about: str, argv: Sequence[str] | None = None) -> int:
    """Run a study: tune every row, train it with every seed, print the table.

    Args:
        name: of the record, where none is given.
        rows: what is compared, by name; one of them is "AdamW".
        about: the study's docstring.
        argv: the command line.
    """
    options = arguments(rows, about, argv)
    torch.set_num_threads(1)
    splits = data.load_text(options.data, context=CONTEXT)
    steps = 3 if options.smoke else STEPS
    settings = {
        "steps": steps,
        "batch": BATCH,
        "context": CONTEXT,
        "checksum": splits.checksum,
    }
    path = options.record or RESULTS / f"{name}.jsonl"
    record = RunRecord(path, facts(settings, data=splits.name), loss="validation")
    for earlier in options.earlier:
        record.runs |= RunRecord(earlier, facts(settings), loss="validation").runs
    for label in () if options.table else options.rows:
        row = rows[label]

        def run(lr: float, seed: int, row: Row = row) -> dict[str, Any]:
            what = {"method": row.method, "options": dict(row.options), "beside": dict(row.beside)}
            return what | train(row, splits, lr, seed, steps)

        best = tune(label, row, record, run, grow=not options.smoke)
        for lr in (best, options.at or best):
            for seed in SEEDS:
                record.once(label, lr, seed, partial(run, lr, seed))
    table(record, list(rows))
    return 0
