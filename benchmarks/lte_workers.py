"""One head for each worker against data-parallel dense training: bytes sent, loss at equal tokens.

    python benchmarks/lte_workers.py --data text:FILE [--record FILE.jsonl] [--table]

Two processes with one thread each, gloo, train a small LLaMA (`llama-tiny`) on bytes in windows of
64, eight windows a worker and step. Dense AdamW under DDP is the first row; the others train apart
and exchange factors every 10 steps. Every row has the same windows, warm-up, cosine and clipping
(of a worker's own gradients where workers train apart). Rates a factor of 2 apart are tuned on the
validation split with seed 0, until the best is inside the grid; the seeds 0, 1, 2 are then trained
at it, and read the test split. Bytes are what one worker hands to reductions and exchanges a step.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import rankwise
from language_study import CONTEXT, adamw
from rankwise import data, distributed, models
from rankwise.methods import METHODS
from rankwise.training import environment
from rankwise.training.task import evaluate
from run_record import RESULTS, SEEDS, spread

WORKERS, BATCH, STEPS, WARMUP, EVERY = 2, 16, 100, 10, 10
VALIDATION_TOKENS = 16_384


@dataclass(frozen=True)
class Row:
    """One line of the table: a method, its options, and the rates that tuning begins with."""

    method: str
    lr: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)


APART = {"mode": "workers", "merge_every": EVERY}
ROWS = {
    "AdamW, DDP": Row("dense", (1e-3, 2e-3, 4e-3)),
    "LTE, rank 32": Row("lte", (2e-3, 4e-3, 8e-3), {**APART, "rank": 32, "alpha": 64.0}),
    "multi-head GaLore, rank 32": Row(
        "multi-head-galore", (4e-3, 8e-3, 1.6e-2), {**APART, "rank": 32}
    ),
}


def schedule(step: int) -> float:
    """Factor on the rate at a step, from 0: a linear rise, then half a cosine to zero."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


class Counter:
    """DDP whose reduced bytes are counted."""

    def __init__(self) -> None:
        self.bytes = 0

    def wrap(self, model: nn.Module) -> nn.Module:
        wrapped = distributed.wrap(model)
        assert isinstance(wrapped, DistributedDataParallel)
        # Through a lambda, because DDP does not understand annotations kept as strings.
        wrapped.register_comm_hook(None, lambda group, bucket: self._reduce(group, bucket))
        return wrapped

    def _reduce(self, group: Any, bucket: Any) -> Any:
        self.bytes += bucket.buffer().nbytes
        return default_hooks.allreduce_hook(group, bucket)


