"""What a step of Frobenius decay costs: through Grams, by forming the product, and by autograd.

    python benchmarks/decay.py [--threads 1] [--repeats 15] [--clock cpu] [--json FILE] [--smoke]

For factors U (N, R) and V (R, N): the gradients U (V V^T) and (U^T U) V through R x R Gram
matrices, as the library computes them (2105.01029); the same gradients by forming U V; autograd of
|U V|_F^2 / 2; and, for scale, one training step's products with U and V on a batch of inputs.
Each round times every side once, every other round backwards; medians and quartiles of the rounds'
ratios. The limit is the ratio of multiplications: 3 N^2 R (product) over 4 N R^2 (Grams).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.layers import LowRankLinear
from rankwise.optim import decay
from rankwise.optim.products import layer_products
from step_time import CLOCKS, RESULTS, environment, quartiles, rounds

SHAPES = ((1024, 64), (4096, 256))
SMALL = (
    (64, 8, 32),
    (128, 16, 24),
    (256, 32, 24),
    (512, 32, 24),
)  # features, rank, layers: is one batch faster?
BATCH = 256
SIDES = ("grams", "product", "autograd", f"training, {BATCH} rows")


def sides(layer: LowRankLinear) -> dict[str, Callable[[], Any]]:
    """One call of each side on the same factors; all add to gradients that are there already."""
    u, v = layer.u.weight, layer.v.weight
    for p in (u, v):
        p.grad = torch.zeros_like(p)
    x = torch.randn(BATCH, layer.in_features, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def product() -> None:
        whole = u @ v
        _grad(u).add_(whole @ v.mT, alpha=1e-4)
        _grad(v).add_(u.mT @ whole, alpha=1e-4)

    return {
        SIDES[0]: lambda: decay.frobenius_decay_(layer, 1e-4),
        SIDES[1]: product,
        SIDES[2]: lambda: ((u @ v).square().sum() * 0.5e-4).backward(),
        SIDES[3]: lambda: layer(x).sum().backward(),
    }


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def measure(features: int, rank: int, options: argparse.Namespace) -> dict[str, Any]:
    """Times of every side, and the ratios to the Grams' round by round."""
    times = rounds(
        sides(LowRankLinear(features, features, rank, bias=False)),
        options.repeats,
        options.seconds,
        CLOCKS[options.clock],
    )
    ratios = {
        side: quartiles([a / b for a, b in zip(times[side], times[SIDES[0]], strict=True)])
        for side in SIDES
    }
    return {
        "features": features,
        "rank": rank,
        "median_ms": {side: statistics.median(t) for side, t in times.items()},
        "over_grams": ratios,
        "limit": 3 * features / (4 * rank),
        "times": times,
    }


def one_batch(features: int, rank: int, layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Decay of equal layers one after the other, and stacked into one batch."""
    model = nn.Sequential(*(LowRankLinear(features, features, rank) for _ in range(layers)))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    products = layer_products(model)

    def call(limit: int) -> Callable[[], Any]:
        def step() -> None:
            decay.SMALL = limit
            decay.decay_(products, {"frobenius": 1.0}, lambda parameter: (1e-4, 0.0))

        return step

    kept = decay.SMALL
    calls = {"one by one": call(0), "stacked": call(features * rank)}
    times = rounds(calls, options.repeats, options.seconds, CLOCKS[options.clock])
    decay.SMALL = kept
    pairwise = zip(times["one by one"], times["stacked"], strict=True)
    return {
        "features": features,
        "rank": rank,
        "layers": layers,
        "median_ms": {side: statistics.median(t) for side, t in times.items()},
        "ratio": quartiles([a / b for a, b in pairwise]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path, help="record; benchmarks/results/... by default")
    parser.add_argument("--smoke", action="store_true", help="small shapes, no record")
    options = parser.parse_args(argv)
    options.seconds = 0.0 if options.smoke else 0.2
    options.repeats = 2 if options.smoke else options.repeats
    torch.set_num_threads(options.threads)
    record = {**environment(), "clock": options.clock, "threads": options.threads}
    print(
        f"{record['hardware']['processor']}, torch {torch.__version__}, {options.threads} thread(s)"
    )
    print(
        f"{'shape':<20}{'grams ms':>9}" + "".join(f"{s:>26}" for s in SIDES[1:]) + f"{'limit':>8}"
    )
    rows = []
    for features, rank in ((64, 4),) if options.smoke else SHAPES:
        row = measure(features, rank, options)
        rows.append(row)
        cells = "".join(
            f"{row['median_ms'][s]:>10.2f} x{m:<4.2f} [{a:.2f}, {b:.2f}]"
            for s in SIDES[1:]
            for a, m, b in [row["over_grams"][s]]
        )
        print(
            f"{features}x{features} rank {rank:<6}{row['median_ms'][SIDES[0]]:>9.3f}{cells}"
            f"{row['limit']:>8.1f}"
        )
    batches = []
    for features, rank, layers in SMALL[:1] if options.smoke else SMALL:
        row = one_batch(features, rank, layers, options)
        batches.append(row)
        low, middle, high = row["ratio"]
        print(
            f"{layers} layers of {features}, rank {rank}: stacked is x{middle:.2f} "
            f"[{low:.2f}, {high:.2f}] faster"
        )
    stamp = record["date"].replace(":", "").replace("+0000", "Z")
    path = options.json or (None if options.smoke else RESULTS / f"decay-{stamp}.json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**record, "rows": rows, "batches": batches}, indent=1) + "\n")
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
