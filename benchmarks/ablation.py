"""Does SI&FD need both halves? Plain, SI, FD, SI&FD and dense, on real images.

    python benchmarks/ablation.py [--data DIR] [--seeds 0 1 2] [--plot] [--smoke]

The four-way ablation of Khodak et al. (2105.01029, table 1): a residual network factorised from the
start in the paper's separable form, to one tenth of the dense network's parameters.

    plain   default initialisation of both factors, weight decay on both
    SI      spectral initialisation, weight decay on both factors
    FD      default initialisation, Frobenius decay of the product
    SI&FD   spectral initialisation, Frobenius decay

Data: mnist-5k, or with --data a folder of images (train/CLASS/*, test/CLASS/*), read at 32 x 32.
Recipe of the paper shortened: SGD 0.1, momentum 0.9, batch 128, a tenth of the rate at 50 % and
75 %. Decay acts by the sum of rate times decay over the steps, which is 0.41 in the paper (200
epochs of CIFAR-10 at 1e-4); weight decay is set so that it is 0.41 here, too, for every arm and
the dense row. Rows go to benchmarks/results/; a second call does only what is missing.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import MultiStepLR

import curves
import rankwise
from rankwise import data
from rankwise.models import ResNet

ARMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "plain": {"init": "default", "decay": "none"},
    "SI": {"init": "spectral", "decay": "none"},
    "FD": {"init": "default", "decay": "frobenius"},
    "SI&FD": {"init": "spectral", "decay": "frobenius"},
}
RATE, TOTAL_DECAY = 0.1, 0.41
KEY = ("data", "checksum", "arm", "seed", "epochs", "target")


def one(arm: str, seed: int, target: float, splits: data.Splits, schedule: Any) -> dict[str, Any]:
    """One run of an arm."""
    torch.manual_seed(seed)
    model = ResNet(splits.train.images.shape[1], (16, 32, 64), (1, 1, 1), 10, stem_stride=2)
    options = ARMS[arm]
    method: Any = rankwise.Dense()
    if options is not None:
        method = rankwise.methods.SIFD(target_ratio=target, separable=True, **options)
    halves = [schedule.steps // 2, schedule.steps * 3 // 4]
    rates = RATE * (halves[0] + (halves[1] - halves[0]) / 10 + (schedule.steps - halves[1]) / 100)
    decay = TOTAL_DECAY / rates
    row = curves.train(
        model,
        method,
        lambda m: torch.optim.SGD(m.parameters(), lr=RATE, momentum=0.9, weight_decay=decay),
        splits,
        schedule,
        seed,
        lambda optimizer: MultiStepLR(optimizer, halves),
    )
    return {**row, "weight_decay": decay}


def report(rows: list[dict[str, Any]]) -> None:
    """Print a table of all arms."""
    print(f"\n{rows[0]['data']}, mean ± sd over {len(_of(rows, 'dense'))} seeds, %\n")
    lines = []
    for arm in ARMS:
        runs = _of(rows, arm)
        lines.append(
            [
                arm,
                f"{runs[0]['parameters']:,}",
                curves.spread(r["accuracy"][-1] for r in runs),
                curves.spread(r["test"] for r in runs),
                curves.spread((r["loss"][-1] for r in runs), 1, 3),
                f"{sum(r['seconds'] for r in runs) / len(runs):.0f}",
            ]
        )
    head = ["arm", "parameters", "validation", "test", "validation loss", "CPU s a run"]
    print(curves.table(head, lines))
    print("\nSI&FD minus another arm, same seeds, points of test accuracy: mean, standard error\n")
    both = {r["seed"]: r["test"] for r in _of(rows, "SI&FD")}
    for arm in ("plain", "SI", "FD"):
        gaps = [100 * (both[r["seed"]] - r["test"]) for r in _of(rows, arm)]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
        print(f"- {arm}: {statistics.mean(gaps):+.1f}, {error:.1f}")


def _of(rows: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    return [r for r in rows if r["arm"] == arm]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Validation accuracy over steps, every arm with its band."""
    import matplotlib as mpl  # pyright: ignore[reportMissingImports]

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # pyright: ignore[reportMissingImports]

    figure, axes = plt.subplots(figsize=(6, 4))
    for arm in ARMS:
        style = {"color": "black", "ls": "--"} if arm == "dense" else {}
        curves.band(axes, _of(rows, arm), label=arm, lw=1.4, **style)
    axes.set_xlabel("optimizer steps (batch 128)")
    axes.set_ylabel("validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    print(f"written: {path}")


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder of images; mnist-5k without it")
    parser.add_argument("--name", default="folder", help="what to call the data of --data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="20 for mnist-5k, 8 for a folder")
    parser.add_argument("--target", type=float, default=0.1, help="parameters over dense")
    parser.add_argument("--json", type=Path, default=curves.RESULTS / "ablation.jsonl")
    parser.add_argument("--plot", action="store_true", help="draw docs/studies/ablation-*.png")
    parser.add_argument("--plots", type=Path, default=curves.PLOTS, help="folder of the plots")
    parser.add_argument("--smoke", action="store_true", help="two steps a run: tests the script")
    options = parser.parse_args(argv)
    curves.one_thread()
    splits = data.load("mnist-5k" if options.data is None else f"folder:{options.data}")
    name = "mnist-5k" if options.data is None else options.name
    epochs = options.epochs or (20 if options.data is None else 8)
    per_epoch = data.steps_per_epoch(splits.train, 128)
    schedule = curves.Schedule(steps=epochs * per_epoch, batch=128, every=per_epoch)
    if options.smoke:
        schedule = curves.Schedule(steps=2, batch=128, every=1)
    rows = curves.Rows(options.json, KEY)
    common = {"data": name, "checksum": splits.checksum, "epochs": epochs}
    chosen = []
    for seed in options.seeds:
        for arm in ARMS:
            target = 1.0 if arm == "dense" else options.target
            setting = {**common, "arm": arm, "seed": seed, "target": target}
            if rows.missing(setting):
                row = one(arm, seed, options.target, splits, schedule)
                rows.add({**row, **setting})
                print(f"{arm} {seed}: {row['accuracy'][-1]:.4f}, {row['seconds']} s", flush=True)
            chosen.append(rows.find(setting))
    report(chosen)
    if options.plot:
        plot(chosen, options.plots / f"ablation-{name}-{options.target:g}.png")


if __name__ == "__main__":
    main()
