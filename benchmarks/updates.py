"""Time and memory of a training step with low-rank updates, beside dense, frozen and PEFT's LoRA.

    pip install peft==0.21.2
    python benchmarks/updates.py layer [--ranks 4 16 64] [--threads 1 2] [--json FILE]
    python benchmarks/updates.py step [--ranks 4 16] [--threads 1 2] [--json FILE]
    python benchmarks/updates.py memory [--ranks 4 16] [--json FILE]

`layer`: three times one linear layer 768 -> 768 with a frozen weight, 2,048 rows, forward and
backward with the gradient of its input. What an update adds to the frozen layer is the figure,
beside what PEFT's LoRA adds. `step`: two blocks of GPT-2's form (width 768), 8 x 256 tokens,
forward, backward and a fused AdamW step; updates of all four linear layers of each block, one and
many heads. "frozen" trains embeddings, norms and head alone, as all rows of updates do. LTE's step
holds its share of a merge every 10 steps. Each round times every side once, in turn; medians
[quartiles] of the process's processor time: with several threads that is the sum over them.

`memory`: the most bytes alive within a later step of the same network, every storage counted while
it lives, in a process of its own for each side.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankwise
from gradient_memory import Live
from rankwise.layers import AdaptedLayer, LowRankLinear
from rankwise.method import Method
from rankwise.models.transformer import Transformer
from rankwise.training import environment

BASE = "frozen"  # the side that others are compared with
RESULTS = Path(__file__).parent / "results"
WIDTH, LAYERS, BATCH, CONTEXT, VOCABULARY = 768, 2, 8, 256, 256
MERGE_EVERY, MIB = 10, 2**20
NAMES = ("qkv", "out", "up", "down")
KINDS = ("weights", "gradients", "states", "rest")


def network() -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        vocabulary=VOCABULARY,
        width=WIDTH,
        layers=LAYERS,
        heads=12,
        hidden=4 * WIDTH,
        context=CONTEXT,
        form="gpt2",
    )


def peft(model: nn.Module, rank: int, names: Sequence[str]) -> nn.Module:
    """PEFT's LoRA of scale 2 on the layers of these names; all else as it was.

    Raises:
        SystemExit: the package is missing; says how to install it.
    """
    library = _peft()
    learned = [p for p in model.parameters() if p.requires_grad]
    config = library.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(names))
    adapted = library.inject_adapter_in_model(config, model)
    frozen = {
        module.base_layer.weight
        for module in adapted.modules()
        if isinstance(module, library.tuners.lora.LoraLayer)
    }
    for parameter in learned:
        parameter.requires_grad_(parameter not in frozen)
    return adapted


def _peft() -> Any:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        # One built for another torch, which transformers would stumble over: as if it were absent.
        sys.modules["torchvision"] = None  # pyright: ignore[reportArgumentType]
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise SystemExit("PEFT is missing: pip install peft==0.21.2") from error


# ------------------------------------------------------------------------------------- one layer


def layers(rank: int) -> dict[str, Callable[[], None]]:
    """Forward and backward of one layer, for each side."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH * CONTEXT, WIDTH, generator=generator).requires_grad_()
    cotangent = torch.randn(BATCH * CONTEXT, WIDTH, generator=generator)
    frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    ours = AdaptedLayer.of(nn.Linear(WIDTH, WIDTH), LowRankLinear, rank, scale=2.0)
    ours.base.bias.requires_grad_(False)
    ours.restart_("kaiming", generator)
    theirs = peft(nn.Sequential(nn.Linear(WIDTH, WIDTH)), rank, ["0"])
    theirs.requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)

    def once(layer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            for _ in range(3):  # in turn with the others, but not with what they left in the cache
                x.grad = None
                layer.zero_grad()
                layer(x).backward(cotangent)

        return run

    return {"frozen": once(frozen), "LoRA": once(ours), "PEFT": once(theirs)}


# ----------------------------------------------------------------------------------- whole steps


def lte(heads: int, rank: int, mode: str) -> Method:
    options = {"alpha": 2.0 * rank, "layers": "blocks.*", "merge_every": MERGE_EVERY}
    return rankwise.LTE(heads=heads, rank=rank, mode=mode, **options)


def lora(rank: int) -> Method:
    return rankwise.LoRA(rank=rank, alpha=2.0 * rank, layers="blocks.*", others="all")


def sides(rank: int) -> dict[str, Callable[[], Training]]:
    """What is compared at a rank."""
    total = {f"LoRA, rank {h * rank}": lambda h=h: Training(lora(h * rank)) for h in (1, 4)}
    theirs = {f"PEFT, rank {h * rank}": lambda h=h: Training(peft_rank=h * rank) for h in (1, 4)}
    many = {
        f"{mode}, {h} heads of {rank}": lambda h=h, mode=mode: Training(lte(h, rank, mode))
        for mode in ("parallel", "sequential")
        for h in (1, 2, 4, 8)
    }
    return {
        "dense": lambda: Training(rankwise.Dense()),
        "frozen": lambda: Training(frozen=True),
        **total,
        **theirs,
        **many,
    }


class Training:
    """A network under one side's training."""

    def __init__(
        self, method: Method | None = None, *, frozen: bool = False, peft_rank: int = 0
    ) -> None:
        self.model: Any = network()
        if frozen:
            self.model.blocks.requires_grad_(False)
        if peft_rank:
            self.model = peft(self.model, peft_rank, NAMES)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
        sample = torch.zeros(BATCH, CONTEXT, dtype=torch.int64)
        if method is not None:
            self.run = rankwise.start(self.model, method, self.optimizer, sample=sample)
        self.tokens = torch.randint(
            VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(1)
        )

    def backward(self) -> None:
        scores = self.model(self.tokens[:, :-1]).flatten(0, 1)
        F.cross_entropy(scores, self.tokens[:, 1:].flatten()).backward()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()


def rounds(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of the processor of every side, once a round, after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 2):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if number >= 2:
                times[name].append((time.process_time() - began) * 1e3)
    return times


def merge_times(trainings: dict[str, Training], times: dict[str, list[float]]) -> None:
    """Add to a parallel side its share of a merge; the steps timed were too few to hold one."""
    for name, training in trainings.items():
        if not name.startswith("parallel"):
            continue
        method: Any = training.run.methods[0]
        merges = rounds({"": lambda u=method.updates: u.merge(1)}, 3)[""]
        share = statistics.median(merges) / MERGE_EVERY
        times[name] = [t + share for t in times[name]]


# ---------------------------------------------------------------------------------------- memory


def memory(rank: int, name: str) -> dict[str, Any]:
    """Bytes of one side: kept between steps, and the most within a later one."""
    torch.set_num_threads(1)
    live = Live()
    with live:
        training = sides(rank)[name]()
        for tensor in (*training.model.parameters(), *training.model.buffers()):
            live.add(tensor, "weights")
        for _ in range(3):
            live.peak = dict(live.now)
            training.step()
            for parameter in training.model.parameters():
                if parameter.grad is not None:
                    live.add(parameter.grad, "gradients")
            for state in training.optimizer.state.values():
                for tensor in state.values():
                    if isinstance(tensor, Tensor):
                        live.add(tensor, "states")
        peak, now = dict(live.peak), dict(live.now)
    learning = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    return {
        "side": name,
        "rank": rank,
        "trainable": learning,
        "kept": {kind: now[kind] / MIB for kind in KINDS[:3]},
        "peak": sum(peak.values()) / MIB,
    }


# ------------------------------------------------------------------------------------- the tables


def show_times(title: str, times: dict[str, list[float]], base: str = BASE) -> None:
    print(f"\n{title}, ms")
    middle = {name: statistics.median(each) for name, each in times.items()}
    for name, each in times.items():
        low, _, high = statistics.quantiles(each, n=4, method="inclusive")
        added = middle[name] - middle[base]
        print(
            f"  {name:<28}{middle[name]:>9.1f} [{low:.1f}, {high:.1f}]"
            f"{middle[name] / middle[base]:>8.3f} of {base}{added:>9.1f} more"
        )


def figures(rank: int, times: dict[str, list[float]]) -> dict[str, float]:
    """The ratios that the goals are about, as far as their sides were timed."""
    middle = {name: statistics.median(each) for name, each in times.items()}
    four, one = f"parallel, 4 heads of {rank}", f"LoRA, rank {4 * rank}"
    pairs = {
        "4 heads / 1 head of 4 ranks": (four, one),
        "sequential / parallel, 4 heads": (f"sequential, 4 heads of {rank}", four),
    }
    found = {n: middle[a] / middle[b] for n, (a, b) in pairs.items() if {a, b} <= middle.keys()}
    for ours, theirs in (("LoRA", "PEFT"), (f"LoRA, rank {rank}", f"PEFT, rank {rank}")):
        if {ours, theirs, "frozen"} <= middle.keys():
            added = [middle[name] - middle["frozen"] for name in (ours, theirs)]
            found["added, LoRA / PEFT"] = added[0] / added[1]
    return found


def show_memory(rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{'rank':>4} {'side':<28}{'trainable':>11}" + "".join(f"{k:>11}" for k in KINDS[:3]))
    for row in rows:
        kept = "".join(f"{row['kept'][kind]:>11.1f}" for kind in KINDS[:3])
        print(f"{row['rank']:>4} {row['side']:<28}{row['trainable']:>11,}{kept}{row['peak']:>9.1f}")
    print("MiB; last column: the most within a step")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["layer", "step", "memory"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=7, help="rounds, at least 2")
    parser.add_argument("--sides", nargs="+", help="of step and memory; all without it")
    parser.add_argument("--json", type=Path, help="record to add to")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # memory, in its own process
    options = parser.parse_args(argv)
    if options.what == "step" and options.sides and BASE not in options.sides:
        parser.error(f"--sides: {BASE!r} is what the others are compared with; name it, too")
    known = {name for rank in options.ranks for name in sides(rank)}
    if unknown_ones := sorted(set(options.sides or ()) - known):
        parser.error(f"--sides: there is no {unknown_ones[0]!r}, only {sorted(known)}")
    return options


def timed(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for threads, rank in itertools.product(options.threads, options.ranks):
        torch.set_num_threads(threads)
        trainings: dict[str, Training] = {}
        if options.what == "layer":
            runs = layers(rank)
        else:
            chosen = {n: m for n, m in sides(rank).items() if n in (options.sides or sides(rank))}
            trainings = {name: make() for name, make in chosen.items()}
            runs = {name: each.step for name, each in trainings.items()}
        times = rounds(runs, options.repeats)
        merge_times(trainings, times)
        show_times(f"{options.what}, rank {rank}, {threads} thread(s)", times)
        ratios = figures(rank, times)
        for name, value in ratios.items():
            print(f"  {name:<32}{value:>8.3f}")
        rows.append({"rank": rank, "threads": threads, "times": times, "figures": ratios})
        del trainings, runs
        gc.collect()
    return rows


def weighed(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for rank in options.ranks:
        for name in options.sides or sides(rank):
            command = [sys.executable, __file__, "memory", "--ranks", str(rank), "--one", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    show_memory(rows)
    return rows


def add_to_record(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Append what a call measured, and where, to the file that it names."""
    before = json.loads(options.json.read_text()) if options.json.exists() else []
    entry = {
        "what": options.what,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": environment.commit(),
        "versions": environment.versions(),
        "hardware": environment.hardware(torch.device("cpu"), max(options.threads)),
        "repeats": options.repeats,
        "rows": rows,
    }
    options.json.write_text(json.dumps([*before, entry], indent=1) + "\n")
    print(f"\nwritten: {options.json}")


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if options.one:
        print(json.dumps(memory(options.ranks[0], options.one)))
        return 0
    rows = weighed(options) if options.what == "memory" else timed(options)
    if options.json is not None:
        add_to_record(options, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
