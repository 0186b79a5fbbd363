"""Time of an optimizer step on low-rank gradients, on the matrices of LLaMA-60M and 130M.

    pip install --no-deps galore-torch==1.0 apollo-torch==1.0.3
    python benchmarks/gradients.py [--models llama-60m llama-130m] [--threads 1 2]
                                   [--device cuda] [--json FILE]

The gradients are given; timed is everything that is done with them: projection, the optimizer's
step, the way back into the weights. Each round times every side once, in turn. Beside the sides
stands the floor: two matrix products a matrix, one down and one up, and nothing else; once by
torch's `mm`, by which the published programs multiply, and once by oneDNN, which ours takes where
it is faster (`rankwise.onednn`); GaLore is timed with `mm`, too. A refresh is the difference
between a step that renews every basis and one that renews none; the SVD is that of the peer's first
step. The amortised step is a median step and a 200th of a refresh of all matrices, for both sides.
Beside it stands the mean of 200 steps in a row with their refreshes, and the slowest of them. The
share is that of the whole optimizer step, embedding and head included, in a training step of 2,048
tokens. Rank is 128 for 60M and 256 for 130M, as in the paper (arXiv 2403.03507).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

import rankwise
from gradient_peers import apollo_torch, galore_torch
from rankwise import models, onednn
from rankwise.method import Method
from rankwise.methods import METHODS
from rankwise.training import environment

RESULTS = Path(__file__).parent / "results"
RANKS = {"llama-60m": 128, "llama-130m": 256, "llama-tiny": 32}
PERIOD = 200
TOKENS = 2_048


def when_done() -> float:
    """The time when the GPU has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time, "gpu": when_done}


