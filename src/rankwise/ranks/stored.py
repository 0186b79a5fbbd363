"""A plan as JSON: written whole or not at all, and read strictly, errors naming the entry."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import OptionError, PlanError, nearest, unknown
from rankwise.layers import Form
from rankwise.ranks.shape import Cost, MatrixShape

if TYPE_CHECKING:
    from rankwise.ranks.plan import LayerPlan, Others, Plan

FORMAT = "rankwise plan 1"
_TOP = ("format", "form", "layers", "others", "notes", "provisional")
_LAYER = ("kind", "rows", "columns", "blocks", "rank", "reason", "trainable", "tied", "flops")


def to_dict(plan: Plan) -> dict[str, Any]:
    """A plan as JSON-able data."""
    split = plan.form.split
    return {
        "format": FORMAT,
        "form": {
            "norm": plan.form.norm,
            "core": plan.form.core,
            "separable": plan.form.separable,
            "split": split if isinstance(split, bool) else dict(split),
        },
        "layers": {layer.name: _layer_to_dict(layer) for layer in plan.layers},
        "others": asdict(plan.others),
        "notes": list(plan.notes),
        "provisional": plan.provisional,
    }


def _layer_to_dict(layer: LayerPlan) -> dict[str, Any]:
    return {
        "kind": layer.kind,
        "rows": layer.rows,
        "columns": layer.columns,
        "blocks": layer.shape.blocks,
        "rank": layer.rank,
        "reason": layer.reason,
        "trainable": layer.trainable,
        "tied": layer.tied,
        "flops": None if layer.work is None else asdict(layer.work),
    }


def to_fields(data: Any, layer: type[LayerPlan], others: type[Others]) -> dict[str, Any]:
    """Arguments of `Plan` from its data.

    Raises:
        PlanError: naming the entry that is wrong.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise PlanError(f"this is no plan ({found!r}); Plan.save writes format {FORMAT!r}")
    _check_keys("the plan", data, _TOP)
    form = _form(data["form"])
    lines = []
    for name, entry in _mapping("layers", data["layers"]).items():
        _check_keys(f"layer {name}", _mapping(f"layer {name}", entry), _LAYER)
        lines.append(layer(**_layer_fields(name, entry, form)))
    names = {line.name for line in lines}
    for line in lines:
        if line.tied:
            check_name(line.tied, names)
    _check_keys("others", _mapping("others", data["others"]), ("stored", "trainable", "flops"))
    flops = data["others"]["flops"]
    return {
        "layers": tuple(lines),
        "others": others(
            stored=_count("others: stored", data["others"]["stored"], least=None),
            trainable=_count("others: trainable", data["others"]["trainable"], least=None),
            flops=None if flops is None else _count("others: flops", flops, least=None),
        ),
        "form": form,
        "notes": tuple(_text("notes", note) for note in _list("notes", data["notes"])),
        "provisional": _text("provisional", data["provisional"]),
    }


def _layer_fields(name: str, entry: Mapping[str, Any], form: Form) -> dict[str, Any]:
    place = f"layer {name}: "
    shape = MatrixShape(
        *(_count(place + key, entry[key]) for key in ("rows", "columns")),
        norm=form.norm,
        core=form.core,
        blocks=_count(f"{place}blocks", entry["blocks"]),
    )
    work = entry["flops"]
    if work is not None:
        keys = ("dense", "linear", "quadratic")
        _check_keys(f"{place}flops", _mapping(f"{place}flops", work), keys)
        work = Cost(*(_count(f"{place}flops: {key}", work[key], least=0) for key in keys))
    if not isinstance(entry["trainable"], bool):
        raise PlanError(f"{place}trainable must be true or false, not {entry['trainable']!r}")
    check_rank(name, entry["rank"], shape)
    return {
        "name": name,
        "kind": _text(f"{place}kind", entry["kind"]),
        "shape": shape,
        "rank": entry["rank"],
        "reason": _text(f"{place}reason", entry["reason"]),
        "trainable": entry["trainable"],
        "tied": _text(f"{place}tied", entry["tied"]),
        "work": work,
    }


def _form(data: Any) -> Form:
    switches = ("norm", "core", "separable")
    _check_keys("form", _mapping("form", data), (*switches, "split"))
    for switch in switches:
        if not isinstance(data[switch], bool):
            raise PlanError(f"form: {switch} must be true or false, not {data[switch]!r}")
    try:
        return Form(**data)
    except OptionError as error:
        raise PlanError(f"form: {error}") from error


def check_rank(name: str, rank: Any, shape: MatrixShape) -> None:
    """Refuse what is neither None (dense) nor a rank of this matrix.

    Raises:
        PlanError: naming layer, shape and range.
    """
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if rank is not None and not (whole and 1 <= rank <= shape.full_rank):
        raise PlanError(
            f"layer {name} ({shape}): rank {rank!r} is outside 1 to {shape.full_rank}; null leaves "
            "it dense"
        )


def check_name(name: str, known: Iterable[str]) -> None:
    """Refuse a name that is no layer of the plan.

    Raises:
        PlanError: naming the closest.
    """
    names = list(known)
    if name not in names:
        raise PlanError(unknown("layer of the plan", name, nearest(name, names) or names[:8]))


def write(path: Path, text: str) -> None:
    """Replace a text file by another in one step."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        # mkstemp makes files private; a plan is as public as what `open` would have made.
        mask = os.umask(0)
        os.umask(mask)
        Path(scratch).chmod(0o666 & ~mask)
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def read(path: Path) -> Any:
    """The data of a JSON file.

    Raises:
        PlanError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"the plan cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise PlanError(f"this is no JSON: {error}") from error


def _check_keys(place: str, entry: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in entry:
        if key not in keys:
            raise PlanError(f"{place}: {unknown('entry', str(key), keys)}")
    for key in keys:
        if key not in entry:
            raise PlanError(f"{place}: the entry {key!r} is missing")


def _mapping(place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PlanError(f"{place} must map names to values, not be {value!r}")
    return value


def _list(place: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise PlanError(f"{place} must be a list, not {value!r}")
    return value


def _count(place: str, value: Any, *, least: int | None = 1) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (least is not None and value < least):
        raise PlanError(
            f"{place} must be a whole number{f' from {least}' if least else ''}, not {value!r}"
        )
    return value


def _text(place: str, value: Any) -> str:
    if not isinstance(value, str):
        raise PlanError(f"{place} must be text, not {value!r}")
    return value
