"""Low-rank LSTM and GRU against torch's and against a TorchScript loop over low-rank cells.

    python benchmarks/recurrent.py [--only lstm-1024 ...] [--divisors 8 4 2] [--threads N]
                                   [--sides torch loop product ...] [--batch N] [--steps N]
                                   [--device cuda] [--dtype bfloat16]
                                   [--repeats N] [--memory] [--json FILE]

One layer in one direction, as many inputs as hidden units. A training step is forward and
backward with gradients of all weights and of the input; inference is a forward without gradients.
All sides take turns, first in training, then in inference; the table gives medians, and nn.LSTM's
time over each side's. The limit is the ratio of multiplications, 8 H / 10 R for the LSTM and
6 H / 8 R for the GRU. One thread is timed by the process's own time, more and GPUs by the wall
clock, each call of a GPU until it is done. A record is one line of JSON for each row, appended.

`--memory` measures, each in a process of its own, what a training step saves for backward and by
how much it raises the peak of the resident memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.layers import LowRankGRU, LowRankLSTM, OpenRecurrent
from rankwise.layers.recurrent import fused
from step_time import CLOCKS, environment, quartiles

SEED = 0


@dataclass(frozen=True)
class Case:
    """One layer and the sequences it sees; goals at rank H / 4 on one thread: step, inference."""

    kind: str
    hidden: int
    batch: int
    steps: int
    goals: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.hidden}"


SIZES = {256: (20, 80), 650: (20, 35), 1024: (32, 64), 1500: (20, 35), 2048: (20, 35)}
GOALS = {
    "lstm-256": (1.7, 1.35),
    "lstm-650": (2.0, 2.2),
    "lstm-1024": (2.5, 2.1),
    "lstm-1500": (2.3, 2.3),
    "gru-650": (2.0,),
}
CASES = {
    case.name: case
    for kind in ("lstm", "gru")
    for hidden, (batch, steps) in SIZES.items()
    for case in [Case(kind, hidden, batch, steps, GOALS.get(f"{kind}-{hidden}", ()))]
}
SIDES = ("torch", "low-rank", "recompute", "script", "loop", "compiled", "product", "fused")
USUAL = SIDES[:4]
ON_GPU = ("torch", "low-rank", "product", "fused")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one layer at one rank; times in milliseconds, round by round."""

    layer: str
    batch: int
    steps: int
    rank: int
    device: str
    dtype: str
    threads: int
    clock: str
    repeats: int
    limit: float
    times: dict[str, dict[str, list[float]]]
    median_ms: dict[str, dict[str, float]]
    ratio: dict[str, dict[str, tuple[float, float, float]]]  # quartiles of torch's time / this
    goals: tuple[float, ...]


