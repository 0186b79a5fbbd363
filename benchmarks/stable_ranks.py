"""Record how the stable ranks of real networks move in dense training, for `tracking.py --replay`.

    python benchmarks/stable_ranks.py [--only NAME] [--seeds 0 1]

Dense networks, the recipe of each below over 30 epochs (cosine after one epoch of linear rise), on
one thread. Eight times an epoch the scaled stable rank of every layer that Cuttlefish would track
is measured, as the library measures it, and at the end of each epoch validation loss and accuracy.
Rows go to benchmarks/results/; a second call does only what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

import curves
import rankwise
from rankwise import data
from rankwise.ranks import Later, Ratio, StableRanks, estimators, weights_of
from rankwise.training import setup, task
from rankwise.training.recipe import Recipe
from rankwise.training.schedule import Schedule

CASES: dict[str, dict[str, Any]] = {
    "mlp-512x2": {"data": "mnist-5k"},
    "mlp-512x8": {"data": "mnist-5k"},
    "resnet-small": {"data": "mnist-5k"},
    "llama-tiny": {"data": "shakespeare", "optimizer": "adamw", "lr": 2e-3, "batch_size": 16},
}
EPOCHS, PER_EPOCH = 30, 8
# An epoch of the text is its first 400 windows of 128 bytes: the whole would take an hour each.
WINDOWS = 400


def scaled(model: torch.nn.Module, plan: rankwise.Plan, ranks: StableRanks) -> dict[str, float]:
    """Stable ranks times full rank over the stable rank of random weights, in closed form."""
    measured = ranks.measure(weights_of(model, plan))
    lines = {line.name: line for line in plan.layers}
    return {
        name: value * estimators.stable_rank_scale(lines[name].rows, lines[name].columns)
        for name, value in measured.items()
    }


def shortened(splits: Any, context: int) -> Any:
    """The beginning of a text; images as they are."""
    if splits.task == "classification":
        return splits
    train = dataclasses.replace(splits.train, tokens=splits.train.tokens[: WINDOWS * context + 1])
    valid = splits.validation.tokens[: 50 * context + 1]
    validation = dataclasses.replace(splits.validation, tokens=valid)
    return dataclasses.replace(splits, train=train, validation=validation)


def one(name: str, seed: int, epochs: int) -> dict[str, Any]:
    """One dense run: the series of every layer, and how well the network did epoch by epoch."""
    began = time.process_time()
    recipe = Recipe(model=name, method="dense", seed=seed, epochs=epochs, **CASES[name])
    splits = shortened(setup.load_data(recipe), recipe.context)
    model = setup.build_model(recipe, splits, torch.device("cpu"))
    optimizer = setup.make_optimizer(recipe, model)
    steps = data.steps_per_epoch(splits.train, recipe.batch_size)
    scheduler = LambdaLR(optimizer, Schedule(recipe, steps))
    plan = rankwise.plan(model, Later.of(Ratio(0.25), "at the switch"))
    ranks, looks = StableRanks(), {round(steps * i / PER_EPOCH) for i in range(1, PER_EPOCH + 1)}
    times, series = [0.0], [scaled(model, plan, ranks)]
    scores: list[task.Score] = []
    for epoch in range(epochs):
        batches = data.batches(splits.train, batch_size=recipe.batch_size, seed=seed, epoch=epoch)
        for step, (x, y) in enumerate(batches, 1):
            optimizer.zero_grad()
            task.loss_of(model(x), y, label_smoothing=0.0).backward()
            optimizer.step()
            scheduler.step()
            if step in looks:
                times.append(epoch + step / steps)
                series.append(scaled(model, plan, ranks))
        scores.append(score(model, splits))
    names = list(series[0])
    return {
        "times": [round(t, 4) for t in times],
        "series": {n: [round(values[n], 3) for values in series] for n in names},
        "full": {line.name: line.shape.full_rank for line in plan.layers if line.name in names},
        "sizes": {line.name: line.shape.dense for line in plan.layers if line.name in names},
        "validation_loss": [round(s.loss, 5) for s in scores],
        "validation_accuracy": [round(s.accuracy, 5) for s in scores],
        "data": splits.name,
        "checksum": splits.checksum,
        "seconds": round(time.process_time() - began, 1),
    }


@torch.no_grad()
def score(model: torch.nn.Module, splits: Any) -> task.Score:
    """Of the validation part, or its first 500 examples."""
    x, y = splits.validation.take(torch.arange(min(500, len(splits.validation))))
    model.eval()
    scores = model(x)
    model.train()
    loss = float(task.loss_of(scores, y, label_smoothing=0.0))
    return task.Score(loss, float((scores.argmax(-1) == y).double().mean()))


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, and print what has been seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=list(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--json", type=Path, default=curves.RESULTS / "stable-ranks.jsonl")
    options = parser.parse_args(argv)
    curves.one_thread()
    rows = curves.Rows(options.json, ("network", "seed", "epochs"))
    for name in options.only:
        for seed in options.seeds:
            setting = {"network": name, "seed": seed, "epochs": options.epochs}
            if rows.missing(setting):
                rows.add({**setting, **one(name, seed, options.epochs)})
            row = rows.find(setting)
            first, last = (
                statistics.mean(values[i] for values in row["series"].values()) for i in (0, -1)
            )
            print(
                f"{name} {seed}: mean scaled stable rank {first:.1f} -> {last:.1f}, "
                f"accuracy {row['validation_accuracy'][-1]:.2%}, {row['seconds']} CPU s",
                flush=True,
            )


if __name__ == "__main__":
    main()
