"""The plan as data: which layers become low-rank, what that saves, and why others stay."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rankwise.errors import PlanError
from rankwise.layers import Form
from rankwise.ranks import entries, stored
from rankwise.ranks.naming import milliseconds
from rankwise.ranks.shape import Cost, MatrixShape


@dataclass(frozen=True)
class LayerPlan:
    """One layer's line of the plan; the counts follow from its rank.

    Attributes:
        name: module name.
        kind: class of the dense layer.
        shape: the matrix that is factorised, or the blocks of it.
        rank: of each block; None if it stays dense.
        reason: why it stays dense.
        trainable: whether its weight requires a gradient.
        tied: name of an earlier layer of the plan whose weight this one uses, or empty; such a
            weight counts once.
        work: FLOPs of one forward of the sample, dense and by rank; None without a sample, for a
            layer that it did not call, and where they are not those of matrix products.
        ms: measured milliseconds of forward and backward of all its calls in a step: dense, and at
            its rank, or at the one that it would have had; None if not measured (`ranks.Gains`).
    """

    name: str
    kind: str
    shape: MatrixShape
    rank: int | None = None
    reason: str = ""
    trainable: bool = True
    tied: str = ""
    work: Cost | None = None
    ms: tuple[float, float] | None = None

    @property
    def gain(self) -> float | None:
        """Speed-up of forward and backward at the rank that was asked for; None if not measured."""
        return None if self.ms is None else self.ms[0] / self.ms[1]

    @property
    def rows(self) -> int:
        """M of one block: O, over the number of blocks."""
        return self.shape.rows

    @property
    def columns(self) -> int:
        """N of one block: I, times the kernel's area."""
        return self.shape.columns

    @property
    def break_even(self) -> int:
        """The smallest rank that does not make the layer smaller."""
        return self.shape.break_even

    @property
    def parameters(self) -> tuple[int, int]:
        """Numbers its weight stores: dense, planned."""
        return self.shape.dense, self.shape.stored.of(self.rank)

    @property
    def flops(self) -> tuple[int, int] | None:
        """Of one forward of the sample: dense, planned; None where there are none to know."""
        if self.work is None or (self.rank is None and not self.work.dense):
            return None  # not counted, or a look-up that stays one
        return self.work.dense, self.work.of(self.rank)

    def as_dict(self) -> dict[str, Any]:
        """The line as numbers and strings, for records of a run."""
        more: dict[str, Any]
        names = ("name", "kind", "rows", "columns", "rank", "reason", "parameters", "flops")
        more = {"blocks": self.shape.blocks, "break_even": self.break_even}
        if self.ms is not None:
            more |= {"ms": list(self.ms), "gain": self.gain}
        return {**{name: getattr(self, name) for name in names}, **more}


@dataclass(frozen=True, kw_only=True)
class Others:
    """What the model has beside the weights of the plan's layers; no rank changes it.

    Attributes:
        stored: numbers stored.
        trainable: numbers that require a gradient.
        flops: of one forward of the sample; None without one.
    """

    stored: int = 0
    trainable: int = 0
    flops: int | None = None


