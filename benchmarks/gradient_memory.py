"""Memory of a training step with low-rank gradients, measured: every tensor that is alive.

    pip install --no-deps galore-torch==1.0; pip install --no-deps --target low-bit torchao==0.18.0
    PYTHONPATH=low-bit python benchmarks/gradient_memory.py [--models NAME ...] [--sides NAME ...]
        [--json FILE]

Each side trains the whole network for 5 steps of two micro-batches of 32 tokens with clipping at
norm 1, in a process of its own. All storages that torch makes are counted while they live. `kept`
is what is alive when the gradients are accumulated: weights, gradients and states (moments, bases),
apart, on the least of the later steps (a matrix that is due for a new basis holds its dense
gradient); `peak` is the most within a later step, refreshes, activations and passing tensors
included. Rank is a quarter of the width. The published per-layer form steps in
backward, so it can neither accumulate nor clip: each of its micro-batches is a step. Beside `kept`
stands what `rankwise.accounting.memory` predicts without training. A call with --json FILE goes on
with the sides that the file does not have; --predict shows the formula alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rankwise
from gradient_peers import galore_torch
from rankwise import accounting, models
from rankwise.methods import METHODS
from rankwise.training import environment

RESULTS = Path(__file__).parent / "results"
NETWORKS = ("llama-60m", "llama-130m", "llama-350m")
STEPS, MICRO, TOKENS = 5, 2, 32
MIB = 2**20
KINDS: tuple[str, ...] = ("weights", "gradients", "states", "rest")


class Live(TorchDispatchMode):
    """Bytes of all storages that are alive, by what they are for, and the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.kinds: dict[int, str] = {}
        self.now: dict[str, int] = {kind: 0 for kind in KINDS}
        self.peak = dict(self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a storage from now on; a `kind` given later moves it there."""
        if type(tensor) not in (Tensor, nn.Parameter):
            tensors = _inside(tensor)
            if tensors is not None:
                for part in tensors:
                    self.add(part, kind)
                return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            if not size:
                return
            self.sizes[key], self.kinds[key] = size, "rest"
            self.now["rest"] += size
            weakref.finalize(storage, self.drop, key)
        if kind is not None and self.kinds[key] != kind:
            self.now[self.kinds[key]] -= self.sizes[key]
            self.now[kind] += self.sizes[key]
            self.kinds[key] = kind
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = dict(self.now)

    def drop(self, key: int) -> None:
        """A storage is gone."""
        self.now[self.kinds.pop(key)] -= self.sizes.pop(key)


def _inside(tensor: Tensor) -> list[Tensor] | None:
    """The plain tensors that a subclass stands for; None if it has a storage of its own."""
    parts = getattr(tensor, "parts", None)
    if callable(parts):  # a projected gradient
        held = list(parts())  # pyright: ignore[reportArgumentType]
        full = getattr(tensor, "full", None)
        return held if full is None or any(full is part for part in held) else [*held, full]
    names = getattr(tensor, "__tensor_flatten__", None)
    if names is None:
        return None
    inner_tensors = [getattr(tensor, name) for name in names()[0]]
    return [leaf for each in inner_tensors for leaf in (_inside(each) or [each])]


@dataclass(frozen=True)
class Side:
    """One way to train.

    Attributes:
        method: of the registry; or "galore-torch" for the published program.
        options: of the method.
        per_layer: step each weight in backward (the published program's second form).
        bits: of the base optimizer's states.
        weight_bits: of the projected weights; Q-GaLore's bases then have 4.
        gradients: what is accumulated of a projected matrix: the "small" gradient, the "dense"
            one (residual methods project it at the first look, as clipping takes), or "sketch":
            the small one and as many numbers as the basis has.
    """

    method: str
    options: Mapping[str, Any]
    per_layer: bool = False
    bits: int = 32
    weight_bits: int | None = None
    gradients: str = "small"


SIDES = {
    "AdamW": Side("dense", {}),
    "galore-torch": Side("galore-torch", {}, gradients="dense"),
    "galore-torch per layer": Side("galore-torch", {}, per_layer=True),
    "GaLore": Side("galore", {"every": 200}),
    "GaLore, embedding and head too": Side("galore", {"every": 200, "layers": "*.weight"}),
    "GaLore, 8-bit base": Side("galore", {"every": 200}, bits=8),
    "Q-GaLore, 8-bit weights and base": Side(
        "qgalore", {"every": 200, "weight_bits": 8}, bits=8, weight_bits=8
    ),
    "APOLLO": Side("apollo", {"every": 200}, gradients="dense"),
    "Fira": Side("fira", {"every": 200}, gradients="dense"),
    "tracked": Side("tracked", {}, gradients="sketch"),
}


def base(parameters: Any, bits: int) -> Optimizer:
    if bits == 32:
        return AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    try:
        from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(f"{error}: pip install --no-deps torchao==0.18.0") from error
    return AdamW8bit(parameters, lr=1e-4, weight_decay=0.0)


def inner(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2}


class Training:
    """A network with its optimizer, trained step by step under the counter."""

    def __init__(self, name: str, side: Side, live: Live) -> None:
        self.side, self.live = side, live
        torch.manual_seed(0)
        self.model = models.build(name)
        for parameter in self.model.parameters():
            live.add(parameter, "weights")
        self.rank = rank_of(self.model)
        self.vocabulary = models.MODELS[name].classes
        self.run: rankwise.Run | None = None
        self.optimizers: list[Optimizer] = []
        if side.method == "galore-torch":
            self._peer()
        else:
            optimizer = base(self.model.parameters(), side.bits)
            options = dict(side.options)
            if side.method != "dense":
                options["rank"] = self.rank
            method = METHODS[side.method](**options)
            sample = models.sample(name)
            self.run = rankwise.start(self.model, method, optimizer, sample=sample)
            self.optimizers = [optimizer]
        for parameter in self.model.parameters():
            live.add(parameter, "weights")  # those in 8 bits are new
            parameter.register_post_accumulate_grad_hook(self._tag_gradient)

    def _peer(self) -> None:
        chosen = inner(self.model)
        held = set(chosen.values())
        others = [p for p in self.model.parameters() if p not in held]
        options: Any = {"rank": self.rank, "every": 10**9, "lr": 1e-4}
        if not self.side.per_layer:
            self.optimizers = [galore_torch(chosen.values(), others, **options)]
            return
        for parameter in self.model.parameters():
            one = (
                galore_torch([parameter], **options)
                if parameter in held
                else AdamW([parameter], lr=1e-4, weight_decay=0.0)
            )
            self.optimizers.append(one)

            def step(p: Tensor, one: Optimizer = one) -> None:
                one.step()
                one.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)

    def _tag_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.live.add(parameter.grad, "gradients")

    def backward(self, number: int) -> None:
        """Two micro-batches, accumulated."""
        generator = torch.Generator().manual_seed(number)
        for _ in range(MICRO):
            tokens = torch.randint(0, self.vocabulary, (1, TOKENS + 1), generator=generator)
            scores = self.model(tokens[:, :-1]).flatten(0, 1)
            (F.cross_entropy(scores, tokens[:, 1:].flatten()) / MICRO).backward()
        for parameter in self.model.parameters():
            self._tag_gradient(parameter)

    def step(self) -> None:
        """Clip, step, clear."""
        if not self.side.per_layer:
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            # torchao compiles its step, which nothing could be counted in.
            with torch.compiler.set_stance("force_eager"):
                for optimizer in self.optimizers:
                    optimizer.step()
        self._tag_states()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _tag_states(self) -> None:
        weights = {id(p) for p in self.model.parameters()}
        for optimizer in self.optimizers:
            for tensor in _tensors(list(optimizer.state.values())):
                self.live.add(tensor, "states")
            for group in optimizer.param_groups:
                for held in group["params"]:
                    if id(held) not in weights:  # a proxy
                        self.live.add(held.data, "states")
        if self.run is not None:
            for method in self.run.methods:
                for tensor in _tensors(method.state_dict()):
                    self.live.add(tensor, "states")
        for parameter in self.model.parameters():
            self.live.add(parameter, "weights")


def predicted(model: nn.Module, side: Side) -> dict[str, int]:
    """Bytes kept, by the formula; of the whole network, and of the projected matrices."""
    rank = rank_of(model)
    chosen: dict[str, int] = dict.fromkeys(inner(model), rank)
    if side.options.get("layers"):
        chosen = {n: rank for n, p in model.named_parameters() if p.dim() == 2}
    ranks = None if side.method == "dense" else chosen
    state_bytes = 4 if side.bits == 32 else 1 + 4 / 256
    sizes: dict[str, Any] = {"state_bytes": state_bytes}
    if side.weight_bits == 8:
        sizes |= {"weight_bytes": 1 + 4 / 256, "basis_bytes": 0.5}
    whole = accounting.memory(model, ranks=ranks, **sizes)
    if ranks is None:
        return {"weights": whole.weights, "gradients": whole.gradients, "states": whole.states}
    only = accounting.memory(model, ranks=ranks, only=True, **sizes)
    dense = accounting.memory(model, ranks=dict.fromkeys(ranks, 10**9), only=True)
    more = {
        "small": 0,
        "dense": dense.gradients - only.gradients,
        "sketch": only.bases,
    }[side.gradients]
    return {
        "weights": whole.weights,
        # In the per-layer form each one is gone when the next one comes.
        "gradients": 0 if side.per_layer else whole.gradients + more,
        "states": whole.states + whole.bases,
        "projected alone": only.beside_weights + (-only.gradients if side.per_layer else more),
        "the same dense": dense.gradients + dense.states,
    }


def rank_of(model: nn.Module) -> int:
    """A quarter of the width."""
    return model.get_parameter("norm.weight").numel() // 4


def predict(names: Sequence[str], sides: Sequence[str]) -> None:
    """The formula alone: nothing is built, nothing trained."""
    kinds = KINDS[:3]
    heads = "".join(f"{kind:>11}" for kind in (*kinds, "kept", "below", "projected", "below"))
    print(f"{'model':<12}{'side':<32}{heads}  MiB, predicted")
    for name in names:
        with torch.device("meta"):
            model = models.build(name)
        dense = sum(predicted(model, SIDES["AdamW"])[kind] for kind in kinds)
        for side in sides:
            found = predicted(model, SIDES[side])
            kept = sum(found[kind] for kind in kinds)
            figures = "".join(f"{found[kind] / MIB:>11.0f}" for kind in kinds)
            alone, same = found.get("projected alone"), found.get("the same dense")
            part = (
                ""
                if alone is None or same is None
                else f"{alone / MIB:>11.0f}{1 - alone / same:>11.1%}"
            )
            print(
                f"{name:<12}{side:<32}{figures}{kept / MIB:>11.0f}{1 - kept / dense:>11.1%}{part}"
            )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "ortho_matrix"):  # galore-torch keeps its basis in an object
        yield from _tensors(value.ortho_matrix)


@contextmanager
def counted(live: Live) -> Iterator[None]:
    with live:
        yield


def measure(name: str, side_name: str) -> dict[str, Any]:
    """Train one side on one network; MiB."""
    torch.set_num_threads(1)
    live, side = Live(), SIDES[side_name]
    peaks: list[dict[str, int]] = []
    accumulated: list[dict[str, int]] = []
    with counted(live):
        training = Training(name, side, live)
        for number in range(STEPS):
            live.peak = dict(live.now)
            training.backward(number)
            accumulated.append(dict(live.now))
            training.step()
            peaks.append(live.peak)
        after = dict(live.now)
    kept = min(accumulated[1:], key=lambda now: sum(now.values()))
    highest = max(peaks[1:], key=lambda now: sum(now.values()))
    formula = predicted(training.model, side)
    whole = sum(formula[kind] for kind in KINDS[:3])
    return {
        "model": name,
        "side": side_name,
        "rank": training.rank,
        "kept": _mib(kept),
        "kept_total": sum(kept[kind] for kind in KINDS[:3]) / MIB,
        "after_step": _mib(after),
        "first_peak": sum(peaks[0].values()) / MIB,
        "peak": sum(highest.values()) / MIB,
        "at_peak": _mib(highest),
        "predicted": _mib(formula),
        "predicted_total": whole / MIB,
    }


def _mib(counts: Mapping[str, float]) -> dict[str, float]:
    return {name: round(count / MIB, 2) for name, count in counts.items()}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    dense = {row["model"]: row for row in rows if row["side"] == "AdamW"}
    parts = "".join(f"{kind:>11}" for kind in (*KINDS[:3], "kept", "predicted", "below"))
    print(f"\n{'model':<12}{'side':<32}{parts}{'peak':>9}{'first':>9}{'below':>8}  MiB")
    for row in rows:
        whole = dense.get(row["model"])
        below = "" if whole is None else f"{1 - row['kept_total'] / whole['kept_total']:.0%}"
        peak = "" if whole is None else f"{1 - row['peak'] / whole['peak']:.0%}"
        figures = "".join(f"{row['kept'][kind]:>11.0f}" for kind in KINDS[:3])
        print(
            f"{row['model']:<12}{row['side']:<32}{figures}{row['kept_total']:>11.0f}"
            f"{row['predicted_total']:>11.0f}{below:>11}{row['peak']:>9.0f}{row['first_peak']:>9.0f}"
            f"{peak:>8}"
        )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    known = [*NETWORKS, "llama-tiny"]
    parser.add_argument("--models", nargs="+", choices=known, default=list(NETWORKS))
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--json", type=Path, help="record; benchmarks/results/... by default")
    parser.add_argument("--predict", action="store_true", help="the formula alone, in a second")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if options.one:
        print(json.dumps(measure(options.models[0], options.sides[0])))
        return 0
    if options.predict:
        predict(options.models, options.sides)
        return 0
    now = datetime.now(UTC)
    path = options.json or RESULTS / f"gradient_memory-{now:%Y-%m-%dT%H%M%SZ}.json"
    record = {
        "date": now.isoformat(timespec="seconds"),
        "commit": environment.commit(),
        "versions": environment.versions(),
        "hardware": environment.hardware(torch.device("cpu"), 1),
        "steps": STEPS,
        "micro_batches": MICRO,
        "tokens": TOKENS,
    }
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {(row["model"], row["side"]) for row in rows}
    failed = 0
    for name, side in itertools.product(options.models, options.sides):
        if (name, side) in done:
            continue
        command = [sys.executable, __file__, "--one", "--models", name, "--sides", side]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            failed += 1
            print(f"{name}, {side}: {ran.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        rows.append(json.loads(ran.stdout.splitlines()[-1]))
        print(f"{name}, {side}: done", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    show(rows)
    print(f"\nrecord: {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
