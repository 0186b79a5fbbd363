"""Step time: forward + backward + fused Adam, dense against low-rank, interleaved in one process.

    python benchmarks/step_time.py [--threads 1 2] [--repeats N] [--only NAME] [--json FILE]

Beside the library's layers stands a peer: the same factors as a plain nn.Sequential of two torch
modules. Every side runs in the memory format that is fastest for it, all at the same batch size.
The limit is the ratio of FLOPs (forward and backward, no gradient for the input). Each round times
every side once, so a ratio compares neighbours in time; the table gives the median of the rounds.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import rankwise
from rankwise import models

RESULTS = Path(__file__).parent / "results"
SIDES: tuple[str, ...] = ("dense", "low-rank", "plain pair")
SEED = 0
# On a machine that others use too, one thread's own processor time is the steadier measure.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network and how it becomes low-rank.

    Attributes:
        model: its name in `rankwise.models`.
        batch: samples per step, the same on every side.
        rank: a rank (int) or a ratio (float).
        shape: one input.
        layers: which layers become low-rank, as `rankwise.factorize` takes it.
        formats: memory formats that are tried.
        goal: the ratio aimed at with one thread, or None.
        goal_share: the same as a share of the FLOP ratio.
    """

    model: str
    batch: int
    rank: int | float
    shape: tuple[int, ...] = (1, 28, 28)
    layers: str | Callable[[str, nn.Module], bool] = "auto"
    formats: tuple[str, ...] = ("contiguous",)
    goal: float | None = None
    goal_share: float | None = None


def beyond_the_first_stage(name: str, module: nn.Module) -> bool:
    """Pufferfish's hybrid: every 3x3 convolution but those of the stem and of the first stage."""
    inside = not name.startswith(("stem", "layer1"))
    return inside and isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)