@dataclass(frozen=True)
class Plan:
    """What `factorize` would do; print it, pass it to `factorize`, save it, edit it.

    Attributes:
        layers: every layer with a weight matrix, in execution order where known.
        others: the rest of the model.
        form: how the layers are factorised.
        notes: what the reader should know.
        provisional: when the ranks will be decided, if they are not yet; empty if they are.
        ranks: layer name -> rank, of the layers that become low-rank.
    """

    layers: tuple[LayerPlan, ...]
    others: Others = field(default_factory=Others)
    form: Form = field(default_factory=Form)
    notes: tuple[str, ...] = ()
    provisional: str = ""
    ranks: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        ranks = {layer.name: layer.rank for layer in self.layers if layer.rank is not None}
        object.__setattr__(self, "ranks", ranks)

    @property
    def parameters(self) -> tuple[int, int]:
        """Numbers stored by the whole model: dense, planned."""
        own = [layer.parameters for layer in self.layers if not layer.tied]
        return _sums(self.others.stored, own)

    @property
    def trainable(self) -> tuple[int, int]:
        """Numbers of the whole model that require a gradient: dense, planned."""
        own = [layer.parameters for layer in self.layers if layer.trainable and not layer.tied]
        return _sums(self.others.trainable, own)

    @property
    def flops(self) -> tuple[int, int] | None:
        """Forward FLOPs of the whole model on the sample: dense, planned; None without one."""
        if self.others.flops is None:
            return None
        known = [layer.flops for layer in self.layers if layer.flops is not None]
        return _sums(self.others.flops, known)

    @property
    def timed(self) -> bool:
        """Whether the time of any layer was measured."""
        return any(layer.ms is not None for layer in self.layers)

    @property
    def ms(self) -> tuple[float, float] | None:
        """Measured milliseconds of a step in the timed layers: dense, planned; None without any."""
        pairs = [(layer.ms, layer.rank) for layer in self.layers if layer.ms is not None]
        planned = sum(ms[0] if rank is None else ms[1] for ms, rank in pairs)
        return (sum(ms[0] for ms, _ in pairs), planned) if pairs else None

    def with_ranks(self, ranks: Mapping[str, int | None]) -> Plan:
        """The same plan with other ranks for some layers; None leaves one dense.

        Layers that share a weight change together.

        Raises:
            PlanError: no such layer, two ranks for one weight, or one outside 1 ... full rank.
        """
        owner = {layer.name: layer.tied or layer.name for layer in self.layers}
        asked: dict[str, int | None] = {}
        for name, rank in ranks.items():
            stored.check_name(name, owner)
            if asked.setdefault(owner[name], rank) != rank:
                raise PlanError(
                    f"layer {name} shares its weight with {owner[name]}, but is given the rank "
                    f"{rank} and not {asked[owner[name]]}"
                )
        return dataclasses.replace(
            self,
            layers=tuple(
                _with_rank(layer, asked[owner[layer.name]]) if owner[layer.name] in asked else layer
                for layer in self.layers
            ),
        )

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data, from which `from_dict` makes an equal one."""
        return stored.to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The plan that `as_dict` returned, perhaps with other ranks; counts follow from these.

        Raises:
            PlanError: naming the entry that is missing, unknown, of a wrong type or out of range.
        """
        return cls(**stored.to_fields(data, LayerPlan, Others))

    def save(self, path: str | Path) -> None:
        """Write the plan as a JSON file, to read, edit the ranks of, and load.

        Raises:
            OSError: the file cannot be written.
        """
        entries.write(Path(path), json.dumps(self.as_dict(), indent=2, ensure_ascii=False))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan that `save` wrote; nothing in the file is ever executed.

        Raises:
            PlanError: no such file, no JSON, or no plan; says where.
        """
        place = Path(path)
        try:
            return cls.from_dict(entries.read(place))
        except PlanError as error:
            raise PlanError(f"{place}: {error}") from error

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells, header first: for any kind of printer."""
        head = ["layer", "kind", "shape", "rank", "break-even", "parameters", "ratio", "FLOPs"]
        head += ["gain"] if self.timed else []
        rows = (_row(layer, self.timed) for layer in self.layers)
        return [(*head, "stays dense because"), *rows]

    def summary(self) -> str:
        """One line: how many layers, parameters and FLOPs before and after."""
        if self.provisional:
            open_layers = sum(layer.reason == self.provisional for layer in self.layers)
            return f"{open_layers} of {len(self.layers)} layers to be decided: {self.provisional}"
        before, after = self.parameters
        text = (
            f"{len(self.ranks)} of {len(self.layers)} layers low-rank; parameters "
            f"{_change(before, after)}"
        )
        if self.trainable[0] != before:
            text += f", trainable {_change(*self.trainable)}"
        if self.flops is not None and self.flops[0]:
            text += f"; forward FLOPs {_short(self.flops[0])} -> {_short(self.flops[1])}"
            macs = [_short(count / 2) for count in self.flops]
            text += f" ({self.flops[1] / self.flops[0]:.1%}), MACs {macs[0]} -> {macs[1]}"
        if self.ms is not None:
            dense, planned = self.ms
            count = sum(layer.ms is not None for layer in self.layers)
            text += f"; time of a step in the {count} timed layers {milliseconds(dense)} -> "
            text += f"{milliseconds(planned)} ({dense / planned:.2f}×)"
        return text

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        left = (0, 1, len(widths) - 1)
        lines = [
            "  ".join(
                c.ljust(w) if i in left else c.rjust(w)
                for i, (c, w) in enumerate(zip(r, widths, strict=True))
            ).rstrip()
            for r in rows
        ]
        return "\n".join(
            [lines[0], "-" * len(lines[0]), *lines[1:], "", self.summary(), *self.notes]
        )


def _sums(others: int, pairs: list[tuple[int, int]]) -> tuple[int, int]:
    return others + sum(dense for dense, _ in pairs), others + sum(new for _, new in pairs)


def _with_rank(layer: LayerPlan, rank: int | None) -> LayerPlan:
    stored.check_rank(layer.name, rank, layer.shape)
    reason = "" if rank else layer.reason or "as asked"
    ms = layer.ms if rank in (None, layer.rank) else None  # measured at another rank
    return dataclasses.replace(layer, rank=rank, reason=reason, ms=ms)


def _row(layer: LayerPlan, timed: bool) -> tuple[str, ...]:
    dense, planned = layer.parameters
    low = layer.rank is not None
    flops = "" if layer.flops is None else _short(layer.flops[0])
    if layer.flops is not None and low:
        flops += f" -> {_short(layer.flops[1])}"
    return (
        layer.name,
        layer.kind,
        str(layer.shape),
        f"{layer.rank} of {layer.shape.full_rank}" if low else "dense",
        str(layer.break_even),
        f"{dense:,} -> {planned:,}" if low else f"{dense:,}",
        f"{planned / dense:.2f}" if low else "",
        flops,
        *([("" if layer.gain is None else f"{layer.gain:.2f}×")] if timed else []),
        layer.reason,
    )


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} ({after / before:.1%})" if before else "none"


def _short(count: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
