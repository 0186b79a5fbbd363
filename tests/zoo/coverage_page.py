"""Writes docs/coverage.md: what of each architecture becomes low-rank, what does not, and why.

    python tests/zoo/coverage_page.py

It builds the networks at their usual size without storage, so it needs neither memory nor weights.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import ZOO, Architecture

from rankwise import accounting, candidates, models, ranks
from rankwise.errors import SelectionError
from rankwise.training import environment

PAGE = Path(__file__).parent.parent.parent / "docs" / "coverage.md"
RULE = ranks.Ratio(0.25)
REPEATS = 3
SIZES = ("resnet-50", "deit-base", "vit-large", "bert-large", "gpt2-xl", "llama-7b", "llama-65b")

# The plan's reasons, without the numbers of one layer.
_SHORT = (
    (r"among the first.*", "first"),
    (r"among the last.*", "last"),
    (r"an embedding.*", "embedding"),
    (r"depthwise convolution.*", "depthwise convolution"),
    (r"rank \d+ would not make it smaller.*", "a quarter is not smaller"),
    (r"its parent reads the weight as a matrix", "read by its parent"),
    (r"its weight is computed from other parameters.*", "weight norm"),
    (r"its weight is tied to \S+ \((\w+)\), which stays dense", r"tied to \1"),
    (r"(\w+) has a forward of its own", r"\1 has its own forward"),
    (r"(\w+) has no low-rank form here", r"\1"),
)

_HEAD = """# Coverage

What `rankwise.plan(model, ranks.Ratio(0.25))` makes of {count} architectures at their usual size.
Written by `python tests/zoo/coverage_page.py`. The tests beside it hold that at tiny sizes each of
them is the dense network at full rank, in training and evaluation, and at a quarter trains, is
saved, loaded and multiplied out, with the parameters of the plan.

- **low-rank**: layers that become two factors, of all that hold one weight matrix.
- **left**: layers that could, but stay as they are under `layers="auto"`; a glob selects them.
- **refused**: layers that have no low-rank form here; the plan says so for each.
- **parameters**: stored, dense and planned. A ratio is of the rank: a square layer at 0.25 stores
  half of its weights, and embeddings stay.

† The forward depends on values, so a plan without storage knows the order of definition only.

| architecture | name | low-rank | left | refused | parameters | at 1/4 |
|---|---|---:|---|---|---:|---:|
"""

_SIZES_HEAD = """
## Published sizes, on the meta device

`rankwise plan --model NAME --ranks 0.25`: stored numbers and forward FLOPs of one input, dense and
planned, and the CPU seconds from the name to the plan, without the import of the packages: median
and range of {repeats}, one thread ({processor}), torch {torch}, transformers {transformers}.

| name | input | low-rank | parameters | at 1/4 | FLOPs | at 1/4 | break-even ranks | CPU seconds |
|---|---|---:|---:|---:|---:|---:|---|---|
"""


@dataclass(frozen=True)
class Found:
    """A network built without storage, its plan, and whether its forward could be followed."""

    network: Any
    plan: ranks.Plan | None
    traced: bool


def found(name: str) -> Found:
    """Plan the network of this name at a quarter; plan is None if no layer can be low-rank."""
    with torch.device("meta"):
        network = models.build(name)
    sample: Any = models.sample(name)
    traced = True
    try:
        accounting.trace(network, sample)
    except (RuntimeError, NotImplementedError):
        sample, traced = None, False
    try:
        return Found(network, ranks.plan(network, RULE, sample), traced)
    except SelectionError:
        return Found(network, None, traced)


def row(architecture: Architecture) -> str:
    """One line of the table."""
    here = found(architecture.full)
    surveyed = candidates.survey(here.network)
    obstacles = {name: candidate.obstacle for name, candidate in surveyed.items()}
    reasons = {name: why for name, why in obstacles.items() if why}
    stored = accounting.parameters(here.network).stored
    parameters, low = (stored, stored), 0
    if here.plan is not None:
        reasons = {line.name: line.reason for line in here.plan.layers if line.reason}
        parameters, low = here.plan.parameters, len(here.plan.ranks)
    left = Counter(_short(why) for name, why in reasons.items() if not obstacles.get(name))
    refused = Counter(_short(why) for name, why in reasons.items() if obstacles.get(name))
    refused += Counter(candidates.unlisted(here.network, surveyed).values())
    title = architecture.title + ("" if here.traced else " †")
    cells = (
        title,
        f"`{architecture.full.partition('?')[0]}`",
        f"{low} of {low + len(reasons)}",
        _listed(left),
        _listed(refused),
        f"{parameters[0] / 1e6:,.1f} M",
        f"{parameters[1] / 1e6:,.1f} M ({parameters[1] / parameters[0]:.0%})",
    )
    return f"| {' | '.join(cells)} |"


def _short(reason: str) -> str:
    for pattern, words in _SHORT:
        if re.fullmatch(pattern, reason):
            return re.sub(pattern, words, reason)
    return reason


def _listed(counted: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counted.items()))


def size_row(name: str) -> str:
    """One line of the table of sizes, with the time it took."""
    seconds, plan = [], None
    for _ in range(REPEATS):
        began = time.process_time()
        plan = found(name).plan
        seconds.append(time.process_time() - began)
    assert plan is not None
    assert plan.flops is not None
    (dense, planned), (before, after) = plan.parameters, plan.flops
    even = Counter(line.break_even for line in plan.layers if line.rank is not None)
    usual = ", ".join(f"{rank} ({count}×)" for rank, count in even.most_common(3))
    example: Any = models.sample(name)
    shape = (next(iter(example.values())) if isinstance(example, dict) else example).shape
    cells = (
        f"`{name}`",
        "×".join(map(str, shape)),
        f"{len(plan.ranks)} of {len(plan.layers)}",
        f"{dense:,}",
        f"{planned:,} ({planned / dense:.0%})",
        f"{before / 1e9:,.1f} G",
        f"{after / 1e9:,.1f} G ({after / before:.0%})",
        usual + (" ..." if len(even) > 3 else ""),
        f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write the page."""
    import transformers

    sys.path.append(str(Path(__file__).parent.parent))
    from torchvision_operators import stub_operators

    torch.set_num_threads(1)
    stub_operators()
    rows = [row(architecture) for architecture in ZOO if architecture.full]
    sizes = [size_row(name) for name in SIZES]
    head = _SIZES_HEAD.format(
        repeats=REPEATS,
        processor=environment.hardware(torch.device("cpu"), 1)["processor"],
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    parts = [_HEAD.format(count=len(rows)), "\n".join(rows), "\n", head, "\n".join(sizes), "\n"]
    PAGE.write_text("".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
