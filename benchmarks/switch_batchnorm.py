"""How much of the loss after a switch is only BatchNorm's stale running statistics?

    python benchmarks/switch_batchnorm.py [--seeds 0 1 2] [--steps 99] [--json FILE]

A resnet-small is trained dense on real digits (mnist-5k) for some steps, then factorised by
Pufferfish at several ranks and trained on. Validation loss and accuracy right before the switch, at
it and some steps later, for three kinds of running statistics:

    adapting    nothing is done: torch's momentum of 0.1 lets the old ones fade
    averaging   without data: from the switch on the statistics are plain means of the steps since
    calibrated  rankwise.start(..., calibrate=...): gathered anew on 1,000 training images

Training normalises by the batch, so one training serves all three: it is run calibrated, and the
statistics of the other two follow from what every step added.
The test split is not used.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankwise
from rankwise import data, models

RULES = ("0.25", "0.5")
WAYS = ("adapting", "averaging", "calibrated")
AFTER = (0, 1, 2, 5, 10, 20, 40)
BATCH, IMAGES = 64, 1000


@torch.no_grad()
def validation(model: nn.Module, splits: data.Splits) -> tuple[float, float]:
    """Mean loss and accuracy in eval mode; modes are put back."""
    scores = model.eval()(splits.validation.images)
    model.train()
    labels = splits.validation.labels
    accuracy = float((scores.argmax(1) == labels).float().mean())
    return float(F.cross_entropy(scores, labels)), accuracy


def inputs(splits: data.Splits, seed: int) -> Iterator[Tensor]:
    """The batches that statistics are gathered from."""
    drawn = data.batches(splits.train, batch_size=BATCH, seed=seed, epoch=1000)
    return (cast(Tensor, x) for x, _ in itertools.islice(drawn, -(-IMAGES // BATCH)))


def statistics_of(model: nn.Module) -> list[Tensor]:
    """Copies of all running means and variances."""
    norms = (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    return [t.clone() for m in norms for t in (m.running_mean, m.running_var) if t is not None]


def with_statistics(model: nn.Module, values: list[Tensor]) -> nn.Module:
    """A copy of the model with other running statistics."""
    other = copy.deepcopy(model)
    norms = (m for m in other.modules() if isinstance(m, nn.BatchNorm2d))
    held = (t for m in norms for t in (m.running_mean, m.running_var) if t is not None)
    for tensor, value in zip(held, values, strict=True):
        tensor.copy_(value)
    return other


def run(splits: data.Splits, seed: int, rule: str, switch: int) -> list[dict[str, Any]]:
    """One training: what validation said around the switch, for each kind of statistics."""
    torch.manual_seed(seed)
    model = models.build("resnet-small")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    method = rankwise.Pufferfish(rule, warmup_steps=switch)
    seen: list[tuple[float, float]] = []
    stale: list[Tensor] = []

    def probe(probed: nn.Module) -> float:
        stale[:] = stale or statistics_of(probed)
        seen.append(validation(probed, splits))
        return seen[-1][0]

    session = rankwise.start(
        model,
        method,
        optimizer,
        sample=splits.train.images[:1],
        probe=probe,
        calibrate=lambda: inputs(splits, seed),
    )
    per_epoch = data.steps_per_epoch(splits.train, BATCH)
    points: dict[str, dict[int, tuple[float, float]]] = {way: {} for way in WAYS}
    before: list[Tensor] = []
    total: list[Tensor] = []
    adapting: list[Tensor] = []
    averaging: list[Tensor] = []
    for step in range(switch + AFTER[-1]):
        epoch, start = divmod(step, per_epoch)
        x, y = next(
            data.batches(splits.train, batch_size=BATCH, seed=seed, epoch=epoch, start=start)
        )
        optimizer.param_groups[0]["lr"] = 0.05 * min(1.0, (step + 1) / per_epoch)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after = step + 1 - switch
        if after < 0:
            continue
        now = statistics_of(model)
        if after == 0:
            adapting, averaging = list(stale), list(stale)
        else:
            added = [10 * n - 9 * b for n, b in zip(now, before, strict=True)]
            adapting = [0.9 * a + 0.1 * n for a, n in zip(adapting, added, strict=True)]
            total = [a + b for a, b in zip(total, added, strict=True)] if total else added
            averaging = [value / after for value in total]
        before = now
        if after in AFTER:
            for way, values in zip(WAYS, (adapting, averaging, now), strict=True):
                points[way][after] = validation(with_statistics(model, values), splits)
    event = next(e for e in session.events if e["event"] == "switch")
    # Before, after, calibrated: the event says what the table says.
    assert abs(event["loss_after"] - points["adapting"][0][0]) < 1e-4 * event["loss_after"]
    assert abs(event["loss_calibrated"] - points["calibrated"][0][0]) < 1e-4
    return [
        {"rule": rule, "way": way, "seed": seed, "dense": seen[0], "points": points[way]}
        for way in WAYS
    ]


def main() -> None:
    """Print the table, means over the seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=99)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    splits = data.load("mnist-5k")
    rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for seed, rule in itertools.product(arguments.seeds, RULES):
        for row in run(splits, seed, rule, arguments.steps):
            rows[rule, row["way"]].append(row)
    print(f"resnet-small, mnist-5k, switch after {arguments.steps} steps, seeds {arguments.seeds}")
    for rule in RULES:
        dense = [row["dense"] for row in rows[rule, WAYS[0]]]
        print(f"\nratio {rule}; dense before the switch: {said(dense)}")
        print("steps after  " + "".join(f"{way:>38}" for way in WAYS))
        for after in AFTER:
            cells = [said([row["points"][after] for row in rows[rule, way]]) for way in WAYS]
            print(f"{after:11}  " + "".join(f"{cell:>38}" for cell in cells))
    if arguments.json:
        arguments.json.write_text(json.dumps([r for each in rows.values() for r in each], indent=1))


def said(values: list[tuple[float, float]]) -> str:
    """Mean loss with its range, and mean accuracy."""
    losses, right = [v[0] for v in values], [v[1] for v in values]
    low, high = min(losses), max(losses)
    return f"{statistics.mean(losses):.3f} ({low:.3f}-{high:.3f}) {statistics.mean(right):.3f}"


if __name__ == "__main__":
    main()
