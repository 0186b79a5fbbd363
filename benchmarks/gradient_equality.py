"""GaLore and APOLLO against their published programs, step by step, on the matrices of LLaMA-60M.

    pip install --no-deps galore-torch==1.0 apollo-torch==1.0.3
    python benchmarks/gradient_equality.py --data text:FILE [--json FILE]

Two copies of the network, with one of its eight blocks, read the same bytes for 200 steps of 8
windows of 64 tokens, four times the rank of 128; one is stepped by the published AdamW, one by
torch's within our engine. Both have the same bases: GaLore's are those that galore-torch finds
(twice, a hundred steps apart), APOLLO's random ones are ours. Moments are kept as they are at a new
basis. Epsilon is given to theirs so that it means the same (they add it before the bias
correction), and APOLLO's limiter, which counts norms before that correction, is off on both sides.
Shown is how far the weights are apart: the largest difference of an entry, and of a parameter in
units of how far it has come. A call with --json FILE goes on with the pairs that the file lacks.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

import rankwise
from gradient_peers import apollo_torch, galore_torch, give_projection
from rankwise import data, models
from rankwise.method import Method
from rankwise.methods.apollo import Apollo
from rankwise.methods.galore import GaLore
from rankwise.training import environment

RESULTS = Path(__file__).parent / "results"
BLOCKS, RANK, EVERY, STEPS, BATCH, CONTEXT = 1, 128, 100, 200, 8, 64
RATE, GAP = 1e-3, 1e-4
NEVER = 2**62


@dataclass(frozen=True)
class Pair:
    """A method and its published program.

    Attributes:
        method: ours.
        program: theirs, of matrices, other parameters and the rank.
        epsilon: of torch's AdamW; theirs follows.
        theirs_first: whether theirs finds the bases.
    """

    method: Callable[[int], Method]
    program: Callable[[list[nn.Parameter], list[nn.Parameter], int], Optimizer]
    epsilon: float
    theirs_first: bool


def _galore(side: str, sides: str) -> Pair:
    return Pair(
        lambda rank: GaLore(rank, every=0, side=side, layers="blocks.*"),
        lambda inner, others, rank: galore_torch(
            inner, others, rank=rank, every=EVERY, lr=RATE, sides=sides
        ),
        epsilon=1e-5,
        theirs_first=True,
    )


PAIRS = {
    "GaLore": _galore("short", "std"),
    "GaLore, two-sided": _galore("both", "full"),
    "APOLLO": Pair(
        lambda rank: Apollo(rank, every=0, growth=0.0, layers="blocks.*"),
        lambda inner, others, rank: apollo_torch(
            inner, others, rank=rank, every=10**9, lr=RATE, eps=1e-30, disable_nl=True
        ),
        epsilon=1e-30,
        theirs_first=False,
    ),
}


def inner_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2}


def from_theirs(matrix: Any, found: Any) -> None:
    """Give a matrix of our engine the basis that galore-torch uses."""
    parts = found if isinstance(found, list) else [found]
    for side, part in zip(matrix.sides, parts, strict=True):
        matrix.set_basis(side, part.clone() if side == "left" else part.mT.clone())
    matrix.period, matrix.next_refresh = NEVER, NEVER


def to_theirs(matrix: Any, optimizer: Optimizer, weight: nn.Parameter) -> None:
    """Give apollo-torch the random basis that our engine has drawn."""
    (side,) = matrix.sides
    basis = matrix.basis(side)
    give_projection(optimizer, weight, basis.mT if side == "right" else basis, matrix.rank)


def compare(name: str, splits: data.TextSplits, network: str, rank: int, steps: int) -> Any:
    """Train both copies; how far they are apart after every 50th step and the last."""
    pair = PAIRS[name]
    torch.manual_seed(0)
    start: Any = models.build(network, classes=len(splits.classes), input_shape=(CONTEXT,))
    start.blocks = start.blocks[:BLOCKS]
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    inner = inner_matrices(theirs)
    others = [p for n, p in theirs.named_parameters() if n not in inner]
    program = pair.program(list(inner.values()), others, rank)
    optimizer = AdamW(ours.parameters(), lr=RATE, eps=pair.epsilon, weight_decay=0.0)
    method: Any = pair.method(rank)
    rankwise.start(ours, method, optimizer)
    matrices = method.engine.matrices
    assert matrices.keys() == inner.keys()

    def step_theirs(inputs: Any, targets: Tensor, step: int) -> None:
        for group in program.param_groups:
            group["eps"] = pair.epsilon * (1 - group["betas"][1] ** (step + 1)) ** 0.5
        backward(theirs, program, inputs, targets)
        if step == 0 and not pair.theirs_first:
            for key, matrix in matrices.items():
                to_theirs(matrix, program, inner[key])
        program.step()
        if pair.theirs_first and step % EVERY == 0:
            for key, matrix in matrices.items():
                from_theirs(matrix, program.state[inner[key]]["projector"].ortho_matrix)

    def step_ours(inputs: Any, targets: Tensor, step: int) -> None:
        backward(ours, optimizer, inputs, targets)
        optimizer.step()

    found: list[dict[str, float]] = []
    windows = data.batches(splits.train, batch_size=BATCH, seed=0, epoch=0)
    turns = (step_theirs, step_ours) if pair.theirs_first else (step_ours, step_theirs)
    for step, (inputs, targets) in zip(range(steps), windows, strict=False):
        for turn in turns:
            turn(inputs, targets, step)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            found.append({"step": step + 1, **distance(start, ours, theirs)})
            print(f"{name:<20}", {k: f"{v:.3g}" for k, v in found[-1].items()}, flush=True)
    return found


def backward(model: nn.Module, optimizer: Optimizer, inputs: Any, targets: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()


@torch.no_grad()
def distance(start: nn.Module, ours: nn.Module, theirs: nn.Module) -> dict[str, float]:
    """How far two networks are apart, and how far they have come."""
    apart, relative, moved = 0.0, 0.0, 0.0
    for s, a, b in zip(start.parameters(), ours.parameters(), theirs.parameters(), strict=True):
        apart = max(apart, float((a - b).abs().max()))
        moved = max(moved, float((b - s).abs().max()))
        relative = max(relative, float((a - b).norm() / (b - s).norm()))
    return {"largest difference": apart, "largest move": moved, "relative": relative}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="shakespeare", help="text:FILE, or shakespeare")
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--json", type=Path, help="record; benchmarks/results/... by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a tiny network, seconds; no record")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    splits, now = data.load_text(options.data, context=CONTEXT), datetime.now(UTC)
    network, rank, steps = ("llama-tiny", 32, 3) if options.smoke else ("llama-60m", RANK, STEPS)
    record: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "commit": environment.commit(),
        "versions": environment.versions(),
        "hardware": environment.hardware(torch.device("cpu"), 1),
        "data": {"name": splits.name, "checksum": splits.checksum},
        **{
            "network": network,
            "blocks": BLOCKS,
            "rank": rank,
            "tokens": BATCH * CONTEXT,
            "every": EVERY,
        },
        "pairs": {},
    }
    path = options.json or RESULTS / f"gradient-equality-{now:%Y-%m-%dT%H%M%SZ}.json"
    if path.exists() and not options.smoke:
        record = json.loads(path.read_text())
    pairs = record["pairs"]
    for name in options.pairs:
        if name not in pairs:
            pairs[name] = compare(name, splits, network, rank, steps)
            if not options.smoke:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record, indent=1) + "\n")
    apart = max(found[-1]["largest difference"] for found in pairs.values())
    print(f"largest difference after {steps} steps: {apart:.2g} (goal: at most {GAP:g})")
    return 0 if apart <= GAP else 1


if __name__ == "__main__":
    sys.exit(main())
