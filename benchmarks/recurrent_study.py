"""A low-rank LSTM on text: dense, low-rank from the start, Pufferfish, Cuttlefish, at equal steps.

    python benchmarks/recurrent_study.py --data text:FILE [--rows NAME ...] [--record FILE.jsonl]
    python benchmarks/recurrent_study.py --time            # steps of the final networks, in turns

A character LSTM (`lstm-char`: two layers of 256) reads 16 streams in windows of 64 for one epoch,
with `rankwise.training.train`: AdamW, clipping at norm 1, warm-up and cosine to zero, the state
handed over. Every row is tuned on its own: learning rates a factor of 2 apart with seed 0, by
validation loss, until the best one is inside the grid (factors for every gate take Pufferfish's
rate). The seeds 0, 1, 2 at that rate are the row. The test part chooses nothing.

The record has a line a run. A second call goes on where it ends; with --table it only reads.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankwise
from rankwise import data, models
from rankwise.training import Recipe, records, train
from rankwise.training.task import loss_of
from run_record import RESULTS, SEEDS, RunRecord, facts, spread

MODEL, BATCH, CONTEXT, EPOCHS = "lstm-char", 16, 64, 1
RATES = (8e-3, 1.6e-2, 3.2e-2)
RATIO = 0.25
# The paper warms its LSTM up for 10 of 40 epochs and halves the rate at the switch (2103.03936).
WARMUP = {"warmup_epochs": EPOCHS / 4, "lr_factor": 0.5}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "low-rank from the start": ("factorized", {"ranks": RATIO}),
    "Pufferfish": ("pufferfish", {"ranks": RATIO, **WARMUP}),
    "Cuttlefish": ("cuttlefish", {"observe_every": 20}),
    "from the start, dense variance": ("factorized", {"ranks": RATIO, "init": "variance"}),
    "Pufferfish, gate by gate": ("pufferfish", {"ranks": RATIO, **WARMUP, "split": True}),
}
RATE_OF = {"Pufferfish, gate by gate": "Pufferfish"}  # trained at another row's rate
KEPT = ("test_loss", "validation_loss", "parameters", "flops", "step_ms_dense", "step_ms_low_rank")


def recipe(row: str, text: str, lr: float, seed: int, out: str, epochs: int) -> Recipe:
    method, options = ROWS[row]
    return Recipe(
        model=MODEL,
        data=text,
        tokens="characters",
        context=CONTEXT,
        batch_size=BATCH,
        epochs=epochs,
        method=method,
        method_options=options,
        optimizer="adamw",
        lr=lr,
        weight_decay=0.0,
        clip_norm=1.0,
        lr_warmup_epochs=0.1,
        seed=seed,
        out=out,
        checkpoint_every=epochs,
        threads=1,
    )


def run(row: str, text: str, lr: float, seed: int, epochs: int) -> dict[str, Any]:
    """One training run: its losses, sizes and the ranks at its end."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        result = train(recipe(row, text, lr, seed, out, epochs))
        structure = rankwise.load(out).run["plan"]
        lines = records.read(out)
    return {
        **{name: getattr(result, name) for name in KEPT},
        "seconds": round(result.seconds, 1),
        "switch_steps": [event["step"] for event in result.switches],
        "ranks": {name: spec["rank"] for name, spec in structure.items() if "rank" in spec},
        "structure": structure,
        "validation_curve": [r["validation_loss"] for r in lines if r["event"] == "epoch"],
    }


class Side:
    """A network, its optimizer and its state, to be stepped in turns with others."""

    def __init__(self, model: nn.Module, batch: int, context: int) -> None:
        self.model: Any = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        source = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 65, (batch, context + 1), generator=source)
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:]
        self.state = self.model.initial_state(batch)

    def step(self) -> float:
        """Milliseconds of forward, backward, clipping and update."""
        began = time.perf_counter()
        self.optimizer.zero_grad()
        scores, state = self.model(self.inputs, self.state)
        loss_of(scores, self.targets).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.state = tuple(part.detach() for part in state)
        return (time.perf_counter() - began) * 1e3


