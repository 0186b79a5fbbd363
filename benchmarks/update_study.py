"""Low-rank updates at equal tokens: loss on real text, learning rates tuned for every row.

    python benchmarks/update_study.py --data text:FILE [--rows NAME ...] [--record FILE.jsonl]

How it is done stands in `language_study.py`. A network is trained from its random beginning, with
updates beside the blocks' matrices (width 128), while embedding, head and norms go on learning. The
scale of an update is 2 in every row: under Adam it acts as a factor on the learning rate, which is
tuned. Cycles of ReLoRA are 100 of the 400 steps, a warm-start is 100 dense ones. AdaLoRA has the
rest of its options by default: its budget falls from step 40 to 200.

Controls: dense AdamW; the same with embedding, head and norms at twice and four times the rate,
which rows of updates that end at a larger rate have without being asked; LTE with those at four
times the rate, which GaLore's scale of 1/4 on its factors amounts to; and "blocks frozen", which
learns without the blocks' matrices: what updates are worth is the way between.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from language_study import Row, main, rates

BLOCKS = "blocks.*"


def update(rank: int, **options: Any) -> dict[str, Any]:
    """The options of an update of scale 2."""
    return {"rank": rank, "alpha": 2.0 * rank, "layers": BLOCKS, "others": "all", **options}


def cycles(rank: int, **options: Any) -> dict[str, Any]:
    """The options of ReLoRA: four cycles of 100 steps, or three behind a warm-start."""
    return update(rank, restart_every=100, restart_warmup=10, **options)


WARM = {"warmup_steps": 100}
HEADS = {"init": "orthogonal", "merge_every": 10}
GALORE = {"rank": 4, "every": 50, "layers": "*.heads.*"}
REST = {"rank": 32, "every": 50, "layers": "embed*,head*"}
ADAPTIVE = {
    "initial_rank": 12,
    "target_rank": 8,
    "alpha": 24.0,
    "layers": BLOCKS,
    "others": "all",
}
ROWS = {
    "AdamW": Row("dense", rates(4e-3)),
    "AdamW, the rest at 2 lr": Row("dense", rates(2e-3), others=2.0),
    "AdamW, the rest at 4 lr": Row("dense", rates(2e-3), others=4.0),
    "blocks frozen": Row("frozen", rates(8e-3)),
    "LoRA, rank 8": Row("lora", rates(8e-3), update(8)),
    "LoRA, rank 32": Row("lora", rates(8e-3), update(32)),
    "LoRA+, rank 8": Row("lora", rates(4e-3), update(8), beside={"lora-plus": {"ratio": 16.0}}),
    "AdaLoRA, rank 12 to 8": Row("adalora", rates(8e-3), ADAPTIVE),
    "warm-start, LoRA": Row("relora", rates(8e-3), cycles(8, **WARM) | {"restart_every": 1000}),
    "ReLoRA": Row("relora", rates(8e-3), cycles(8)),
    "ReLoRA, no reset": Row("relora", rates(8e-3), cycles(8, reset="none")),
    "ReLoRA, warm-start": Row("relora", rates(8e-3), cycles(8, **WARM)),
    "ReLoRA, warm-start, no reset": Row("relora", rates(8e-3), cycles(8, reset="none", **WARM)),
    "LTE, 4 heads, rank 8": Row("lte", rates(4e-3), update(8, heads=4, **HEADS)),
    "LTE, 4 heads, rank 2": Row("lte", rates(4e-3), update(2, heads=4, **HEADS)),
    "LTE, 8 heads, rank 8": Row("lte", rates(4e-3), update(8, heads=8, **HEADS)),
    "LTE, 4 heads, rank 8, T 100": Row(
        "lte", rates(4e-3), update(8, heads=4, **HEADS) | {"merge_every": 100}
    ),
    "sequential, 4 heads, rank 8": Row(
        "lte", rates(4e-3), update(8, heads=4, mode="sequential", **HEADS)
    ),
    "LTE x GaLore on factors": Row(
        "lte", rates(8e-3), update(8, heads=4, **HEADS), beside={"galore": GALORE}
    ),
    "LTE, the rest at 4 lr": Row("lte", rates(4e-3), update(8, heads=4, **HEADS), others=4.0),
    "ReLoRA x GaLore on the rest": Row(
        "relora", rates(8e-3), cycles(8, **WARM), beside={"galore": REST}
    ),
    "GaLore, rank 32": Row("galore", rates(1.6e-2), {"rank": 32, "every": 50}),
}

run = partial(main, "update_study", ROWS, __doc__ or "")

if __name__ == "__main__":
    sys.exit(run())
