"""Two small figures behind the step times: what a run's hooks cost, and how fast thin products are.

    python benchmarks/overheads.py

One thread. The hooks: the step of plain SGD on six 8-wide tensors, alone and with a run attached,
interleaved. The products: those of a 512x512 layer at batch 512, dense and at rank 64.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import rankwise

ROUNDS = 9


def seconds(work: Callable[[], object], times: int) -> float:
    """Mean time of one call, over `times` calls after a tenth of them as warm-up."""
    for _ in range(times // 10 + 1):
        work()
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


def stepper(attached: bool) -> Callable[[], object]:
    """An optimizer's step, optionally with a run that is never due to switch."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if attached:
        rankwise.start(model, rankwise.Pufferfish(ranks=2, warmup_steps=10**9), optimizer)
        model(torch.zeros(1, 8))  # the first forward is watched once
    return optimizer.step


def products(
    batch: int = 512, width: int = 512, rank: int = 64
) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs of matrices that one layer multiplies in a training step."""
    x, dy = torch.randn(batch, width), torch.randn(batch, width)
    z, dz = torch.randn(batch, rank), torch.randn(batch, rank)
    w, u, v = torch.randn(width, width), torch.randn(width, rank), torch.randn(rank, width)
    return {
        "dense  y = x W^T": (x, w.T),
        "dense  dx = dy W": (dy, w),
        "dense  dW = dy^T x": (dy.T, x),
        "low    z = x V^T": (x, v.T),
        "low    y = z U^T": (z, u.T),
        "low    dz = dy U": (dy, u),
        "low    dU = dy^T z": (dy.T, z),
        "low    dV = dz^T x": (dz.T, x),
        "low    dx = dz V": (dz, v),
    }


def main() -> None:
    """Print both tables; medians over the rounds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sides = {"alone": stepper(False), "with a run": stepper(True)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, step in sides.items():
            times[name].append(seconds(step, 2000) * 1e6)
    for name, values in times.items():
        print(f"step of SGD, {name:12} {statistics.median(values):6.1f} µs")
    print("\nproduct              GFLOP/s, one thread (median)")
    for name, (a, b) in products().items():
        out = torch.empty(a.shape[0], b.shape[1])
        flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]

        def multiply(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> Tensor:
            return torch.mm(a, b, out=out)

        rates = [flops / seconds(multiply, 100) / 1e9 for _ in range(ROUNDS)]
        print(f"{name:20} {statistics.median(rates):6.1f}  ({min(rates):.0f}-{max(rates):.0f})")


if __name__ == "__main__":
    main()
