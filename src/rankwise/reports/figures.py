"""The closing figures of a run, each beside the dense one it is to be judged by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rankwise.reports.history import History, finite, pair
from rankwise.reports.words import duration, figure, short

Value = Callable[[History], float | None]


@dataclass(frozen=True)
class Measure:
    """One closing figure.

    Attributes:
        name: of the figure, with its unit.
        value: of a run.
        write: the value in words.
        own: what the run itself knows of its dense network, where no dense run is given.
        points: whether the two are compared by their difference in points, not by their ratio.
    """

    name: str
    value: Value
    write: Callable[[float], str]
    own: Value | None = None
    points: bool = False


@dataclass(frozen=True)
class Figure:
    """A measure of one run in words: its value, that of dense, and how the two compare."""

    name: str
    value: str
    dense: str
    against: str


def closing(history: History, dense: History | None) -> list[Figure]:
    """The figures that a run's records hold, in the order of `measures`."""
    told = []
    for measure in measures([history]):
        value = measure.value(history)
        if value is None:
            continue
        base = base_of(measure, history, dense)
        told.append(
            Figure(
                measure.name,
                measure.write(value),
                "" if base is None else measure.write(base),
                "" if base is None else against(measure, value, base),
            )
        )
    return told


def base_of(measure: Measure, history: History, dense: History | None) -> float | None:
    """The dense figure to set a run's against: a dense run's, else what the run knows itself."""
    if dense is history or (dense is not None and not history.finish):
        return None  # a run that has not ended is not set against one that has
    if dense is not None:
        base = measure.value(dense)
        if base is not None:
            return base
    return None if measure.own is None else measure.own(history)


def against(measure: Measure, value: float, base: float) -> str:
    """A value against its dense one: +0.12 points, 0.33×."""
    if measure.points:
        return f"{100 * (value - base):+.2f} points"
    return f"{value / base:.2f}×" if base else ""


def dense_run(history: History, given: Sequence[History]) -> History | None:
    """The dense run of the same model and data among those given; that of the same seed first."""
    same = [
        other
        for other in given
        if other.fact("method") == "dense"
        and all(other.fact(name) == history.fact(name) for name in ("model", "data"))
    ]
    of_seed = [other for other in same if other.fact("seed") == history.fact("seed")]
    return next(iter(of_seed or same), None)


def differences(history: History, dense: History) -> list[str]:
    """What of the recipe differs from a dense run's, beside method and seed: `lr 0.1, there 1`."""
    free = {"method", "method_options", "seed", "out", "checkpoint_every"}
    mine, theirs = history.recipe, dense.recipe
    if not mine or not theirs:
        return []
    names = [n for n in (mine | theirs) if n not in free and mine.get(n) != theirs.get(n)]
    return [f"{name} {mine.get(name)}, there {theirs.get(name)}" for name in names]


def measures(histories: Sequence[History]) -> list[Measure]:
    """The figures worth showing of these runs: those that one of them at least has."""
    language = any(history.language for history in histories)
    known = [*(_LANGUAGE if language else _ACCURACY), *_SIZES, *_TIMES]
    return [m for m in known if any(m.value(history) is not None for history in histories)]


def _of(key: str) -> Value:
    return lambda history: finite(history.finish, key)


def _first(key: str, index: int) -> Value:
    def value(history: History) -> float | None:
        both = pair(history.finish, key)
        return None if both is None else both[index]

    return value


def _perplexity(history: History) -> float | None:
    loss = finite(history.finish, "test_loss")
    return None if loss is None else math.exp(min(loss, 700.0))


def _bits(history: History) -> float | None:
    loss = finite(history.finish, "test_loss")
    return None if loss is None else loss / math.log(2)


def _validation(history: History) -> float | None:
    """Of the last epoch where the run has not ended."""
    ended = finite(history.finish, "validation_accuracy")
    if ended is not None or not history.epochs:
        return ended
    return finite(history.epochs[-1], "validation_accuracy")


def _step(history: History) -> float | None:
    low = finite(history.finish, "step_ms_low_rank")
    return finite(history.finish, "step_ms_dense") if low is None else low


def _own_dense_step(history: History) -> float | None:
    low = finite(history.finish, "step_ms_low_rank")
    return None if low is None else finite(history.finish, "step_ms_dense")


def _time(history: History) -> float | None:
    ended = finite(history.finish, "seconds")
    if ended is not None or not history.epochs:
        return ended
    return finite(history.epochs[-1], "seconds")


def _switch(history: History) -> float | None:
    return history.switches[0] if history.switches else None


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _milliseconds(value: float) -> str:
    return f"{figure(value, 3)} ms"


_ACCURACY = [
    Measure("test accuracy", _of("test_accuracy"), _percent, points=True),
    Measure("validation accuracy", _validation, _percent, points=True),
]
_LANGUAGE = [
    Measure("test perplexity", _perplexity, figure),
    Measure("test bits a token", _bits, figure),
    Measure("test BLEU", _of("test_bleu"), figure),
    Measure("validation accuracy", _validation, _percent, points=True),
]
_SIZES = [
    Measure("parameters stored", _first("parameters", 0), short, own=_first("dense_parameters", 0)),
    Measure(
        "parameters trainable", _first("parameters", 1), short, own=_first("dense_parameters", 1)
    ),
    Measure("forward FLOPs", _of("flops"), short, own=_of("dense_flops")),
]
_TIMES = [
    # The low-rank step against the dense one; a method without a switch has one kind of step.
    Measure("training step", _step, _milliseconds, own=_own_dense_step),
    Measure("total time", _time, duration),
    Measure("switch at epoch", _switch, figure),
]
