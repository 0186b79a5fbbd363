"""Time and memory of a training step with AdaLoRA, before and after its tensors shrink.

    pip install peft==0.21.2
    python benchmarks/adalora.py step [--ranks 12:8 64:16] [--threads 1] [--json FILE]
    python benchmarks/adalora.py memory [--ranks 12:8 64:16] [--json FILE]

The network of benchmarks/updates.py: two blocks of GPT-2's form (width 768), 8 x 256 tokens, fused
AdamW, updates of all four linear layers of each block; "frozen" trains embeddings, norms and head
alone, as all other rows do. "falling" is a step while the budget falls, with its share of an
allocation every 10 steps; "final" one behind the last allocation: "shrunk" where tensors have
become smaller, "masked" where they have not, as in PEFT, whose loop is the one it documents. Each
round times every side once, in turn; medians [quartiles]. Processor time of the process, of which
other processes take less than of the clock's. `memory`: the most bytes alive within a later step,
every storage counted while it lives, in a process of its own for each side.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankwise
import updates
from gradient_memory import Live
from rankwise.method import Method
from updates import BATCH, CONTEXT, KINDS, MIB, NAMES, VOCABULARY

EVERY, LONG, SHORT = 10, 10**6, 3  # steps between allocations; of runs that never, or soon, end


class Side:
    """A network under one side's training; `model` returns a loss."""

    model: Any
    optimizer: torch.optim.Optimizer

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=generator)

    def step(self) -> None:
        """Forward, backward, optimizer, and what the method does around it."""
        self.optimizer.zero_grad()
        self.model(self.tokens).loss.backward()
        self.optimizer.step()

    def kept(self) -> list[Tensor]:
        """What the method keeps, beside weights and moments."""
        return []

    def share(self) -> float:
        """Milliseconds of a step's share of an allocation."""
        return 0.0