class Matrices(nn.Module):
    """The linear layers of a network's blocks, without the network."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in shapes)

    def matrices(self) -> list[nn.Parameter]:
        return list(self.parameters())


@dataclass(frozen=True)
class Side:
    """Something that is timed.

    Attributes:
        before: what comes before.
        step: what is timed.
        refreshed: how many bases the last step renewed.
    """

    before: Callable[[], None]
    step: Callable[[], None]
    refreshed: Callable[[], int] = lambda: 0


def shapes_of(name: str) -> list[tuple[int, int]]:
    with torch.device("meta"):
        model = models.build(name)
    return [
        (p.shape[0], p.shape[1])
        for n, p in model.named_parameters()
        if "blocks" in n and p.dim() == 2
    ]


def give(weights: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()


def accumulated(weights: Sequence[nn.Parameter]) -> None:
    """What backward does when a gradient is complete: it calls the hooks that wait for it."""
    for weight in weights:
        for hook in (weight._post_accumulate_grad_hooks or {}).values():
            hook(weight)


def base(parameters: Any) -> AdamW:
    return AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)


def ours(method: Method, shapes: Sequence[tuple[int, int]], gradients: Sequence[Tensor]) -> Side:
    model = Matrices(shapes)
    weights, optimizer = model.matrices(), base(model.parameters())
    run = rankwise.start(model, method, optimizer)
    projected: Any = method

    def step() -> None:
        accumulated(weights)
        optimizer.step()

    def before() -> None:
        optimizer.zero_grad()
        give(weights, gradients)

    def refreshed() -> int:
        matrices = projected.engine.matrices.values()
        return sum(m.next_refresh == run.step - 1 + m.period for m in matrices)

    return Side(before, step, refreshed)


def peer(
    make: Callable[..., Any],
    shapes: Sequence[tuple[int, int]],
    gradients: Sequence[Tensor],
    rank: int,
) -> Side:
    weights = Matrices(shapes).matrices()
    optimizer = make(weights, rank=rank, every=10**9)
    return Side(lambda: give(weights, gradients), optimizer.step)


def by_mm(side: Side) -> Side:
    """The same without oneDNN."""

    def step() -> None:
        worth, onednn.WORTH = onednn.WORTH, math.inf
        try:
            side.step()
        finally:
            onednn.WORTH = worth

    return Side(side.before, step, side.refreshed)


def dense(shapes: Sequence[tuple[int, int]], gradients: Sequence[Tensor]) -> Side:
    weights = Matrices(shapes).matrices()
    return Side(lambda: give(weights, gradients), base(weights).step)


def floor(
    shapes: Sequence[tuple[int, int]], gradients: Sequence[Tensor], rank: int, fast: bool = False
) -> Side:
    """One product down into the subspace and one up into the weight, with memory at hand."""
    weights = [w.detach() for w in Matrices(shapes).matrices()]
    bases = [torch.linalg.qr(torch.randn(min(s), rank))[0] for s in shapes]
    small = [torch.zeros((m, rank) if m >= n else (rank, n)) for m, n in shapes]

    @torch.no_grad()
    def step() -> None:
        for weight, gradient, basis, low in zip(weights, gradients, bases, small, strict=True):
            down = low.shape[1] == rank and weight.shape[0] >= weight.shape[1]
            if fast and down:
                onednn.add_product_(weight, onednn.matmul(gradient, basis), basis.mT, alpha=1e-9)
            elif fast:
                onednn.add_product_(weight, basis, onednn.matmul(basis.mT, gradient), alpha=1e-9)
            elif down:
                torch.mm(gradient, basis, out=low)
                weight.addmm_(low, basis.mT, alpha=1e-9)
            else:
                torch.mm(basis.mT, gradient, out=low)
                weight.addmm_(basis, low, alpha=1e-9)

    return Side(lambda: None, step)


class Timer:
    """Milliseconds of sides, round by round."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock

    def once(self, side: Side) -> float:
        side.before()
        began = self.clock()
        side.step()
        return 1e3 * (self.clock() - began)

    def rounds(self, sides: dict[str, Side], count: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(count):
            for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
                times[name].append(self.once(sides[name]))
        return times


def build(name: str, **options: Any) -> Method:
    return METHODS[name](**options)


def build_on_all(name: str, **options: Any) -> Method:
    """A method of all `Matrices`: the last of them is no classifier."""
    return build(name, layers="*", **options)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network with one number of threads; milliseconds.

    Attributes:
        model: name of the network.
        rank: of the projections.
        threads: of torch.
        steps: side -> every round.
        refresh: what renews all bases -> its time beside a plain step.
        sequence: 200 steps of GaLore with its refreshes in turn, without the first.
        refreshed: how many bases each of them renewed.
        forward_backward: of a training step of `TOKENS` tokens, dense.
        whole: side -> whole optimizer step of the network, embedding and head included.
    """

    model: str
    rank: int
    threads: int
    steps: dict[str, list[float]]
    refresh: dict[str, float]
    sequence: list[float]
    refreshed: list[int]
    forward_backward: float
    whole: dict[str, float]

    def median(self, side: str) -> float:
        return statistics.median(self.steps[side])

    def _median_of(self, refreshing: bool) -> float:
        pairs = zip(self.sequence, self.refreshed, strict=True)
        return statistics.median(time for time, count in pairs if (count > 0) == refreshing)

    def figures(self) -> dict[str, float]:
        """The ratios that goals are stated for."""
        peer = self.median("galore-torch") + self.refresh["galore-torch, SVD"] / PERIOD
        amortised = self.median("GaLore") + self.refresh["warm"] / PERIOD
        return {
            "GaLore / floor": self.median("GaLore") / self.median("floor"),
            "GaLore / oneDNN's floor": self.median("GaLore") / self.median("floor, oneDNN"),
            "GaLore by mm / floor": self.median("GaLore by mm") / self.median("floor"),
            "GaLore / galore-torch": self.median("GaLore") / self.median("galore-torch"),
            "amortised / galore-torch": amortised / peer,
            "200 steps / galore-torch": statistics.fmean(self.sequence) / peer,
            "SVD / refresh": self.refresh["galore-torch, SVD"] / self.refresh["warm"],
            "SVD / rotated refresh": self.refresh["galore-torch, SVD"]
            / self.refresh["warm, rotated"],
            "slowest / median step": max(self.sequence) / statistics.median(self.sequence),
            "step with / without refresh": self._median_of(True) / self._median_of(False),
            "APOLLO / apollo-torch": self.median("APOLLO") / self.median("apollo-torch"),
            "tracked / GaLore": self.median("tracked") / self.median("GaLore"),
            **{f"share, {k}": v / (v + self.forward_backward) for k, v in self.whole.items()},
        }


GOALS = {
    "GaLore / floor": (1.12, "at most"),
    "amortised / galore-torch": (0.8, "at most"),
    "SVD / refresh": (15, "at least"),
    "SVD / rotated refresh": (10, "at least"),
    "slowest / median step": (1.5, "at most"),
    "share, GaLore": (0.05, "at most"),
}


def refreshes(
    timer: Timer,
    shapes: Sequence[tuple[int, int]],
    gradients: Sequence[Tensor],
    rank: int,
    count: int,
) -> dict[str, float]:
    """Milliseconds that renewing all bases adds to a step."""
    at_once: dict[str, Any] = {"rank": rank, "every": 1, "stagger": False}
    kinds = {
        "warm": {**at_once, "moments": "keep"},
        "warm, rotated": {**at_once, "moments": "rotate"},
        "plain": {"rank": rank, "every": 0},
    }
    sides = {k: ours(build_on_all("galore", **o), shapes, gradients) for k, o in kinds.items()}
    timer.rounds(sides, 2)
    times = {k: statistics.median(t) for k, t in timer.rounds(sides, count).items()}
    found = {k: times[k] - times["plain"] for k in ("warm", "warm, rotated")}
    peer_side = peer(galore_torch, shapes, gradients, rank)
    first, second = timer.once(peer_side), timer.once(peer_side)
    return {**found, "galore-torch, SVD": first - second}


def forward_backward(model: nn.Module, name: str, timer: Timer, count: int) -> float:
    length = models.MODELS[name].input_shape[0]
    device = next(model.parameters()).device
    source = torch.Generator(device).manual_seed(0)
    shape = (max(1, TOKENS // length), length + 1)
    tokens = torch.randint(0, 256, shape, generator=source, device=device)

    def run() -> None:
        scores = model(tokens[:, :-1]).flatten(0, 1)
        F.cross_entropy(scores, tokens[:, 1:].flatten()).backward()

    def clear() -> None:
        for parameter in model.parameters():
            parameter.grad = None

    return min(timer.once(Side(clear, run)) for _ in range(count))


def whole_steps(name: str, rank: int, timer: Timer, count: int) -> tuple[float, dict[str, float]]:
    """A training step's forward and backward, and the whole network's optimizer steps."""
    model = models.build(name)
    passes = forward_backward(model, name, timer, count)
    gradients = [torch.randn_like(p) * 1e-3 for p in model.parameters()]
    weights = list(model.parameters())
    found: dict[str, float] = {}
    for kind, method in (
        ("AdamW", rankwise.Dense()),
        ("GaLore", build("galore", rank=rank, every=PERIOD)),
        ("tracked", build("tracked", rank=rank)),
    ):
        optimizer = base(weights)
        run = rankwise.start(model, method, optimizer, sample=models.sample(name))

        def step(optimizer: AdamW = optimizer) -> None:
            accumulated(weights)
            optimizer.step()

        side = Side(lambda: give(weights, gradients), step)
        for _ in range(2):
            timer.once(side)
        found[kind] = statistics.median(timer.once(side) for _ in range(max(3, count)))
        run.finish()
        for parameter in weights:
            parameter.grad = None
    return passes, found


def gradients_of(shapes: Sequence[tuple[int, int]], rank: int) -> list[Tensor]:
    """Of decreasing singular values, as gradients are: a power step has something to find."""
    torch.manual_seed(0)
    return [
        (torch.randn(m, rank) * torch.linspace(1, 0.1, rank)) @ torch.randn(rank, n) / rank
        + 0.1 * torch.randn(m, n)
        for m, n in shapes
    ]


def refreshes_alone(name: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """The refresh figures without the rest, in a tenth of the time."""
    torch.set_num_threads(threads)
    timer, rank, shapes = Timer(CLOCKS[options.clock]), RANKS[name], shapes_of(name)
    found = refreshes(timer, shapes, gradients_of(shapes, rank), rank, options.refreshes)
    svd = found["galore-torch, SVD"]
    ratios = {f"SVD / {kind}": svd / found[kind] for kind in ("warm", "warm, rotated")}
    print(f"{name}, {threads} thread(s):", {k: round(v, 1) for k, v in (found | ratios).items()})
    return {"model": name, "rank": rank, "threads": threads, "refresh": found, "figures": ratios}


def shares_alone(name: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """What part of a training step the whole optimizer step is, without the rest."""
    torch.set_num_threads(threads)
    passes, whole = whole_steps(name, RANKS[name], Timer(CLOCKS[options.clock]), 2)
    shares = {f"share, {k}": v / (v + passes) for k, v in whole.items()}
    found = {"forward_backward": passes, "whole": whole, "figures": shares}
    print(f"{name}, {threads} thread(s):", found)
    return {"model": name, "rank": RANKS[name], "threads": threads, **found}


def measure(name: str, threads: int, options: argparse.Namespace) -> Row:
    torch.set_num_threads(threads)
    timer, rank, shapes = Timer(CLOCKS[options.clock]), RANKS[name], shapes_of(name)
    gradients = gradients_of(shapes, rank)
    refresh = refreshes(timer, shapes, gradients, rank, options.refreshes)
    gc.collect()  # runs and optimizers refer to each other: gigabytes would pile up
    kept: dict[str, Any] = {"rank": rank, "every": 0}
    sides = {
        "AdamW, dense": dense(shapes, gradients),
        "floor": floor(shapes, gradients, rank),
        "floor, oneDNN": floor(shapes, gradients, rank, fast=True),
        "galore-torch": peer(galore_torch, shapes, gradients, rank),
        "GaLore": ours(build_on_all("galore", **kept), shapes, gradients),
        "GaLore by mm": by_mm(ours(build_on_all("galore", **kept), shapes, gradients)),
        "apollo-torch": peer(apollo_torch, shapes, gradients, rank),
        "APOLLO": ours(build_on_all("apollo", **kept), shapes, gradients),
        "Fira": ours(build_on_all("fira", **kept), shapes, gradients),
        "tracked": ours(build_on_all("tracked", rank=rank), shapes, gradients),
    }
    timer.rounds(sides, 2)
    steps = timer.rounds(sides, options.repeats)
    del sides
    gc.collect()
    turning = ours(build_on_all("galore", rank=rank, every=PERIOD), shapes, gradients)
    timer.once(turning)
    pairs = [(timer.once(turning), turning.refreshed()) for _ in range(options.sequence)]
    del turning
    gc.collect()
    passes, whole = whole_steps(name, rank, timer, 1 if options.smoke else 2)
    return Row(
        model=name,
        rank=rank,
        threads=threads,
        steps=steps,
        refresh=refresh,
        sequence=[milliseconds for milliseconds, _ in pairs],
        refreshed=[count for _, count in pairs],
        forward_backward=passes,
        whole=whole,
    )


def show(row: Row) -> None:
    print(f"\n{row.model}, rank {row.rank}, {row.threads} thread(s), ms")
    for side, times in row.steps.items():
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
        ratio = middle / row.median("floor")
        print(f"  {side:<16}{middle:>9.1f} [{low:.1f}, {high:.1f}]{ratio:>8.2f} of the floor")
    print("  refresh of all:", ", ".join(f"{k} {v:.0f}" for k, v in row.refresh.items()))
    whole = ", ".join(f"{k} {v:.0f}" for k, v in row.whole.items())
    print(f"  {TOKENS:,} tokens, forward and backward: {row.forward_backward:.0f}; whole: {whole}")
    slowest = max(range(len(row.sequence)), key=row.sequence.__getitem__)
    print(
        f"  slowest of {len(row.sequence)}: step {slowest + 2}, {row.refreshed[slowest]} new bases"
    )
    for name, value in row.figures().items():
        goal, way = GOALS.get(name, (None, ""))
        wanted = f"   (goal: {way} {goal})" if goal is not None else ""
        print(f"  {name:<28}{value:>8.3f}{wanted}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--models", nargs="+", choices=list(RANKS), default=["llama-60m", "llama-130m"]
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15, help="rounds, at least 5")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="of a processor")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="record; benchmarks/results/... by default")
    parser.add_argument("--refreshes-alone", action="store_true", help="nothing but refreshes")
    parser.add_argument("--shares-alone", action="store_true", help="nothing but whole steps")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, seconds; no record")
    options = parser.parse_args(argv)
    if options.repeats < 5:
        parser.error(f"--repeats {options.repeats}: quartiles need at least 5 rounds")
    if min(options.threads) < 1:
        parser.error(f"--threads {min(options.threads)}: at least 1")
    if options.clock == "cpu" and options.threads != [1]:
        parser.error("--clock cpu adds up the threads' times; use it with --threads 1")
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU here")
        options.clock, options.threads = "gpu", options.threads[:1]
    options.sequence, options.refreshes = PERIOD, 5
    if options.smoke:
        options.models, options.repeats, options.sequence, options.refreshes = (
            ["llama-tiny"],
            2,
            20,
            2,
        )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    torch.set_default_device(options.device)
    now = datetime.now(UTC)
    record = {
        "date": now.isoformat(timespec="seconds"),
        "commit": environment.commit(),
        "versions": environment.versions(),
        "hardware": environment.hardware(torch.device(options.device), 1),
        "clock": options.clock,
        "tokens": TOKENS,
        "period": PERIOD,
    }
    path = options.json
    if path is None and not options.smoke:
        path = RESULTS / f"gradients-{now:%Y-%m-%dT%H%M%SZ}.json"
    rows: list[Any] = []
    for threads, name in itertools.product(options.threads, options.models):
        if options.refreshes_alone:
            rows.append(refreshes_alone(name, threads, options))
        elif options.shares_alone:
            rows.append(shares_alone(name, threads, options))
        else:
            row = measure(name, threads, options)
            rows.append({**asdict(row), "figures": row.figures()})
            show(row)
        gc.collect()
        if path is not None:  # after every row: the next one takes minutes
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    if path is not None:
        print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
