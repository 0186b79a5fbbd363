"""How good are the new bases of multi-head GaLore, found by one thin product?

    python benchmarks/head_bases.py --data text:FILE [--steps N] [--json FILE]

A small LLaMA (`llama-tiny`) trains by `MultiHeadGaLore` with one head of rank 32 and a merge every
10 steps, AdamW. At every merge the new basis, orth(G V^T), is compared on the gradient of the next
batch with a warm power step orth(G (G^T P)), the SVD of G and random directions: the share of that
gradient's energy that each captures, over the most that any basis of its rank could. Mean and
standard deviation over matrices and merges; seed 0.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankwise
from language_study import CONTEXT, adamw
from rankwise import MultiHeadGaLore, data, models
from rankwise.optim.projected.subspace import leading, power_step, random_basis
from rankwise.training import environment

BATCH, RANK, EVERY = 16, 32, 10


def gradients(model: nn.Module, inputs: data.Inputs, targets: Tensor) -> dict[str, Tensor]:
    """Of the weights as they stand, updates merged; by name."""
    dense = copy.deepcopy(model)
    rankwise.to_dense(dense)
    for parameter in dense.parameters():
        parameter.requires_grad_(True)
    F.cross_entropy(dense(inputs).flatten(0, 1), targets.flatten()).backward()
    return {n: p.grad for n, p in dense.named_parameters() if p.grad is not None}


def share_of(part: str, gradient: Tensor) -> Callable[[Tensor], float]:
    """What columns capture of a gradient's energy, over the most that so many could."""
    facing = gradient if part == "u" else gradient.mT
    powers = torch.linalg.svdvals(gradient).square()

    def share(columns: Tensor) -> float:
        caught = (columns.mT @ facing).square().sum()
        return float(caught / powers[: columns.shape[1]].sum())

    return share


def measure(splits: data.TextSplits, steps: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = models.build("llama-tiny", classes=len(splits.classes), input_shape=(CONTEXT,))
    method = MultiHeadGaLore(heads=1, rank=RANK, merge_every=EVERY)
    optimizer = adamw(model.parameters(), 8e-3)
    sample = models.sample("llama-tiny", input_shape=(CONTEXT,))
    run = rankwise.start(model, method, optimizer, sample=sample)
    batches = data.batches(splits.train, batch_size=BATCH, seed=0, epoch=0)
    found: dict[str, list[float]] = {name: [] for name in ("ours", "power", "svd", "random")}
    before: Any = None
    for step, (inputs, targets) in enumerate(batches):
        if before is not None:
            compare(method, before, gradients(model, inputs, targets), found)
            before = None
        if step == steps:
            break
        optimizer.zero_grad()
        F.cross_entropy(run.model(inputs).flatten(0, 1), targets.flatten()).backward()
        if (step + 1) % EVERY == 0:
            old = {basis.name: basis.columns().detach().clone() for basis in method.bases.all}
            before = old, gradients(model, inputs, targets)
        optimizer.step()
    return found


@torch.no_grad()
def compare(
    method: MultiHeadGaLore, before: Any, fresh: dict[str, Tensor], found: dict[str, list[float]]
) -> None:
    old, last = before
    for basis in method.bases.all:
        name = basis.name.partition(".heads.")[0] + ".weight"
        gradient, side = last[name], "left" if basis.part == "u" else "right"
        facing = gradient.mT if side == "left" else gradient
        share = share_of(basis.part, fresh[name])
        generator = torch.Generator().manual_seed(0)
        found["ours"].append(share(basis.columns()))
        found["power"].append(share(power_step(facing, old[basis.name])))
        vectors = leading(gradient, RANK)
        assert vectors is not None
        found["svd"].append(share(vectors[side]))
        found["random"].append(share(random_basis(facing.shape[1], RANK, generator)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="shakespeare", help="text:FILE, or shakespeare")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--json", type=Path, help="where to write a record")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    splits = data.load_text(options.data, context=CONTEXT)
    found = measure(splits, options.steps)
    summary = {n: [statistics.fmean(v), statistics.stdev(v), len(v)] for n, v in found.items()}
    for name, (mean, spread, count) in summary.items():
        print(f"{name:<8}{mean:.3f} ± {spread:.3f}  ({count} matrices and merges)")
    if options.json is not None:
        facts = {
            "commit": environment.commit(),
            "versions": environment.versions(),
            "hardware": environment.hardware(torch.device("cpu"), 1),
            "checksum": splits.checksum,
            "steps": options.steps,
        }
        options.json.write_text(json.dumps({**facts, "captured": summary}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