class WithLoss(nn.Module):
    """As PEFT's AdaLoRA wants a model: its regulariser joins the loss that is returned."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Any:
        scores = self.model(tokens[:, :-1]).flatten(0, 1)
        return SimpleNamespace(loss=F.cross_entropy(scores, tokens[:, 1:].flatten()))


class Ours(Side):
    """A method of this library, trained until its tensors have shrunk if they are to."""

    def __init__(self, method: Method | None, *, steps: int = 0) -> None:
        super().__init__()
        network = updates.network()
        if method is None:
            network.blocks.requires_grad_(False)
        learning = [p for p in network.parameters() if p.requires_grad]
        self.model, self.method = WithLoss(network), method
        self.optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
        if method is not None:
            total = steps + LONG
            self.run = rankwise.start(network, method, self.optimizer, total_steps=total)
        for _ in range(steps):
            self.step()

    def kept(self) -> list[Tensor]:
        state: Any = {} if self.method is None else self.method.state_dict()
        return [tensor for part in state.values() for tensor in part.values()]

    def share(self) -> float:
        method: Any = self.method
        if not isinstance(method, rankwise.AdaLoRA) or self.run.step >= method.budget.ends:
            return 0.0
        held = method.triplets
        every = held.matrices * method.initial_rank
        times = rounds({"": lambda: held.allocate(every)}, 5)[""]
        return statistics.median(times) / EVERY


class Theirs(Side):
    """PEFT's LoRA or AdaLoRA; all else learns as in the other rows."""

    def __init__(self, first: int, last: int = 0, *, final: bool = False) -> None:
        super().__init__()
        library = updates._peft()
        network = WithLoss(updates.network())
        learned = [p for p in network.parameters() if p.requires_grad]
        schedule = {"total_step": LONG, "tinit": 1, "tfinal": LONG - SHORT if final else 1}
        config = (
            library.AdaLoraConfig(
                init_r=first, target_r=last, deltaT=EVERY, **schedule, **self.shared(first)
            )
            if last
            else library.LoraConfig(r=first, **self.shared(first))
        )
        peft = library.get_peft_model(network, config)
        self.model, self.adaptive, self.number = peft.base_model, bool(last), 0
        frozen = {
            module.base_layer.weight
            for module in peft.modules()
            if isinstance(module, library.tuners.lora.LoraLayer)
        }
        for parameter in learned:
            parameter.requires_grad_(parameter not in frozen)
        learning = [p for p in peft.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
        for _ in range(SHORT + 1 if final else 2):
            self.step()

    @staticmethod
    def shared(rank: int) -> dict[str, Any]:
        """Scale 2 and the layers, of both."""
        return {"lora_alpha": 2 * rank, "target_modules": list(NAMES)}

    def step(self) -> None:
        super().step()
        self.number += 1
        if self.adaptive and self.number % EVERY:  # allocations are timed apart
            self.model.update_and_allocate(self.number)

    def kept(self) -> list[Tensor]:
        if not self.adaptive:
            return []
        allocator = self.model.rankallocator
        states = (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc)
        return [tensor for state in states for tensor in state.values()]

    def share(self) -> float:
        if not self.adaptive or not self.model.rankallocator.exp_avg_ipt:
            return 0.0
        allocator, network = self.model.rankallocator, self.model.model
        every = allocator.init_bgt - 1
        times = rounds({"": lambda: allocator.mask_to_budget(network, every)}, 5)[""]
        return statistics.median(times) / EVERY


def adalora(first: int, last: int, *, final: bool = False, shrink: str = "final") -> Method:
    """The method, in a run that is in its falling or soon in its final phase."""
    return rankwise.AdaLoRA(
        initial_rank=first,
        target_rank=last,
        alpha=2.0 * first,
        warmup=1,
        final=LONG if final else 1,
        every=EVERY,
        layers="blocks.*",
        others="all",
        shrink=shrink,
    )


def sides(first: int, last: int) -> dict[str, Callable[[], Side]]:
    """What is compared at an initial and a final rank."""

    def soon(shrink: str) -> Ours:
        return Ours(adalora(first, last, final=True, shrink=shrink), steps=SHORT)

    return {
        "frozen": lambda: Ours(None),
        f"LoRA, rank {first}": lambda: Ours(updates.lora(first)),
        f"LoRA, rank {last}": lambda: Ours(updates.lora(last)),
        "AdaLoRA, falling": lambda: Ours(adalora(first, last)),
        "AdaLoRA, final, masked": lambda: soon("none"),
        "AdaLoRA, final, shrunk": lambda: soon("final"),
        f"PEFT LoRA, rank {first}": lambda: Theirs(first),
        "PEFT AdaLoRA, falling": lambda: Theirs(first, last),
        "PEFT AdaLoRA, final": lambda: Theirs(first, last, final=True),
    }


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


def memory(first: int, last: int, name: str) -> dict[str, Any]:
    """Bytes of one side: kept between steps, and the most within a later one."""
    torch.set_num_threads(1)
    live = Live()
    with live:
        side = sides(first, last)[name]()
        gc.collect()
        for _ in range(3):
            live.peak = dict(live.now)
            side.step()
            for tensor in (*side.model.parameters(), *side.model.buffers()):
                live.add(tensor, "weights")
            for parameter in side.model.parameters():
                if parameter.grad is not None:
                    live.add(parameter.grad, "gradients")
            moments = (t for s in side.optimizer.state.values() for t in s.values())
            for tensor in (*moments, *side.kept()):
                if isinstance(tensor, Tensor):
                    live.add(tensor, "states")
        peak, now = dict(live.peak), dict(live.now)
    learning = sum(p.numel() for p in side.model.parameters() if p.requires_grad)
    return {
        "side": name,
        "ranks": [first, last],
        "trainable": learning,
        "kept": {kind: now[kind] / MIB for kind in KINDS[:3]},
        "peak": sum(peak.values()) / MIB,
    }


def timed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return step times, allocations shared out."""
    rows = []
    for threads, (first, last) in itertools.product(options.threads, options.ranks):
        torch.set_num_threads(threads)
        chosen = {n: m for n, m in sides(first, last).items() if n in (options.sides or [n])}
        held = {name: make() for name, make in chosen.items()}
        times = rounds({name: side.step for name, side in held.items()}, options.repeats)
        for name, side in held.items():
            share = side.share()
            times[name] = [each + share for each in times[name]]
        updates.show_times(f"ranks {first} to {last}, {threads} thread(s)", times, "frozen")
        rows.append({"ranks": [first, last], "threads": threads, "times": times})
        del held
        gc.collect()
    return rows


def weighed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print and return bytes, every side in a process of its own."""
    rows = []
    for first, last in options.ranks:
        for name in options.sides or sides(first, last):
            pair = f"{first}:{last}"
            command = [sys.executable, __file__, "memory", "--ranks", pair, "--one", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"\n{'ranks':>7} {'side':<24}{'trainable':>11}" + "".join(f"{k:>11}" for k in KINDS[:3]))
    for row in rows:
        kept = "".join(f"{row['kept'][kind]:>11.1f}" for kind in KINDS[:3])
        pair = ":".join(map(str, row["ranks"]))
        print(f"{pair:>7} {row['side']:<24}{row['trainable']:>11,}{kept}{row['peak']:>9.1f}")
    print("MiB; states hold moments, importance and masks; last column: the most within a step")
    return rows


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["step", "memory"])
    parser.add_argument("--ranks", type=_pair, nargs="+", default=[(12, 8), (64, 16)])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=7, help="rounds, at least 2")
    parser.add_argument("--sides", nargs="+", help="all without it; of step frozen is one")
    parser.add_argument("--json", type=Path, help="record to add to")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # memory, in its own process
    return parser.parse_args(argv)


def _pair(text: str) -> tuple[int, int]:
    first, last = map(int, text.split(":"))
    return first, last


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and record."""
    options = arguments(argv)
    if options.one:
        first, last = options.ranks[0]
        print(json.dumps(memory(first, last, options.one)))
        return 0
    rows = weighed(options) if options.what == "memory" else timed(options)
    if options.json is not None:
        updates.add_to_record(options, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
