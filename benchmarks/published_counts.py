"""Are our networks as large as the published ones, dense and low-rank?

    python benchmarks/published_counts.py [--page]

Counts parameters and multiply-adds (MACs) of every network of the published tables, each made
low-rank as its paper does it: its form of convolution, its meaning of "ratio", its layers. Beside
each published figure stand ours and what lies between the two, computed too. Everything is counted
without storage, in seconds; nothing is trained. --page writes docs/studies/published-counts.md.

The rows are in published_networks.py.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankwise
from published_networks import MEANINGS, NETWORKS, ROWS, Network, Row
from rankwise import accounting

PAGE = Path(__file__).parent.parent / "docs" / "studies" / "published-counts.md"
QUANTITIES = ("parameters", "MACs")
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
COMMAND = "python benchmarks/published_counts.py --page"


@dataclass(frozen=True)
class Figure:
    """One quantity of one row.

    Attributes:
        ours: as this package counts.
        differs: what the published program counts besides: words -> amount; below 0: leaves out.
        published: as printed, such as "4.01 M" or "20,560,330"; empty if nothing was.
    """

    ours: int
    differs: dict[str, int]
    published: str

    @property
    def agrees(self) -> bool:
        """Whether ours with the differences, rounded as the published figure is, equals it."""
        number, _, unit = self.published.partition(" ")
        digits = len(number.partition(".")[2])
        total = (self.ours + sum(self.differs.values())) / UNITS[unit]
        return not number or f"{total:.{digits}f}" == number.replace(",", "")


def count(row: Row) -> dict[str, Figure]:
    """Parameters and MACs of a row: ours, what the paper counts otherwise, and its figures."""
    with torch.device("meta"):
        model, sample = row.network.build()
    differs = {
        kind: {words: amount(model, sample) for words, amount in row.differs.get(kind, ())}
        for kind in QUANTITIES
    }
    if row.make is not None:
        row.make(model)
    ours = (accounting.parameters(model).stored, accounting.macs(model, sample))
    return {
        kind: Figure(number, differs[kind], row.published.get(kind, ""))
        for kind, number in zip(QUANTITIES, ours, strict=True)
    }


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of a Markdown table: ours beside the published, and what lies between."""
    return [
        "| network | form | parameters | published | MACs | published | between the two |",
        "|---|---|---:|---:|---:|---:|---|",
        *(line(row, count(row)) for row in rows),
    ]


def line(row: Row, counted: dict[str, Figure]) -> str:
    """One row of the table."""
    cells = [row.network.title, row.form]
    for figure in counted.values():
        cells += [f"{figure.ours:,}", figure.published + ("" if figure.agrees else " (differs)")]
    words = [
        f"{kind}: {reason} ({amount:+,})"
        for kind, figure in counted.items()
        for reason, amount in figure.differs.items()
    ]
    return f"| {' | '.join(cells)} | {'; '.join(words)} |"


def ratios(networks: Sequence[Network]) -> list[str]:
    """Every network, dense and at each ratio in both meanings of the word."""
    made = [(meaning, by) for meaning in MEANINGS for by in (0.25, 0.2)]
    head = " | ".join(f"{meaning}, {by:g}" for meaning, by in made)
    lines = [f"| network | dense | {head} |", f"|---|{'---:|' * (1 + len(made))}"]
    for network in networks:
        rows = [Row(network, "dense")]
        rows += [
            Row(network, meaning, partial(MEANINGS[meaning], network, by)) for meaning, by in made
        ]
        cells = [[figure.ours / 1e6 for figure in count(row).values()] for row in rows]
        lines.append(f"| {network.title} | {' | '.join(f'{p:.2f} / {m:,.0f}' for p, m in cells)} |")
    return lines


def arguments() -> list[str]:
    """What the published programs do at a ratio of 0.2, in numbers."""
    shapes = ((1024, 8), *[(1024, 256)] * 3)  # of the LSTM's four matrices
    of_rows, of_short = (
        sum(int(0.2 * side(*shape)) * sum(shape) for shape in shapes) for side in (max, min)
    )
    rank = int(0.2 * 512)
    product = rank**0.5 * 0.02**2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer: Any = nn.Sequential(nn.Linear(512, 512))
        nn.init.xavier_uniform_(layer[0].weight)  # as models.ViT does
    dense = layer[0].weight.detach().std()
    rankwise.factorize(layer, {"0": rank}, init="variance")
    ours = layer[0].weight.detach().std()
    return [
        "- A stem of 3 channels in the separable form: a matrix with 3 x 3 columns, so that the "
        f"rank is int(0.2 x 9) = {int(0.2 * 9)}.",
        f"- An LSTM of 8-256-256: its matrices hold {sum(o * i for o, i in shapes):,} numbers. "
        f"With a rank of 0.2 times the 1024 rows, {int(0.2 * 1024)}, the factors hold {of_rows:,}, "
        f"more than dense; with 0.2 times the short side {of_short:,}.",
        f"- A ViT whose factors both start from deviation 0.02, at rank {rank}: the product has "
        f"deviation {product:.4f}, {0.02 / product:.1f} times too small. `init=variance` gives "
        f"{ours:.4f} where the dense layer has {dense:.4f}.",
    ]


def page() -> str:
    """The page with its tables counted anew; its words are written by hand."""
    text = PAGE.read_text(encoding="utf-8")
    parts = {"published": table(ROWS), "ratios": ratios(NETWORKS), "arguments": arguments()}
    for name, lines in parts.items():
        begin, end = f"<!-- {name}: {COMMAND} -->", f"<!-- end of {name} -->"
        whole = "\n".join([begin, *lines, end])
        text = re.sub(
            f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, w=whole: w, text, flags=re.S
        )
    return text


def main(given: Sequence[str] | None = None) -> None:
    """Print the tables, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.name}")
    if parser.parse_args(given).page:
        PAGE.write_text(page(), encoding="utf-8")
        return
    print("\n".join([*table(ROWS), "", *ratios(NETWORKS), "", *arguments()]))


if __name__ == "__main__":
    main()