def train(row: Row, splits: data.TextSplits, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """One run of all workers together; the losses are those of the merged model."""
    torch.manual_seed(seed)
    model = models.build("llama-tiny", classes=len(splits.classes), input_shape=(CONTEXT,))
    optimizer, counter = adamw(model.parameters(), lr), Counter()
    method: Any = METHODS[row.method](**row.options)
    run = rankwise.start(
        model,
        method,
        optimizer,
        sample=models.sample("llama-tiny", input_shape=(CONTEXT,)),
        wrap=None if method.trains_apart else counter.wrap,
        seed=seed,
    )
    curve: list[float] = []
    part: dict[str, Any] = {"worker": distributed.worker(), "workers": distributed.workers()}
    for inputs, targets in data.batches(splits.train, batch_size=BATCH, seed=seed, epoch=0, **part):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(len(curve))
        optimizer.zero_grad()
        loss = F.cross_entropy(run.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        curve.append(float(loss.detach()))
        if len(curve) == steps:
            break
    sent = method.updates.workers.sent if method.trains_apart else counter.bytes
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.finish()
    score = partial(evaluate, model, move=lambda x: x, precision=torch.no_grad, classes=256)
    units = VALIDATION_TOKENS if steps == STEPS else CONTEXT
    return {
        "steps": steps,
        "tokens": steps * BATCH * CONTEXT,
        "bytes_per_step": sent / steps,
        "trained": trained,
        "validation": distributed.share(score(split=splits.validation, units=units).loss),
        "test": distributed.share(score(split=splits.test, units=units).loss),
        "curve": [
            round(statistics.fmean(curve[i : i + EVERY]), 4) for i in range(0, len(curve), EVERY)
        ],
    }


class Record:
    """The runs of a file, known to all workers; worker 0 adds to it."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        first = distributed.worker() == 0
        if first and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(facts) + "\n")
        lines = distributed.share(path.read_text().splitlines() if first else [])
        entries = [json.loads(line) for line in lines]
        if entries[0]["settings"] != facts["settings"]:
            raise SystemExit(f"{path} was made with other settings; choose another --record")
        self.runs = {(e["row"], e["lr"], e["seed"]): e for e in entries[1:]}

    def get(self, name: str, lr: float, seed: int, run: Any) -> float:
        """Validation loss of a run: read, or trained and written down."""
        key = (name, lr, seed)
        if key not in self.runs:
            self.runs[key] = {"row": name, "lr": lr, "seed": seed, **run(lr, seed)}
            if distributed.worker() == 0:
                with self.path.open("a") as file:
                    file.write(json.dumps(self.runs[key]) + "\n")
                print(*key, self.runs[key]["validation"], flush=True)
        return self.runs[key]["validation"]

    def best(self, name: str) -> float:
        """The rate of the lowest validation loss with seed 0."""
        grid = {lr: e["validation"] for (n, lr, s), e in self.runs.items() if n == name and s == 0}
        return min(grid, key=lambda lr: grid[lr])


def tune(name: str, row: Row, record: Record, run: Any, *, grow: bool) -> float:
    """The best rate for seed 0, on a grid that grows until it is inside."""
    grid = list(row.lr if grow else row.lr[:1])
    while True:
        for lr in grid:
            record.get(name, lr, 0, run)
        best = record.best(name)
        if not grow or min(grid) < best < max(grid):
            return best
        grid.append(best / 2 if best == min(grid) else best * 2)


def work(rank: int, options: argparse.Namespace, folder: str) -> None:
    """One worker: all rows, tuning and seeds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORKERS)
    splits = data.load_text(options.data, context=CONTEXT)
    steps = EVERY if options.smoke else STEPS
    facts = {
        "settings": {"steps": steps, "batch": BATCH, "context": CONTEXT, "every": EVERY},
        "data": splits.name,
        "checksum": splits.checksum,
        "workers": WORKERS,
        "commit": environment.commit(),
        "versions": environment.versions(),
        "hardware": environment.hardware(torch.device("cpu"), 1),
    }
    record = Record(options.record, facts)
    for name in options.rows:

        def run(lr: float, seed: int, row: Row = ROWS[name]) -> dict[str, Any]:
            return train(row, splits, lr, seed, steps)

        best = tune(name, ROWS[name], record, run, grow=not options.smoke)
        for seed in SEEDS[: 1 if options.smoke else None]:
            record.get(name, best, seed, run)
    dist.destroy_process_group()


def table(record: Record) -> None:
    """Test loss over the seeds at each row's best rate, and bytes beside those of DDP."""
    rows = dict.fromkeys(name for name, _, _ in record.runs)
    chosen = {
        n: [e for (m, lr, _), e in record.runs.items() if (m, lr) == (n, record.best(n))]
        for n in rows
    }
    dense = {e["seed"]: e for e in chosen[next(iter(ROWS))]}
    print(f"{'row':<28}{'lr':>8}{'trained':>10}{'bytes/step':>12}{'of DDP':>8}  test loss, - DDP")
    for name, runs in chosen.items():
        gaps = [e["test"] - dense[e["seed"]]["test"] for e in runs if e["seed"] in dense]
        sent = runs[0]["bytes_per_step"]
        share = sent / next(iter(dense.values()))["bytes_per_step"]
        print(
            f"{name:<28}{record.best(name):>8g}{runs[0]['trained']:>10,}{sent:>12,.0f}{share:>8.3f}"
            f"  {spread([e['test'] for e in runs], 4)}, {spread(gaps, 4)}"
        )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="shakespeare", help="text:FILE, or shakespeare")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    parser.add_argument("--record", type=Path, default=RESULTS / "lte_workers.jsonl")
    parser.add_argument("--table", action="store_true", help="show what is recorded, train nothing")
    parser.add_argument("--smoke", action="store_true", help="a few steps: seconds, not minutes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if not options.table:
        with tempfile.TemporaryDirectory() as folder:
            spawn(work, (options, folder), nprocs=WORKERS)
    facts = json.loads(options.record.read_text().splitlines()[0])
    table(Record(options.record, facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