class Loop(nn.Module):
    """The published form: every step is a call of a low-rank cell, autograd does the rest."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.gru = isinstance(layer, LowRankGRU)
        self.vx, self.ux = layer.ih_l0.v.weight, layer.ih_l0.u.weight
        self.vh, self.uh = layer.hh_l0.v.weight, layer.hh_l0.u.weight
        self.bx, self.bh = layer.ih_l0.u.bias, layer.hh_l0.u.bias

    def lstm(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        codes = torch.mm(torch.mm(x, self.vx.t()), self.ux.t()) + self.bx + self.bh
        i, f, g, o = (codes + torch.mm(torch.mm(h, self.vh.t()), self.uh.t())).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def cell(self, x: Tensor, h: Tensor) -> Tensor:
        xr, xz, xn = (torch.mm(torch.mm(x, self.vx.t()), self.ux.t()) + self.bx).chunk(3, 1)
        hr, hz, hn = (torch.mm(torch.mm(h, self.vh.t()), self.uh.t()) + self.bh).chunk(3, 1)
        z, n = torch.sigmoid(xz + hz), torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        return n + z * (h - n)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.zeros(x.shape[1], self.vh.shape[1], dtype=x.dtype, device=x.device)
        c = h
        outputs: list[Tensor] = []
        for t in range(x.shape[0]):
            if self.gru:
                h = self.cell(x[t], h)
            else:
                h, c = self.lstm(x[t], h, c)
            outputs.append(h)
        return torch.stack(outputs), h


def side(name: str, case: Case, rank: int) -> Any:
    """One of the layers, all with the same weights; `loop`, `product`, `fused`: that way."""
    torch.manual_seed(SEED)
    low: OpenRecurrent = {"lstm": LowRankLSTM, "gru": LowRankGRU}[case.kind](
        case.hidden, case.hidden, rank=rank, recompute=name == "recompute"
    )
    if name == "torch":
        return low.to_dense()
    if name in ("loop", "compiled", "product", "fused"):
        low.way = name
    if name == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.script(Loop(low))
    return low


def inputs(case: Case) -> Tensor:
    torch.manual_seed(SEED + 1)
    return torch.randn(case.steps, case.batch, case.hidden, requires_grad=True)


def train(layer: Any, x: Tensor, gradient: Tensor) -> None:
    for parameter in (*layer.parameters(), x):
        parameter.grad = None
    layer(x)[0].backward(gradient)


@torch.no_grad()
def infer(layer: Any, x: Tensor, gradient: Tensor) -> None:
    layer(x)


PHASES: dict[str, Callable[[Any, Tensor, Tensor], None]] = {"training": train, "inference": infer}


def measure(case: Case, divisor: int, options: argparse.Namespace) -> Row:
    """All sides in turns, a step each, then inference; the first two rounds of each warm up."""
    torch.set_num_threads(options.threads)
    place: Any = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    rank, x = case.hidden // divisor, inputs(case).detach().to(**place).requires_grad_()
    layers = {name: side(name, case, rank).to(**place) for name in options.sides}
    low: Any = layers.get("fused")
    if low is not None and not fused.fits(low.hh_l0.v.weight, x.dtype, *x.shape[:2]):
        del layers["fused"]  # it would take another way
    gradient = torch.randn(x.shape, **place)
    check_same_results(layers, x)
    on_cpu = options.device == "cpu"
    kind = options.clock or ("cpu" if options.threads == 1 and on_cpu else "wall")
    clock = CLOCKS[kind] if on_cpu else done
    times: dict[str, dict[str, list[float]]] = {p: {n: [] for n in layers} for p in PHASES}
    # Apart: what inference keeps between calls is let go in training.
    for (phase, run), turn in itertools.product(PHASES.items(), range(-2, options.repeats)):
        for name in list(layers) if turn % 2 else list(layers)[::-1]:
            start = clock()
            run(layers[name], x, gradient)
            if turn >= 0:
                times[phase][name].append(1e3 * (clock() - start))
    return Row(
        layer=case.name,
        batch=case.batch,
        steps=case.steps,
        rank=rank,
        device="cpu" if on_cpu else torch.cuda.get_device_name(),
        dtype=options.dtype,
        threads=options.threads,
        clock=kind,
        repeats=options.repeats,
        limit=case.hidden / rank * (0.8 if case.kind == "lstm" else 0.75),
        times=times,
        median_ms={p: {n: statistics.median(t) for n, t in s.items()} for p, s in times.items()},
        ratio={p: ratios(sides) for p, sides in times.items()},
        goals=case.goals if divisor == 4 and options.threads == 1 and on_cpu else (),
    )


def done() -> float:
    """The time when the GPU has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def ratios(sides: dict[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    """Quartiles of torch's time over each side's, round by round."""
    pairs = {name: zip(sides["torch"], times, strict=True) for name, times in sides.items()}
    return {name: quartiles([a / b for a, b in pair]) for name, pair in pairs.items()}


@torch.no_grad()
def check_same_results(layers: dict[str, Any], x: Tensor) -> None:
    """What is compared computes the same: on a GPU within TF32, in less within its rounding."""
    expected = layers["torch"](x)[0]
    close = 1e-5 if x.device.type == "cpu" else 2e-3
    close = close if x.dtype == torch.float32 else 5e-2
    for layer in layers.values():
        torch.testing.assert_close(layer(x)[0], expected, rtol=1e-3, atol=close)


def show(row: Row) -> None:
    head = f"{row.layer} rank {row.rank}, batch {row.batch}, T {row.steps}"
    goals = f", goals {' / '.join(map(str, row.goals))}" if row.goals else ""
    where = f"{row.threads} thread(s)" if row.device == "cpu" else f"{row.device}, {row.dtype}"
    print(f"{head}, {where}, limit {row.limit:.1f}{goals}")
    for name in row.median_ms["training"]:
        cells = ""
        for phase in PHASES:
            low, middle, high = row.ratio[phase][name]
            ms = row.median_ms[phase][name]
            cells += f"{phase:>12}{ms:>9.1f} ms  {middle:>5.2f} [{low:.2f}, {high:.2f}]"
        print(f"    {name:<10}{cells}", flush=True)


def memory(case: Case, rank: int, name: str) -> dict[str, float]:
    """What one training step saves for backward, and by how much it raises the resident peak."""
    layer, x = side(name, case, rank), inputs(case)
    gradient = torch.randn(x.shape)
    train(layer, x[:2].detach().requires_grad_(), gradient[:2])  # loads what is loaded once
    before = resident("VmRSS", reset=True)
    train(layer, x, gradient)
    peak = resident("VmHWM") - before
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)[0]
    for tensor in (*layer.parameters(), x):
        held.pop(tensor.untyped_storage().data_ptr(), None)
    saved, unit = sum(held.values()), 4 * y.numel()
    return {"saved_mb": saved / 2**20, "saved_units": saved / unit, "peak_mb": peak / 1024}


def resident(field: str, *, reset: bool = False) -> int:
    """Resident memory now (VmRSS) or at its highest (VmHWM) in kB; `reset` begins a new peak."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def memory_of_sides(case: Case, divisor: int, options: argparse.Namespace) -> dict[str, Any]:
    """Each side in a process of its own."""
    rank = case.hidden // divisor
    found = {}
    for name in options.sides:
        command = [sys.executable, __file__, "--child", json.dumps(asdict(case)), str(rank), name]
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(child.stdout)
        print(
            f"{case.name} rank {rank} {name:<10}"
            + "".join(f"{what:>14}{value:8.1f}" for what, value in found[name].items()),
            flush=True,
        )
    return {
        "layer": case.name,
        "batch": case.batch,
        "steps": case.steps,
        "rank": rank,
        "memory": found,
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--divisors", type=int, nargs="+", default=[8, 4, 2], help="of H: ranks")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="the first four by default")
    parser.add_argument("--batch", type=int, help="in place of the usual one")
    parser.add_argument("--steps", type=int, help="in place of the usual ones")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="rounds, at least 5")
    parser.add_argument("--clock", choices=list(CLOCKS), help="cpu for one thread, else wall")
    parser.add_argument("--memory", action="store_true", help="memory instead of time")
    parser.add_argument("--json", type=Path, help="a line per row is appended")
    parser.add_argument("--smoke", action="store_true", help="tiny layers: about the script alone")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.sides = options.sides or list(USUAL if options.device == "cpu" else ON_GPU)
    if options.device == "cuda" and (options.memory or options.clock):
        parser.error("--memory and --clock are of the processor; --device cuda has neither")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if options.repeats < 5:
        parser.error(f"--repeats {options.repeats}: quartiles need at least 5 rounds")
    if "torch" not in options.sides:
        parser.error("--sides: torch is what the others are compared with")
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu adds up the threads' times; use it with --threads 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if options.child:
        case, rank, which = options.child
        print(json.dumps(memory(Case(**json.loads(case)), int(rank), which)))
        return 0
    cases = [CASES[name] for name in options.only]
    if options.batch or options.steps:
        cases = [
            Case(c.kind, c.hidden, options.batch or c.batch, options.steps or c.steps)
            for c in cases
        ]
    if options.smoke:
        sizes = (options.batch or 2, options.steps or 3)
        cases = [Case(kind, 32, *sizes) for kind in dict.fromkeys(case.kind for case in cases)]
    for case in cases:
        for divisor in options.divisors:
            if options.memory:
                row = memory_of_sides(case, divisor, options)
            else:
                measured = measure(case, divisor, options)
                show(measured)
                row = asdict(measured)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                with options.json.open("a") as record:
                    record.write(json.dumps({**environment(), **row}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
