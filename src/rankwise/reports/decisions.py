"""Every decision of a run in order, one line each in plain words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.reports.history import History, finite, mapping, number, pair, text
from rankwise.reports.words import duration, figure, plural, several, short

Line = dict[str, Any]


@dataclass(frozen=True)
class Decision:
    """One thing that a run decided or did.

    Attributes:
        when: in epochs, or in steps where the run's records know no epochs; None if not recorded.
        kind: a word or two for it: plan, gains, switch due, switch, shrink.
        words: what was decided, and why.
    """

    when: float | None
    kind: str
    words: str


def in_words(record: Line) -> str:
    """One decision by itself, as a run says it while it goes; empty for what is no decision.

    Args:
        record: an event with its "event" and "step".
    """
    teller = _TELLERS.get(record["event"])
    if teller is None or record["event"] not in _BY_THEMSELVES:
        return ""
    kind, words = teller(record, History(Path(), [record]))
    return f"{kind}: {words}"


def decisions(history: History) -> list[Decision]:
    """What a run decided, oldest first; epochs and single measurements are no decisions."""
    told: list[Decision] = []
    for record in history.records:
        event = record["event"]
        if event in ("start", "epoch", "finish"):
            continue
        if event == "stable ranks" and any(d.kind == "tracking" for d in told):
            continue
        teller = _TELLERS.get(event)
        kind, words = (event, _anything(record)) if teller is None else teller(record, history)
        # A resumed run announces its plan again, and a shrink has said what the new plan does.
        known = any(d.kind == "plan" and d.words == words for d in told)
        if event == "plan" and (known or (told and told[-1].kind == "shrink")):
            continue
        told.append(Decision(history.when(record), kind, words))
    return told


def _plan(record: Line, _: History) -> tuple[str, str]:
    layers = [layer for layer in record["layers"] if isinstance(layer, dict)]
    low = sum(isinstance(layer.get("rank"), int) for layer in layers)
    return "plan", text(record, "summary") or f"{low} of {plural(len(layers), 'layer')} low-rank"


def _tracking(record: Line, history: History) -> tuple[str, str]:
    lines = history.all("stable ranks")
    until = history.when(lines[-1])
    end = (
        "" if until is None or len(lines) == 1 else f", the last at {history.unit} {figure(until)}"
    )
    watched = plural(len(record["values"]), "layer")
    return "tracking", f"stable ranks of {watched}, {plural(len(lines), 'time')}{end}"


def _gains(record: Line, _: History) -> tuple[str, str]:
    rows = [row for row in record["rows"] if isinstance(row, dict)]
    known = [(gain, text(row, "layer")) for row in rows if (gain := finite(row, "gain"))]
    kept = sum(row.get("kept") is True for row in rows)
    words = f"forward and backward of {plural(len(rows), 'layer')} timed dense and low-rank"
    if known:
        (least, slow), (most, fast) = min(known), max(known)
        words += f": from {figure(least, 2)}× ({slow}) to {figure(most, 2)}× ({fast})"
    return "gains", f"{words}; {kept} may become low-rank"


def _settled(record: Line, _: History) -> tuple[str, str]:
    settled, moving = list(record["layers"]), list(mapping(record, "moving"))
    parts = []
    if settled:
        parts.append(f"{plural(len(settled), 'layer')} settled ({several(settled)})")
    if moving:
        parts.append(f"{plural(len(moving), 'layer')} still moving ({several(moving)})")
    reason = text(record, "reason")
    words = ", ".join(parts) or "no layer settled"
    # At the latest moment of a run nothing need have settled.
    return "switch due", f"{reason}: {words}" if reason else words


def _changed(record: Line, _: History) -> tuple[str, str]:
    """Live low-rank layers took other ranks."""
    changes = {name: p for name in record["layers"] if (p := pair(record["layers"], name))}
    moved = [f"{name} {old:.0f}→{new:.0f}" for name, (old, new) in changes.items()]
    parts = [f"{plural(len(moved), 'layer')} ({several(moved)})" if moved else "no layer"]
    energy = finite(record, "energy")
    if energy is not None:
        parts.append(f"{100 * energy:.2f} % of the energy kept, or more")
    return text(record, "kind", "ranks"), "; ".join([*parts, *_effects(record)])


def _switch(record: Line, _: History) -> tuple[str, str]:
    layers = finite(record, "layers")
    made = "" if layers is None else f" made {plural(int(layers), 'layer')} low-rank"
    if record["event"] == "finalize":
        made = " let go of its own machinery"
    parts = [(text(record, "method") or "a method") + made, *_effects(record)]
    factor = finite(record, "lr_factor")
    if factor not in (None, 1.0):
        parts.append(f"learning rate × {figure(factor)}")
    return record["event"], "; ".join(parts)


def _effects(record: Line) -> list[str]:
    """What a change did to the size, the loss, the optimizer, and how long it took."""
    parts = []
    parameters, moments = pair(record, "parameters"), mapping(record, "moments")
    if parameters and parameters[0] != parameters[1]:
        before, after = parameters
        share = f" ({after / before:.0%})" if before else ""
        parts.append(f"parameters {short(before)} → {short(after)}{share}")
    before, after = number(record, "loss_before"), number(record, "loss_after")
    if before is not None and after is not None:
        parts.append(f"validation loss {before:.4f} → {after:.4f}{_statistics(record)}")
    carried, fresh = finite(moments, "carried"), finite(moments, "fresh")
    if carried is not None and fresh is not None:
        parts.append(f"{carried:.0f} moments carried, {fresh:.0f} fresh")
    seconds = finite(record, "seconds")
    return [*parts, f"in {duration(seconds)}"] if seconds is not None else parts


def _statistics(record: Line) -> str:
    """Which BatchNorm statistics the loss after a change was taken with."""
    calibrated = number(record, "loss_calibrated")
    if calibrated is not None:
        return f", {calibrated:.4f} once BatchNorm's statistics were gathered anew"
    return (
        " (by the dense layers' BatchNorm statistics)"
        if finite(record, "running_statistics")
        else ""
    )


def _updates(record: Line, _: History) -> tuple[str, str]:
    layers, rank, heads = (finite(record, key) or 0 for key in ("layers", "rank", "heads"))
    words = f"{plural(int(layers), 'layer')} frozen, with updates of rank {rank:.0f}"
    words += f", {heads:.0f} heads" if heads > 1 else ""
    parameters = pair(record, "parameters")
    if parameters:
        stored, learning = parameters
        words += f"; {short(learning)} of {short(stored)} parameters learn"
    return "updates", words


def _merge(record: Line, _: History) -> tuple[str, str]:
    reset = finite(mapping(record, "moments"), "reset")
    words = f"{text(record, 'method') or 'a method'} folded its updates into the weights"
    return "merge", words + (f"; {reset:,.0f} entries of moments set to zero" if reset else "")


def _basis(record: Line, _: History) -> tuple[str, str]:
    count = finite(record, "matrices")
    matrices = "matrices" if count is None else plural(int(count), "matrix").replace("xs", "ces")
    first, reason = text(record, "first"), text(record, "reason")
    words = f"{matrices} kept the old basis" + (f", {first} first" if first else "")
    return "basis kept", words + (f": {reason}" if reason else "")


def _resume(record: Line, _: History) -> tuple[str, str]:
    when = text(record, "time")
    return "resume", "taken up from a checkpoint" + (f", {when}" if when else "")


def _anything(record: Line) -> str:
    """An event that is not known here, by its plain values."""
    shown = []
    for key in record.keys() - {"event", "step", "epoch"}:
        value = number(record, key)
        said = text(record, key) if value is None else figure(value, 6)
        if said:
            shown.append(f"{key} {said}")
    return ", ".join(sorted(shown))


def _weights(record: Line, _: History) -> tuple[str, str]:
    taken, every = pair(record, "numbers") or (0, 0)
    words = f"{short(taken)} of {short(every)} numbers from {text(record, 'source')}"
    fresh = [name for name in record.get("fresh", ()) if isinstance(name, str)]
    return "weights", words + (f"; fresh: {several(fresh)}" if fresh else "")


_TELLERS: Mapping[str, Callable[[Line, History], tuple[str, str]]] = {
    "weights": _weights,
    "plan": _plan,
    "stable ranks": _tracking,
    "gains": _gains,
    "settled": _settled,
    "ranks": _changed,
    "switch": _switch,
    "finalize": _switch,
    "updates": _updates,
    "merge": _merge,
    "basis kept": _basis,
    "resume": _resume,
}
# What is said while a run goes on; a switch is shown when its step time is known.
_BY_THEMSELVES = frozenset(
    {"weights", "plan", "gains", "settled", "ranks", "updates", "merge", "basis kept"}
)
