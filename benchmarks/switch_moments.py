"""Does carrying the optimizer's moments through Pufferfish's switch pay?

    python benchmarks/switch_moments.py [--seeds 0 1 2 3 4] [--json FILE]

Per network and seed: one dense warm-up on real digits (mnist-5k), saved just before the switch;
from there three continuations on the same batches: moments carried over to the factors (ours),
dropped for the factors only, and a fresh optimizer for everything (the published program,
arXiv 2103.03936). A dense run without a switch is the control row. Shown are training losses of
the same batches (BatchNorm by the batch, so stale running statistics play no part) and losses on
the validation split. The learning rate is constant; the test split is not used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

import rankwise
from rankwise import data, models

AFTER = (0, 1, 2, 5, 10, 20, 50, 100)
SPANS = (("1-5", slice(0, 5)), ("6-20", slice(5, 20)), ("21-100", slice(20, 100)))
WAYS = ("carried", "dropped", "fresh", "dense")


@dataclass(frozen=True)
class Setting:
    """One network with its optimizer and its lengths in steps of 100 images."""

    model: str
    optimizer: Callable[[nn.Module], Optimizer]
    words: str
    switch: int
    total: int


SETTINGS = (
    Setting(
        "mlp-512x8",
        lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, fused=True),
        "Adam 1e-3",
        120,
        400,
    ),
    Setting(
        "resnet-small",
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4),
        "SGD 0.1, momentum 0.9",
        80,
        240,
    ),
    Setting(
        "resnet-small",
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True),
        "AdamW 1e-3",
        80,
        240,
    ),
)


@torch.no_grad()
def validation(model: nn.Module, splits: data.Splits) -> tuple[float, float]:
    """Mean loss and accuracy on the validation split."""
    model.eval()
    scores = model(splits.validation.images)
    model.train()
    labels = splits.validation.labels
    accuracy = float((scores.argmax(1) == labels).float().mean())
    return float(F.cross_entropy(scores, labels)), accuracy


def begin(setting: Setting, seed: int, dense: bool, **options: Any) -> rankwise.Run:
    """A run on a fresh model; without a switch if dense."""
    torch.manual_seed(seed)
    model = models.build(setting.model)
    method = rankwise.Dense() if dense else rankwise.Pufferfish(warmup_steps=setting.switch)
    return rankwise.start(model, method, setting.optimizer(model), seed=seed, **options)


def train(run: rankwise.Run, splits: data.Splits, seed: int, until: int) -> list[float]:
    """Train to step `until`; the training losses on the way."""
    losses = []
    per_epoch = data.steps_per_epoch(splits.train, 100)
    while run.step < until:
        epoch, start = divmod(run.step, per_epoch)
        for x, y in data.batches(splits.train, batch_size=100, seed=seed, epoch=epoch, start=start):
            run.optimizer.zero_grad()
            loss = F.cross_entropy(run.model(x), y)
            loss.backward()
            run.optimizer.step()
            losses.append(float(loss.detach()))
            if run.step == until:
                break
    return losses


def forget(run: rankwise.Run, way: str) -> None:
    """Drop the moments of the factors, or of every parameter."""
    factors = {
        p
        for m in run.bare.modules()
        if isinstance(m, rankwise.layers.LowRankLayer)
        for p in m.new_parameters()
    }
    for parameter in list(run.optimizer.state):
        if way == "fresh" or (way == "dropped" and parameter in factors):
            del run.optimizer.state[parameter]


def one_seed(setting: Setting, splits: data.Splits, seed: int, folder: Path) -> dict[str, Any]:
    """Validation losses around the switch, and at the end, for every way."""
    run = begin(setting, seed, dense=False)
    train(run, splits, seed, setting.switch - 1)
    saved = rankwise.save(folder / f"{setting.model}-{seed}", run)
    result: dict[str, Any] = {}
    for way in WAYS:
        if way == "dense":
            run = begin(setting, seed, dense=True)
            train(run, splits, seed, setting.switch)
        else:
            run = begin(setting, seed, dense=False, resume=saved)
            train(run, splits, seed, setting.switch)
            forget(run, way)
        curve, training = [], []
        for after in AFTER:
            training += train(run, splits, seed, setting.switch + after)
            curve.append(validation(run.bare, splits)[0])
        training += train(run, splits, seed, setting.total)
        loss, accuracy = validation(run.bare, splits)
        result[way] = {"curve": curve, "training": training, "loss": loss, "accuracy": accuracy}
    return result


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def report(setting: Setting, rows: list[dict[str, Any]]) -> None:
    """Print the loss after the switch by way, means over seeds."""
    print(f"\n{setting.model}, {setting.words}, batch 100, switch after step {setting.switch}")
    print("validation loss, steps after the switch; mean over seeds")
    print("way       " + "".join(f"{a:>9}" for a in AFTER) + "   end (mean ± sd)    accuracy")
    for way in WAYS:
        means = [statistics.mean(r[way]["curve"][i] for r in rows) for i in range(len(AFTER))]
        end = spread([r[way]["loss"] for r in rows])
        accuracy = spread([r[way]["accuracy"] for r in rows])
        print(f"{way:10}" + "".join(f"{m:9.4f}" for m in means) + f"   {end}   {accuracy}")
    print("training loss over steps after the switch: mean ± sd over seeds")
    for way in WAYS:
        print(f"{way:10}" + "   ".join(f"{n} {spread(_over(rows, way, s))}" for n, s in SPANS))
    for way in ("dropped", "fresh"):
        gaps = [
            (
                name,
                [
                    a - b
                    for a, b in zip(_over(rows, way, s), _over(rows, "carried", s), strict=True)
                ],
            )
            for name, s in SPANS
        ]
        end = [r[way]["loss"] - r["carried"]["loss"] for r in rows]
        print(
            f"{way} minus carried, training: "
            + ", ".join(f"{name} {spread(gap)}" for name, gap in gaps)
            + f"; validation at the end {spread(end)}"
        )


def _over(rows: list[dict[str, Any]], way: str, span: slice) -> list[float]:
    return [statistics.mean(row[way]["training"][span]) for row in rows]


def main() -> None:
    """Run all settings and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    splits = data.load("mnist-5k")
    written: dict[str, Any] = {"seeds": arguments.seeds, "after": AFTER, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for number, setting in enumerate(SETTINGS):
            place = Path(folder) / str(number)
            rows = [one_seed(setting, splits, seed, place) for seed in arguments.seeds]
            report(setting, rows)
            written[f"{setting.model}, {setting.words}"] = rows
    if arguments.json:
        arguments.json.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
