"""Fashion-MNIST: does measuring ranks and the moment of the switch pay, against fixed ones?

    python benchmarks/fashion.py --data fashion-mnist[:PATH] [--seeds 0 1 2] [--only ARM ...]
    python benchmarks/fashion.py --data folder:cifar10 --model resnet-18 --device cuda

All 60,000 images (55,000 train, 5,000 validation, the 10,000 test images read once, by the last
weights), the 784-512-512-10 perceptron, 30 epochs: SGD 0.05, momentum 0.9, batch 256, weight decay
5e-4, one epoch of linear rise, then cosine. One recipe for all arms; the first layer of a
perceptron, the largest, may be low-rank in all of them, the output layer in none. Another network
and a GPU by --model and --device: there `compat` is what the paper did to that network.

    dense             no low rank
    sifd              from the first step, a third of the parameters (2209.13569)
    pufferfish        ratio 1/4 after 8 of 30 epochs (2103.03936)
    compat            Cuttlefish with the published constants of CIFAR (2305.02538)
    cuttlefish        no rank, no length, no layer given
    cuttlefish, FD    the same with Frobenius decay of the factors
    forced E          its ranks, but switched after E epochs

Seconds are of processor time of the whole run on one CPU thread, timing of the layers included (no
cache of earlier runs). Rows go to benchmarks/results/; a second call does only what is missing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import curves
import rankwise
from rankwise import data, models, ranks
from rankwise.method import Method
from rankwise.training.recipe import Recipe
from rankwise.training.schedule import Schedule

BATCH = 256
ARMS = (
    "dense",
    "cuttlefish",
    "compat",
    "pufferfish",
    "sifd",
    "cuttlefish, FD",
    "forced 1",
    "forced 3",
    "forced 8",
    "forced 15",
)
KEY = ("data", "checksum", "arm", "seed", "epochs", "model")
PERCEPTRON = "mlp-512x2"


def methods(arm: str, model: str = PERCEPTRON) -> list[Method]:
    """The methods of an arm."""
    first = 0 if model.startswith("mlp") else 1
    if arm == "dense":
        return [rankwise.Dense()]
    if arm == "sifd":
        return [rankwise.SIFD(target_ratio=1 / 3, keep_first=first)]
    if arm == "pufferfish":
        return [rankwise.Pufferfish(0.25, warmup_epochs=8, keep_first=first)]
    if arm.startswith("forced"):
        epochs = float(arm.removeprefix("forced "))
        return [rankwise.Pufferfish("scaled-stable", warmup_epochs=epochs, keep_first=first)]
    if arm == "compat":  # the published program waits for as long as it takes
        name = model if model in ranks.FAMILIES else "cifar"
        return [rankwise.Cuttlefish(compat=name, latest=1.0, keep_first=first)]
    found = rankwise.Cuttlefish(keep_first=first)
    return [found, rankwise.FactorDecay()] if arm.endswith("FD") else [found]


def one(
    arm: str, seed: int, splits: data.Splits, steps: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One run of an arm."""
    torch.manual_seed(seed)
    shape, classes = tuple(splits.train.images.shape[1:]), len(splits.classes)
    model = models.build(options.model, classes=classes, input_shape=shape).to(options.device)
    epochs = options.epochs
    per_epoch = data.steps_per_epoch(splits.train, BATCH)
    factor = Schedule(Recipe(epochs=max(2, epochs)), per_epoch)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        return curves.train(
            model,
            methods(arm, options.model),
            _optimizer,
            splits,
            curves.Schedule(steps=steps, batch=BATCH, every=per_epoch),
            seed,
            lambda optimizer: LambdaLR(optimizer, factor),
        )


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def report(rows: list[dict[str, Any]], per_epoch: int) -> None:
    """Print the table: every arm beside dense, differences of the same seeds."""
    dense = {r["seed"]: r for r in rows if r["arm"] == "dense"}
    if not dense:
        print("no dense run to compare with: add dense to --only")
        return
    stored = next(iter(dense.values()))["parameters"]
    lines = []
    for arm in ARMS:
        runs = [r for r in rows if r["arm"] == arm and r["seed"] in dense]
        if not runs:
            continue
        gaps = [100 * (r["test"] - dense[r["seed"]]["test"]) for r in runs]
        switches = [r["switch"] / per_epoch for r in runs if r["switch"] is not None]
        lines.append(
            [
                arm,
                str(len(runs)),
                curves.spread(r["test"] for r in runs),
                "" if arm == "dense" else interval(gaps),
                f"{100 * _mean(r['parameters'] for r in runs) / stored:.0f} %",
                f"{_mean(switches):.1f}" if switches else "",
                f"{_mean(r['seconds'] for r in runs):.0f}",
                f"{_mean(r['seconds'] / dense[r['seed']]['seconds'] for r in runs):.2f}",
            ]
        )
    head = [
        "arm",
        "seeds",
        "test, %",
        "minus dense, 95 % interval",
        "parameters",
        "switch, epoch",
        "CPU s",
        "time over dense",
    ]
    print(f"\n{rows[0]['data']}, {rows[0]['epochs']} epochs, mean ± sd over seeds\n")
    print(curves.table(head, lines))


def interval(gaps: list[float]) -> str:
    """Mean of paired differences and the 95 % interval of it (Student's t)."""
    mean = statistics.mean(gaps)
    if len(gaps) < 2:
        return f"{mean:+.2f}"
    half = _T[min(len(gaps), len(_T) + 1) - 2] * statistics.stdev(gaps) / len(gaps) ** 0.5
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def _mean(values: Any) -> float:
    return statistics.mean(values)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="fashion-mnist", help="fashion-mnist[:PATH], or mnist-5k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--model", default=PERCEPTRON, help="`rankwise models` lists them")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--only", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--json", type=Path, default=curves.RESULTS / "fashion.jsonl")
    parser.add_argument("--table", action="store_true", help="only print what the record holds")
    parser.add_argument("--smoke", action="store_true", help="two steps a run: tests the script")
    options = parser.parse_args(argv)
    curves.one_thread()
    splits = data.load(options.data)
    per_epoch = data.steps_per_epoch(splits.train, BATCH)
    steps = 2 if options.smoke else options.epochs * per_epoch
    rows = curves.Rows(options.json, KEY)
    common = {"data": splits.name, "checksum": splits.checksum, "epochs": options.epochs}
    if options.model != PERCEPTRON:  # rows of the first study have no name
        common["model"] = options.model
    chosen = []
    for seed in options.seeds:
        for arm in options.only:
            setting = {**common, "arm": arm, "seed": seed}
            if rows.missing(setting) and not options.table:
                row = one(arm, seed, splits, steps, options)
                rows.add({**row, **setting})
                print(f"{arm} {seed}: {row['test']:.4f}, {row['seconds']} s", flush=True)
            if not rows.missing(setting):
                chosen.append(rows.find(setting))
    if chosen:
        report(chosen, per_epoch)


if __name__ == "__main__":
    main()
