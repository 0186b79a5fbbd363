"""Can a layer's weight be low-rank from the start, and how should the factors begin?

    python benchmarks/loralinear.py [--seeds 0 1 2] [--ranks 1 2 4 ...] [--plot] [--smoke]

The three kinds of layer of the LoRALinear experiment in a 784-512-512-10 perceptron on real digits
(mnist-5k): full rank; LoRA layers, both factors U(-1/sqrt r, 1/sqrt r) (`loralinear`); autoencoder
layers, two default torch layers (`default`). Beside them this library's `variance` and `spectral`.
Plain SGD; every kind and rank has its own learning rate out of a grid, for the right ones lie far
apart: by validation accuracy, the best two of the first seed, and the better one of these over all
seeds. Validation accuracy is followed from step 0, before any training; the test split is looked at
after the last step. The output layer stays dense: its full rank is 10. Rows go to
benchmarks/results/loralinear.jsonl, and a second call does only what is missing. --plot draws
docs/studies/loralinear-*.png (needs matplotlib).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import curves
import rankwise
from rankwise import data, models

KINDS = ("full rank", "loralinear", "default", "variance", "spectral")
WORDS = {
    "full rank": "full rank (dense)",
    "loralinear": "LoRA layers (loralinear)",
    "default": "autoencoder layers (default)",
    "variance": "variance",
    "spectral": "spectral",
}
SCHEDULE = curves.Schedule(steps=620, batch=64, every=31)
KEY = ("kind", "rank", "seed", "lr")


def one(kind: str, rank: int, seed: int, lr: float, splits: data.Splits, schedule: Any) -> Any:
    """One run: a dense network, or one whose two big layers are of a rank."""
    torch.manual_seed(seed)
    model = models.build("mlp-512x2")
    method: Any = rankwise.Dense()
    if kind != "full rank":
        method = rankwise.Factorized(ranks=rank, layers="input,hidden.*", init=kind)
    return curves.train(
        model, method, lambda m: torch.optim.SGD(m.parameters(), lr=lr), splits, schedule, seed
    )


Chosen = dict[tuple[str, int], list[dict[str, Any]]]


def report(runs: Chosen, ranks: list[int], lost: list[dict[str, Any]]) -> None:
    """Print accuracy before training, early, and at the end, by kind and rank."""

    def show(title: str, cell: Any) -> None:
        print(f"\n{title}\n")
        lines = [[str(rank), *(cell(_of(runs, kind, rank)) for kind in KINDS)] for rank in ranks]
        print(curves.table(["rank", *(WORDS[k] for k in KINDS)], lines))

    for at, words in ((0, "before training"), (1, "after half an epoch"), (-1, "at the end")):
        step = _of(runs, KINDS[0], 0)[0]["steps"][at]
        title = f"validation accuracy {words} (step {step}), mean ± sd, %"
        show(title, lambda of, at=at: curves.spread(r["accuracy"][at] for r in of))
    show("test accuracy at the end, mean ± sd, %", lambda of: curves.spread(r["test"] for r in of))
    show("learning rate", lambda of: f"{of[0]['lr']:g}")
    sizes = (f"{_of(runs, KINDS[1], rank)[0]['parameters']:,} at rank {rank}" for rank in ranks)
    print(f"\nparameters: {', '.join(sizes)}; dense {_of(runs, KINDS[0], 0)[0]['parameters']:,}")
    if lost:
        print("\ndiverged with the first seed:")
    for rate in sorted({r["lr"] for r in lost}):
        lines = [f"{r['kind']} {r['rank']}" for r in lost if r["lr"] == rate]
        print(f"- at {rate:g}: {', '.join(lines)}")


def _of(runs: Chosen, kind: str, rank: int) -> list[dict[str, Any]]:
    return runs[kind, 0 if kind == "full rank" else rank]


def plot(runs: Chosen, ranks: list[int], folder: Path) -> None:
    """Curves by rank for every kind, and the start and the end over ranks."""
    import matplotlib as mpl  # pyright: ignore[reportMissingImports]

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]

    figure, grid = plt.subplots(2, 2, figsize=(9, 7), sharex=True, sharey=True)
    colours = plt.get_cmap("viridis")
    for axes, kind in zip(grid.flat, KINDS[1:], strict=True):
        for i, rank in enumerate(ranks):
            colour = colours(0.9 * i / max(1, len(ranks) - 1))
            curves.band(axes, _of(runs, kind, rank), color=colour, label=f"rank {rank}", lw=1.2)
        curves.band(axes, _of(runs, "full rank", 0), color="black", ls="--", label="dense", lw=1.2)
        axes.set_title(WORDS[kind], fontsize=10)
        axes.grid(alpha=0.3)
    for axes in grid[1]:
        axes.set_xlabel("optimizer steps (batch 64)")
    for axes in grid[:, 0]:
        axes.set_ylabel("validation accuracy, %")
    lines, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=8, ncols=9, loc="lower center", columnspacing=1.2)
    _save(figure, folder / "loralinear-curves.png", bottom=0.04)

    figure, row = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True)
    words = ("before training", "after half an epoch", "at the end (10 epochs)")
    for axes, look, title in zip(row, (0, 1, -1), words, strict=True):
        axes.set_title(title, fontsize=10)
        for kind in KINDS:
            means, deviations = [], []
            for rank in ranks:
                values = torch.tensor([r["accuracy"][look] * 100 for r in _of(runs, kind, rank)])
                means.append(float(values.mean()))
                deviations.append(float(values.std()) if len(values) > 1 else 0.0)
            style = (
                {"color": "black", "ls": "--"} if kind == "full rank" else {"marker": "o", "ms": 3}
            )
            (line,) = axes.plot(ranks, means, label=WORDS[kind], lw=1.2, **style)
            low = [m - d for m, d in zip(means, deviations, strict=True)]
            high = [m + d for m, d in zip(means, deviations, strict=True)]
            axes.fill_between(ranks, low, high, color=line.get_color(), alpha=0.15, lw=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.set_xlabel("rank of the two hidden layers")
        axes.grid(alpha=0.3)
    row[0].set_ylabel("validation accuracy, %")
    row[0].legend(fontsize=7, loc="upper left")
    _save(figure, folder / "loralinear-ranks.png")


def _save(figure: Any, path: Path, bottom: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path, dpi=90)
    print(f"written: {path}")


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    rates = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    parser.add_argument("--lrs", type=float, nargs="+", default=rates)
    parser.add_argument("--json", type=Path, default=curves.RESULTS / "loralinear.jsonl")
    parser.add_argument("--plot", action="store_true", help="draw docs/studies/loralinear-*.png")
    parser.add_argument("--plots", type=Path, default=curves.PLOTS, help="folder of the plots")
    parser.add_argument("--smoke", action="store_true", help="four steps a run: tests the script")
    options = parser.parse_args(argv)
    curves.one_thread()
    splits, rows = data.load("mnist-5k"), curves.Rows(options.json, KEY)
    schedule = curves.Schedule(steps=4, batch=64, every=2) if options.smoke else SCHEDULE

    def do(setting: dict[str, Any]) -> dict[str, Any]:
        if rows.missing(setting):
            row = one(**setting, splits=splits, schedule=schedule)
            rows.add({**row, **setting})
            print(f"{setting} {row['accuracy'][0]:.3f} -> {row['accuracy'][-1]:.3f}", flush=True)
        return rows.find(setting)

    first, *others = options.seeds
    chosen, lost = [], []
    for kind in KINDS:
        for rank in options.ranks if kind != "full rank" else [0]:
            layer = {"kind": kind, "rank": rank}
            tried = [do({**layer, "seed": first, "lr": lr}) for lr in options.lrs]
            lost += [row for row in tried if row["loss"][-1] is None]
            # The best rate of one seed may be too high for another: two of them run on all.
            best = sorted(tried, key=lambda row: row["accuracy"][-1])[-2:]
            runs_of = [
                [r, *(do({**layer, "seed": s, "lr": r["lr"]}) for s in others)] for r in best
            ]
            chosen += max(runs_of, key=lambda runs: sum(r["accuracy"][-1] for r in runs))
    runs: Chosen = {}
    for row in chosen:
        runs.setdefault((row["kind"], row["rank"]), []).append(row)
    report(runs, options.ranks, lost)
    if options.plot:
        plot(runs, options.ranks, options.plots)


if __name__ == "__main__":
    main()
