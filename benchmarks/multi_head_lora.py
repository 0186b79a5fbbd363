"""Multi-head LoRA in parts of a GPT-2, against dense: where to put it, how many heads, which rank.

    python benchmarks/multi_head_lora.py [--what places heads ranks] [--record FILE.jsonl]
    python benchmarks/multi_head_lora.py --full --data text:FILE --device cuda

A GPT-2 is trained from its beginning with updates of its attention (A), its feed-forward part (M),
its output layer (L), or several of them; with 2, 4 and 8 heads, parallel and sequential; at ranks 1
to 64. Rows say test loss, trainable parameters and the time of a step over dense. The output layer
shares its weight with the embedding, so both get one update, and parameters grow, as in the study
that this repeats.

As it stands it takes minutes on a CPU (width 128, 4 layers, bytes, 200 steps of 8 windows of 64).
`--full` is GPT-2's 124M form, 512 tokens, 500 steps, on a device. One learning rate, a schedule and
seeds for all rows: this shows orders, not best values; `update_study.py` tunes every row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import rankwise
from language_study import adamw, schedule
from rankwise import data
from rankwise.models.transformer import Transformer
from rankwise.training import environment
from rankwise.training.task import evaluate

SMALL = {"width": 128, "layers": 4, "heads": 4, "hidden": 512, "context": 64}
FULL = {"width": 768, "layers": 12, "heads": 12, "hidden": 3072, "context": 512}
A, M, L = "blocks.*.qkv,blocks.*.out", "blocks.*.up,blocks.*.down", "embedding,head"
PLACES = {"A": A, "M": M, "L": L, "A+M": f"{A},{M}", "A+L": f"{A},{L}", "A+M+L": f"{A},{M},{L}"}


def rows(what: Sequence[str]) -> dict[str, Mapping[str, Any] | None]:
    """What is compared: name -> options of LTE; None for dense."""
    found: dict[str, Mapping[str, Any] | None] = {"dense": None}
    four = {"heads": 4, "rank": 16}
    if "places" in what:
        found |= {f"4 heads of 16 in {n}": four | {"layers": p} for n, p in PLACES.items()}
    for heads in (2, 4, 8) if "heads" in what else ():
        for mode in ("parallel", "sequential"):
            options = {"heads": heads, "rank": 16, "mode": mode, "layers": A}
            found[f"{heads} heads of 16 in A, {mode}"] = options
    for rank in (1, 4, 16, 64) if "ranks" in what else ():
        found[f"4 heads of {rank} in A, parallel"] = {"heads": 4, "rank": rank, "layers": A}
    return found


def train(
    options: Mapping[str, Any] | None, splits: Any, settings: Any, seed: int
) -> dict[str, Any]:
    """One run: test loss, trainable parameters, milliseconds of a step."""
    torch.manual_seed(seed)
    device, sizes = torch.device(settings.device), FULL if settings.full else SMALL
    model = Transformer(vocabulary=len(splits.classes), form="gpt2", tied=True, **sizes).to(device)
    optimizer = adamw(model.parameters(), settings.lr)
    method: Any = rankwise.Dense()
    if options is not None:
        method = rankwise.LTE(**{"alpha": 2.0 * options["rank"], **options})
    sample = torch.zeros(1, sizes["context"], dtype=torch.int64, device=device)
    run = rankwise.start(model, method, optimizer, sample=sample, total_steps=settings.steps)
    scheduler = LambdaLR(optimizer, lambda step: schedule(round(step * 400 / settings.steps)))
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    times: list[float] = []
    while len(times) < settings.steps:
        epoch, start = divmod(len(times), data.steps_per_epoch(splits.train, 8))
        for inputs, targets in data.batches(
            splits.train, batch_size=8, seed=seed, epoch=epoch, start=start
        ):
            began = time.perf_counter()
            optimizer.zero_grad()
            scores = model(inputs.to(device)).flatten(0, 1)
            F.cross_entropy(scores, targets.to(device).flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - began) * 1e3)
            if len(times) == settings.steps:
                break
    run.finish()
    score = evaluate(
        model, splits.test, lambda x: x.to(device), torch.no_grad, classes=len(splits.classes)
    )
    return {"test": score.loss, "trainable": learning, "step_ms": statistics.median(times)}


def show(found: Sequence[Mapping[str, Any]]) -> None:
    dense = [run["step_ms"] for run in found if run["row"] == "dense"]
    print(f"\n{'row':<34}{'test loss':>18}{'trainable':>12}{'step / dense':>14}")
    for name in dict.fromkeys(run["row"] for run in found):
        own = [run for run in found if run["row"] == name]
        losses = [run["test"] for run in own]
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        step = statistics.median(r["step_ms"] for r in own) / statistics.median(dense)
        loss = f"{statistics.fmean(losses):.3f}{spread}"
        print(f"{name:<34}{loss:>18}{own[0]['trainable']:>12,}{step:>14.2f}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    kinds = ["places", "heads", "ranks"]
    parser.add_argument("--what", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--data", default="shakespeare", help="text:FILE, or shakespeare")
    parser.add_argument("--full", action="store_true", help="GPT-2's 124M form, 500 steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, help="200, or 500 with --full")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--record", type=Path, help="a line a run; goes on where it ends")
    options = parser.parse_args(argv)
    options.steps = options.steps or (500 if options.full else 200)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    settings = arguments(argv)
    torch.set_num_threads(1)
    splits = data.load_text(settings.data, context=(FULL if settings.full else SMALL)["context"])
    found: list[dict[str, Any]] = []
    if settings.record is not None and settings.record.exists():
        found = [json.loads(line) for line in settings.record.read_text().splitlines()]
    known = {(run["row"], run["seed"], run["full"], run["steps"], run["lr"]) for run in found}
    for name, options in rows(settings.what).items():
        for seed in settings.seeds:
            key = (name, seed, settings.full, settings.steps, settings.lr)
            if key in known:
                continue
            facts = dict(zip(("row", "seed", "full", "steps", "lr"), key, strict=True))
            facts |= {"commit": environment.commit(), "checksum": splits.checksum}
            found.append(facts | train(options, splits, settings, seed))
            if settings.record is not None:
                with settings.record.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
    show([run for run in found if run["full"] == settings.full])
    return 0


if __name__ == "__main__":
    sys.exit(main())
