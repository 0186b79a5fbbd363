"""Translation at equal steps: dense, Pufferfish, and low-rank from the start, three seeds.

    python benchmarks/translation_study.py [--catalogues DIR] [--rows NAME ...] [--record FILE]
    python benchmarks/translation_study.py --table          # what the record holds

The pairs are real: messages of programs in English with their German translations, read from the
message catalogues (.mo) that the packages of a Debian system install. Those of 2 to 7 words, each
English message once, in an order that follows from its SHA-256; the first 6,000 are the data, 80 %
train, then 10 % validate, then 10 % test. Many messages are alike, so that the figures say more of
differences between rows than of translation.

`transformer-tiny` (2 + 2 layers of width 128) trains for 5 epochs with `rankwise.training.train`:
Adam, label smoothing 0.1, warm-up and cosine to zero. The dense row and the one that is low-rank
from the start choose their learning rate among three by the validation loss of seed 0; Pufferfish
begins dense and takes the dense row's. The test part chooses nothing.

The record has a line a run. A second call goes on where it ends.
"""

from __future__ import annotations

import argparse
import gettext
import hashlib
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rankwise.training import Recipe, train
from run_record import RESULTS, SEEDS, RunRecord, facts, spread

PAIRS, WORDS, EPOCHS = 6_000, range(2, 8), 5
RATES = (2e-3, 1e-3, 4e-3)
# The paper leaves the first layers of encoder and decoder dense (2103.03936); its warm-up is 10 of
# 400 epochs.
FIRST = "encoder.0.*,decoder.0.*"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "low-rank from the start": ("factorized", {"ranks": 0.25}),
    "Pufferfish": ("pufferfish", {"ranks": 0.25, "warmup_epochs": 1, "exclude": FIRST}),
}
RATE_OF = {"Pufferfish": "dense"}  # trained at another row's rate
KEPT = (
    *("test_loss", "test_accuracy", "test_bleu", "validation_loss", "parameters", "flops"),
    *("step_ms_dense", "step_ms_low_rank", "steps"),
)


def messages(folder: Path) -> list[tuple[str, str]]:
    """English and German messages of all catalogues of a folder, in a fixed order."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.mo")):
        if path.name.startswith("iso_"):
            continue  # names of countries and languages
        try:
            with path.open("rb") as file:
                catalogue: Any = gettext.GNUTranslations(file)
        except (OSError, UnicodeDecodeError, LookupError):
            continue
        for key, german in catalogue._catalog.items():
            english = key[0] if isinstance(key, tuple) else key
            english, german = " ".join(english.split()), " ".join(german.split())
            if german and english != german and len(english.split()) in WORDS:
                found.setdefault(english, german)
    return sorted(found.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def recipe(row: str, text: str, lr: float, seed: int, out: str, epochs: int) -> Recipe:
    method, options = ROWS[row]
    if epochs < 3:  # a smoke test
        options = {k: v for k, v in options.items() if k != "warmup_epochs"}
        options |= {"warmup_steps": 1} if method == "pufferfish" else {}
    return Recipe(
        model="transformer-tiny",
        data=text,
        tokens="words",
        min_count=5,
        context=24,
        batch_size=128,
        epochs=epochs,
        method=method,
        method_options=options,
        optimizer="adam",
        lr=lr,
        weight_decay=0.0,
        label_smoothing=0.1,
        lr_warmup_epochs=1.0 if epochs > 1 else 0.0,
        seed=seed,
        out=out,
        checkpoint_every=epochs,
        threads=1,
    )


def run(row: str, text: str, lr: float, seed: int, epochs: int) -> dict[str, Any]:
    """One training run: its losses, BLEU, sizes and times."""
    with tempfile.TemporaryDirectory() as folder:
        result = train(recipe(row, text, lr, seed, str(Path(folder) / "run"), epochs))
    return {name: getattr(result, name) for name in KEPT} | {"seconds": round(result.seconds, 1)}


def plan(
    record: RunRecord, rows: Sequence[str], rates: Sequence[float], seeds: Sequence[int]
) -> Iterator[tuple[str, float, int]]:
    """All runs: every row and seed at the first rate, seed 0 at the others, all at the best one."""
    yield from ((row, rates[0], seed) for seed in seeds for row in rows)
    yield from ((row, lr, 0) for row in rows if row not in RATE_OF for lr in rates)
    for row in rows:
        best = record.best(row)
        if best is not None:
            yield from ((row, best, seed) for seed in seeds)


def table(record: RunRecord) -> None:
    """Test perplexity, its difference to dense, token accuracy, BLEU and sizes of every row."""
    dense = {r["seed"]: r["test_loss"] for r in record.chosen("dense")}
    titles = ("perplexity", "loss - dense", "accuracy %", "BLEU", "parameters", "FLOPs/token")
    print(f"{'row':<26}{'lr':>7}" + "".join(f"{title:>17}" for title in titles))
    for row in ROWS:
        runs = record.chosen(row)
        if not runs:
            continue
        cells = (
            spread([math.exp(r["test_loss"]) for r in runs], 2),
            spread([r["test_loss"] - dense[r["seed"]] for r in runs if r["seed"] in dense], 3),
            spread([100 * r["test_accuracy"] for r in runs], 2),
            spread([r["test_bleu"] for r in runs], 2),
            f"{runs[0]['parameters'][0]:,}",
            f"{runs[0]['flops']:,}",
        )
        print(f"{row:<26}{record.best(row):>7g}" + "".join(f"{cell:>17}" for cell in cells))
        if row not in RATE_OF:
            print(f"    validation loss by lr: {record.grid(row, 4)}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--catalogues", type=Path, default=Path("/usr/share/locale/de/LC_MESSAGES"))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    parser.add_argument("--record", type=Path, default=RESULTS / "translation_study.jsonl")
    parser.add_argument("--table", action="store_true", help="show what is recorded, train nothing")
    parser.add_argument("--seconds", type=float, help="begin no run after so many")
    parser.add_argument("--smoke", action="store_true", help="few pairs, one rate, epoch and seed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if options.table:
        table(RunRecord(options.record, None, rate_of=RATE_OF))
        return 0
    torch.set_num_threads(1)
    began = time.perf_counter()
    pairs = messages(options.catalogues)[: 700 if options.smoke else PAIRS]
    if not pairs:
        raise SystemExit(f"{options.catalogues} holds no German catalogues (.mo); --catalogues DIR")
    written = "".join(f"{english}\t{german}\n" for english, german in pairs)
    epochs = 1 if options.smoke else EPOCHS
    rates, seeds = (RATES[:1], SEEDS[:1]) if options.smoke else (RATES, SEEDS)
    checksum = hashlib.sha256(written.encode()).hexdigest()[:16]
    settings = {"epochs": epochs, "pairs": len(pairs), "checksum": checksum}
    record = RunRecord(options.record, facts(settings), rate_of=RATE_OF)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "messages.tsv"
        path.write_text(written, encoding="utf-8")
        for row, lr, seed in plan(record, options.rows, rates, seeds):
            late = time.perf_counter() - began > (options.seconds or math.inf)
            if late and (row, lr, seed) not in record.runs:
                print("time is up; the same command goes on from here")
                return 3
            record.once(row, lr, seed, partial(run, row, f"pairs:{path}", lr, seed, epochs))
    table(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