IMAGES: Any = {"layers": beyond_the_first_stage, "formats": ("contiguous", "channels_last")}
CASES = (
    Case(model="mlp-128x4", batch=256, rank=16, goal=1.35),
    Case(model="mlp-512x8", batch=512, rank=64, goal=2.75),
    Case(model="resnet-small", batch=64, rank=0.25, **IMAGES),
    Case(model="resnet-18", batch=16, rank=0.25, shape=(3, 32, 32), goal_share=0.95, **IMAGES),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one network; times in milliseconds per step, `times` round by round."""

    network: str
    batch: int
    threads: int
    formats: dict[str, str]
    times: dict[str, list[float]]
    median_ms: dict[str, float]
    ratio: tuple[float, float, float]  # quartiles of dense / low-rank
    peer: tuple[float, float, float]  # quartiles of dense / plain pair
    flop_ratio: float
    goal: float | None
    profile_ms: dict[str, dict[str, float]]  # empty unless asked for, or the goal was missed


def low_rank(dense: nn.Module, case: Case) -> nn.Module:
    model = copy.deepcopy(dense)
    rank = case.rank
    rule = rankwise.ranks.Fixed(rank) if isinstance(rank, int) else rankwise.ranks.Ratio(rank)
    # The values of the factors do not matter here, and drawing them is faster than an SVD.
    rankwise.factorize(model, rule, layers=case.layers, init="variance")
    return model


def plain_pairs(model: nn.Module) -> nn.Module:
    """The peer: a copy whose low-rank layers are plain sequences of the same two modules."""
    peer = copy.deepcopy(model)
    low = (rankwise.layers.LowRankLinear, rankwise.layers.LowRankConv2d)
    for name, layer in list(peer.named_modules()):
        if isinstance(layer, low):
            parent, _, leaf = name.rpartition(".")
            setattr(peer.get_submodule(parent), leaf, nn.Sequential(layer.v, layer.u))
    return peer


def flops(model: nn.Module, case: Case) -> int:
    """Of forward and backward; on the meta device, where the counter misses nothing."""
    model = copy.deepcopy(model).to("meta")
    x = torch.empty(case.batch, *case.shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


def stepper(model: nn.Module, case: Case, memory_format: str) -> Callable[[], None]:
    """One training step as a call, on random data that is drawn once."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(case.batch, *case.shape, generator=generator)
    y = torch.randint(0, 10, (case.batch,), generator=generator)
    model = copy.deepcopy(model)
    if memory_format == "channels_last":
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def rounds(
    steps: dict[Any, Callable[[], None]], repeats: int, seconds: float, clock: Callable[[], float]
) -> dict[Any, list[float]]:
    """Milliseconds per step of every side, one entry per round; every other round runs backwards.

    Args:
        steps: side -> one step.
        repeats: rounds, after a warm-up.
        seconds: how long one side runs within a round, at least one step.
        clock: what to read the time from, in seconds.
    """
    per_step = max(min(_seconds(step, 1, clock) for _ in range(2)) for step in steps.values())
    count = max(1, round(seconds / per_step))
    times: dict[Any, list[float]] = {side: [] for side in steps}
    for turn in range(repeats):
        for side in list(steps) if turn % 2 == 0 else list(steps)[::-1]:
            times[side].append(1e3 * _seconds(steps[side], count, clock))
    return times


def _seconds(step: Callable[[], None], count: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(count):
        step()
    return (clock() - start) / count


GROUPS = {
    "matrix product": ("aten::mm", "aten::addmm", "convolution"),
    "normalisation": ("batch_norm",),
    "optimizer": ("Optimizer.", "_fused_adam", "_foreach"),
    "activation, sum, copy": (
        *("clamp_min", "threshold_backward", "relu", "aten::sum", "aten::add"),
        *("aten::copy_", "softmax", "aten::mean", "aten::div", "aten::fill_", "aten::zero"),
    ),
}


def where_time_goes(step: Callable[[], None], count: int) -> dict[str, float]:
    """Milliseconds per step by kind of operation; what has no kind is dispatch and Python."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(count):
            step()
    total = dict.fromkeys((*GROUPS, "dispatch and Python"), 0.0)
    for event in record.key_averages():
        # Autograd's node names contain the operations they run; only the latter do the work.
        known = "" if event.key.startswith("autograd::") else event.key
        group = next((g for g, keys in GROUPS.items() if any(k in known for k in keys)), None)
        total[group or "dispatch and Python"] += event.self_cpu_time_total / 1e3 / count
    return total


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def measure(case: Case, threads: int, options: argparse.Namespace) -> Row:
    repeats, seconds, clock = options.repeats, options.seconds, CLOCKS[options.clock]
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    dense = models.build(case.model, input_shape=case.shape)
    low = low_rank(dense, case)
    networks = dict(zip(SIDES, (dense, low, plain_pairs(low)), strict=True))
    tried = {
        (side, form): stepper(networks[side], case, form)
        for side, form in itertools.product(SIDES, case.formats)
    }
    formats: dict[str, str] = dict.fromkeys(SIDES, case.formats[0])
    if len(case.formats) > 1:
        trial = {
            k: statistics.median(t)
            for k, t in rounds(tried, min(5, repeats), seconds, clock).items()
        }
        formats = {s: min(case.formats, key=lambda f, s=s: trial[s, f]) for s in SIDES}
    steps = {side: tried[side, formats[side]] for side in SIDES}
    times = rounds(steps, repeats, seconds, clock)
    by_round = {
        side: quartiles([a / b for a, b in zip(times["dense"], times[side], strict=True)])
        for side in SIDES
    }
    limit = flops(dense, case) / flops(low, case)
    goal = case.goal_share * limit if case.goal_share else case.goal
    goal = goal if threads == 1 else None  # they are stated for one thread
    explain = options.profile or (goal is not None and by_round["low-rank"][1] < goal)
    count = 1 if options.smoke else 5
    return Row(
        network=case.model,
        batch=case.batch,
        threads=threads,
        formats=formats,
        times=times,
        median_ms={side: statistics.median(t) for side, t in times.items()},
        ratio=by_round["low-rank"],
        peer=by_round["plain pair"],
        flop_ratio=limit,
        goal=goal,
        profile_ms={side: where_time_goes(steps[side], count) for side in SIDES if explain},
    )


def show(row: Row) -> None:
    low, ratio, high = row.ratio
    formats = "/".join({"contiguous": "c", "channels_last": "cl"}[row.formats[s]] for s in SIDES)
    goal = f"{row.goal:.2f}" if row.goal else "-"
    print(
        f"{row.network:<13}{row.batch:>6}{row.threads:>4}  {formats:<9}"
        f"{row.median_ms['dense']:>9.2f}{row.median_ms['low-rank']:>9.2f}"
        f"{ratio:>7.2f} [{low:.2f}, {high:.2f}]{row.flop_ratio:>7.2f}{ratio / row.flop_ratio:>7.0%}"
        f"{row.peer[1]:>7.2f} [{row.peer[0]:.2f}, {row.peer[2]:.2f}]{goal:>6}",
        flush=True,
    )


def show_profile(row: Row) -> None:
    print(f"\n{row.network}, {row.threads} thread(s), ms per step (profiler on)")
    print("".join(f"{name:>24}" for name in ("", *SIDES)))
    for group in row.profile_ms["dense"]:
        values = "".join(f"{row.profile_ms[side][group]:>24.2f}" for side in SIDES)
        print(f"{group:>24}{values}")


def environment() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "rankwise": rankwise.__version__,
        },
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "simd": torch.backends.cpu.get_cpu_capability(),
            "load_before": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        },
        "seed": SEED,
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=21, help="rounds, at least 5")
    parser.add_argument("--only", choices=[case.model for case in CASES], help="one network")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--batch", type=int, help="batch size on every side")
    parser.add_argument("--json", type=Path, help="record; benchmarks/results/... by default")
    parser.add_argument("--profile", action="store_true", help="say where the time of a step goes")
    parser.add_argument("--smoke", action="store_true", help="seconds, not minutes; no record")
    options = parser.parse_args(argv)
    if options.repeats < 5:
        parser.error(f"--repeats {options.repeats}: quartiles need at least 5 rounds")
    if min(options.threads) < 1:
        parser.error(f"--threads {min(options.threads)}: at least 1")
    if options.clock == "cpu" and options.threads != [1]:
        parser.error("--clock cpu adds up the threads' times; use it with --threads 1")
    if options.batch is not None and options.batch < 2:
        parser.error(f"--batch {options.batch}: BatchNorm needs at least 2 samples")
    # One step per side and round on a batch of two: says nothing about speed, all about the script.
    options.seconds = 0.0 if options.smoke else 0.2
    options.repeats = 2 if options.smoke else options.repeats
    return options


def selected(options: argparse.Namespace) -> list[Case]:
    batch = options.batch or (2 if options.smoke else None)
    return [
        Case(**{**vars(case), "batch": batch or case.batch})
        for case in CASES
        if options.only in (None, case.model)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    record = {
        **environment(),
        "clock": options.clock,
        "repeats": options.repeats,
        "seconds_per_side_and_round": options.seconds,
    }
    print(f"{record['hardware']['processor']}, torch {torch.__version__}, {options.repeats} rounds")
    print("format: c contiguous, cl channels_last (dense/low-rank/pair); [quartiles]; limit: FLOPs")
    print(
        f"{'network':<13}{'batch':>6}{'thr':>4}  {'format':<9}{'dense ms':>9}{'low ms':>9}"
        f"{'ratio':>7}{'':<13}{'limit':>7}{'share':>7}{'pair':>7}{'':<13}{'goal':>6}"
    )
    rows = []
    for threads, case in itertools.product(options.threads, selected(options)):
        rows.append(measure(case, threads, options))
        show(rows[-1])
    for row in rows:
        if row.profile_ms:
            show_profile(row)
    stamp = record["date"].replace(":", "").replace("+0000", "Z")
    path = options.json or (None if options.smoke else RESULTS / f"step_time-{stamp}.json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**record, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
        print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
