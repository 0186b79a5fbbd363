"""Low-rank gradients at equal tokens: loss on real text, learning rates tuned for every row.

    python benchmarks/gradient_study.py --data text:FILE [--rows NAME ...] [--record FILE.jsonl]

How it is done stands in `language_study.py`. Rank is a quarter of the width; where a basis is
renewed now and then, it is every 50 steps. Dense AdamW and torch's Muon are tuned the same way.
"""

from __future__ import annotations

import sys
from functools import partial

from language_study import Row, main, rates

RANK, EVERY = 32, 50

GALORE = {"rank": RANK, "every": EVERY}
ROWS = {
    "AdamW": Row("dense", rates(4e-3)),
    "AdamW, the rest at 4 lr": Row("dense", rates(4e-3), others=4.0),
    "Muon": Row("muon", rates(8e-3)),
    "GaLore, SVD": Row(
        "galore", rates(1.6e-2), {**GALORE, "basis": "svd", "moments": "keep", "stagger": False}
    ),
    "GaLore, warm iteration": Row("galore", rates(1.6e-2), {**GALORE, "moments": "keep"}),
    "GaLore, warm, rotated": Row("galore", rates(1.6e-2), {**GALORE, "moments": "rotate"}),
    "GaLore, random basis": Row("galore", rates(1.6e-2), {**GALORE, "basis": "random"}),
    "Fira": Row("fira", rates(1.6e-2), GALORE),
    "APOLLO": Row("apollo", rates(8e-3), GALORE),
    "LDAdam": Row("ldadam", rates(4e-3), {"rank": RANK}),
    "Q-GaLore": Row("qgalore", rates(3.2e-2), GALORE),
    "Q-GaLore, 8-bit weights": Row("qgalore", rates(3.2e-2), {**GALORE, "weight_bits": 8}),
    "tracked": Row("tracked", rates(1.6e-2), {"rank": RANK}),
    "tracked, residual": Row("tracked", rates(1.6e-2), {"rank": RANK, "residual": True}),
}


run = partial(main, "gradient_study", ROWS, __doc__ or "")

if __name__ == "__main__":
    sys.exit(run())