def timed(record: RunRecord, rounds: int) -> dict[str, Any]:
    """Steps of every row's final network (seed 0 at its best rate) in turns with dense ones."""
    torch.manual_seed(0)
    dense = models.build(MODEL, classes=65, input_shape=(CONTEXT,))
    sides = {"dense": Side(dense, BATCH, CONTEXT)}
    for row in ROWS:
        found = record.chosen(row)
        if found and found[0]["structure"]:
            model = copy.deepcopy(dense)
            rankwise.impose_plan(model, found[0]["structure"])
            for child in model.modules():  # values do not matter, but zeros would be fast
                if isinstance(child, rankwise.layers.LowRankLayer):
                    child.reset_parameters()
            sides[row] = Side(model, BATCH, CONTEXT)
    for side in sides.values():
        side.step()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 else reversed(sides):
            times[name].append(sides[name].step())
    ratios = {
        n: [d / t for d, t in zip(times["dense"], own, strict=True)] for n, own in times.items()
    }
    return {
        "times": {name: statistics.median(own) for name, own in times.items()},
        "speed_up": {name: statistics.quantiles(own, n=4) for name, own in ratios.items()},
        "rounds": rounds,
    }


def table(record: RunRecord) -> None:
    """Test loss in bits, perplexity, parameters and speed of every row at its best rate."""
    times = [entry for entry in record.others if "times" in entry]
    speeds = times[-1]["speed_up"] if times else {}
    dense = {r["seed"]: r["test_loss"] for r in record.chosen("dense")}
    titles = ("bits/character", "- dense", "perplexity", "parameters", "step")
    print(f"{'row':<26}{'lr':>8}" + "".join(f"{title:>20}" for title in titles) + "  switch")
    for row in ROWS:
        runs = record.chosen(row)
        if not runs:
            continue
        bits = [r["test_loss"] / math.log(2) for r in runs]
        gaps = [b - dense[r["seed"]] / math.log(2) for b, r in zip(bits, runs, strict=True)]
        sizes = [r["parameters"][0] for r in runs]
        shown = f"{statistics.median(sizes):,.0f}"
        speed = f"{speeds[row][1]:.2f}x" if row in speeds else ""
        cells = (
            spread(bits, 3),
            spread(gaps, 3),
            spread([math.exp(r["test_loss"]) for r in runs], 3),
            shown,
            speed,
        )
        switches = ", ".join(str(step) for r in runs for step in r["switch_steps"])
        line = "".join(f"{cell:>20}" for cell in cells)
        print(f"{row:<26}{record.best(row):>8g}{line}  {switches}")
        if row not in RATE_OF:
            print(f"    validation by lr: {record.grid(row, 4)}")
        for r in runs if row == "Cuttlefish" else ():
            print(f"    seed {r['seed']}: {r['parameters'][0]:,} parameters, ranks {r['ranks']}")


def edge(record: RunRecord, row: str) -> float | None:
    """The next rate to try where the best one is the lowest or highest tried; None inside."""
    tried = list(record.tried(row))
    best = record.best(row)
    if best is None or best == tried[0]:
        return tried[0] / 2
    if best == tried[-1]:
        return best * 2
    return None


def plan(
    record: RunRecord, row: str, rates: Sequence[float], seeds: Sequence[int]
) -> Iterator[tuple[float, int]]:
    """The runs of a row: seed 0 at all rates, then all seeds at the best of them."""
    if row not in RATE_OF:
        yield from ((lr, 0) for lr in rates)
        while len(rates) > 1 and (beyond := edge(record, row)) is not None:
            yield beyond, 0
    best = record.best(row)
    if best is None:
        raise SystemExit(f"{row} is trained at the rate of {RATE_OF[row]}, which comes first")
    yield from ((best, seed) for seed in seeds)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="shakespeare", help="text:FILE, or shakespeare")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    parser.add_argument("--record", type=Path, default=RESULTS / "recurrent_study.jsonl")
    parser.add_argument("--table", action="store_true", help="show what is recorded, train nothing")
    parser.add_argument("--time", action="store_true", help="time the final networks in turns")
    parser.add_argument("--rounds", type=int, default=200, help="of --time")
    parser.add_argument("--seconds", type=float, help="begin no run after so many")
    parser.add_argument("--smoke", action="store_true", help="one rate and epoch, one seed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    torch.set_num_threads(1)
    began = time.perf_counter()
    epochs = 1 if options.smoke else EPOCHS
    rates, seeds = (RATES[:1], SEEDS[:1]) if options.smoke else (RATES, SEEDS)
    splits = data.load_text(options.data, context=CONTEXT, level="characters")
    settings = {"epochs": epochs, "batch": BATCH, "checksum": splits.checksum}
    record = RunRecord(options.record, facts(settings, data=splits.name), rate_of=RATE_OF)
    if options.time:
        record.add(timed(record, options.rounds))
    for row in () if options.table or options.time else options.rows:
        for lr, seed in plan(record, row, rates, seeds):
            late = time.perf_counter() - began > (options.seconds or math.inf)
            if late and (row, lr, seed) not in record.runs:
                print("time is up; the same command goes on from here")
                return 3
            record.once(row, lr, seed, partial(run, row, options.data, lr, seed, epochs))
    table(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
