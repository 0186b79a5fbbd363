"""How much of the loss after a switch is only BatchNorm's stale running statistics?

    python benchmarks/switch_batchnorm.py [--seeds 0 1 2] [--steps 99]

A dense resnet-small is trained on real digits (mnist-5k) for some steps, then factorised at several
ranks. Validation loss and accuracy: dense, right after the switch, and with the running
statistics gathered anew on 1,000 training images, weights untouched.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import nn

import rankwise
from rankwise import data, models

RULES = ("0.25", "0.5")


def trained(splits: data.Splits, seed: int, steps: int) -> nn.Module:
    """A dense network after some steps of SGD at the default recipe's batch and rate."""
    torch.manual_seed(seed)
    model = models.build("resnet-small")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    per_epoch = data.steps_per_epoch(splits.train, 64)
    for step in range(steps):
        epoch, start = divmod(step, per_epoch)
        x, y = next(data.batches(splits.train, batch_size=64, seed=seed, epoch=epoch, start=start))
        optimizer.param_groups[0]["lr"] = 0.05 * min(1.0, (step + 1) / per_epoch)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@torch.no_grad()
def validation(model: nn.Module, splits: data.Splits) -> tuple[float, float]:
    """Mean loss and accuracy in eval mode."""
    scores = model.eval()(splits.validation.images)
    labels = splits.validation.labels
    accuracy = float((scores.argmax(1) == labels).float().mean())
    return float(F.cross_entropy(scores, labels)), accuracy


@torch.no_grad()
def recalibrate(model: nn.Module, splits: data.Splits) -> None:
    """Gather BatchNorm's running statistics anew, as plain means over 1,000 training images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    for images in splits.train.images[:1000].split(100):
        model(images)


def main() -> None:
    """Print the table, means over the seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=99)
    arguments = parser.parse_args()
    splits = data.load("mnist-5k")
    rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for seed in arguments.seeds:
        dense = trained(splits, seed, arguments.steps)
        rows["dense"].append(validation(dense, splits))
        for rule in RULES:
            model = copy.deepcopy(dense)
            rankwise.factorize(model, rule, splits.train.images[:1])
            rows[f"ratio {rule}, stale statistics"].append(validation(model, splits))
            recalibrate(model, splits)
            rows[f"ratio {rule}, recalibrated"].append(validation(model, splits))
    print(f"resnet-small, mnist-5k, after {arguments.steps} steps, seeds {arguments.seeds}")
    for name, values in rows.items():
        losses, right = [v[0] for v in values], [v[1] for v in values]
        print(
            f"{name:30} loss {statistics.mean(losses):.3f} ({min(losses):.3f}-{max(losses):.3f})"
            f"  accuracy {statistics.mean(right):.3f} ({min(right):.3f}-{max(right):.3f})"
        )


if __name__ == "__main__":
    main()
