"""What a run tells while it goes, and its outcome; the loop fills these in, others show them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rankwise.ranks import Plan
    from rankwise.training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is after a step."""

    epoch: int  # 1-based
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    unit: str  # image, token
    units_per_second: float


@dataclass(frozen=True, kw_only=True)
class Switch:
    """A structural change: the run's event, and step times once both sides are measured."""

    epoch: float  # epochs finished when it happened
    event: Mapping[str, Any]
    step_ms_before: float | None
    step_ms_after: float | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a run.

    `parameters` are those of the final network, `dense_parameters` those of the network as the
    recipe names it: stored, and of them trainable. FLOPs are per unit (image or token), forward,
    losses are means over units, in nats; accuracy is the share of right predictions. Step times
    are medians in ms of the training step alone: as a dense network, and as a low-rank one; speed
    is that of the last form.
    """

    model: str
    data: str
    method: str
    seed: int
    test_accuracy: float
    test_loss: float
    validation_accuracy: float
    parameters: tuple[int, int]
    dense_parameters: tuple[int, int]
    flops: int
    dense_flops: int
    step_ms_dense: float | None
    step_ms_low_rank: float | None
    seconds: float
    epochs: int
    steps: int
    switches: tuple[Mapping[str, Any], ...]
    out: str
    # Records of earlier versions have none of these.
    task: str = "classification"
    validation_loss: float | None = None
    units_per_second: float | None = None
    state_bytes: int | None = None  # kept beside the weights at the end of training
    test_bleu: float | None = None  # of greedy translations, 0 to 100

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Result:
        """Read the `finish` line of a run's records."""
        names = [field.name for field in dataclasses.fields(cls)]
        optional = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
        values = {name: record[name] for name in names if name in record or name not in optional}
        for name in ("parameters", "dense_parameters", "switches"):
            values[name] = tuple(values[name])
        return cls(**values)


class Reporter(Protocol):
    """Whoever shows a run; worker 0 alone calls it."""

    def loading(self, done: int, total: int) -> None:
        """So many of a folder's images are read."""
        ...

    def start(self, recipe: Recipe, out: Path, facts: Mapping[str, Any]) -> None:
        """The run begins; `facts` is the `start` line of the records."""
        ...

    def plan(self, plan: Plan) -> None:
        """Which layers are to become low-rank."""
        ...

    def decision(self, event: Mapping[str, Any]) -> None:
        """The run reports an event: it has decided something, perhaps; switches come apart."""
        ...

    def step(self, progress: Progress) -> None:
        """A step is done."""
        ...

    def epoch(self, record: Mapping[str, Any]) -> None:
        """An epoch is done and validated; `record` is its line of the records."""
        ...

    def switch(self, switch: Switch) -> None:
        """The structure changed, some steps ago: the new step time is known."""
        ...

    def finish(self, result: Result) -> None:
        """The run is complete."""
        ...


class Silent:
    """Shows nothing."""

    def loading(self, done: int, total: int) -> None: ...

    def start(self, recipe: Recipe, out: Path, facts: Mapping[str, Any]) -> None: ...

    def plan(self, plan: Plan) -> None: ...

    def decision(self, event: Mapping[str, Any]) -> None: ...

    def step(self, progress: Progress) -> None: ...

    def epoch(self, record: Mapping[str, Any]) -> None: ...

    def switch(self, switch: Switch) -> None: ...

    def finish(self, result: Result) -> None: ...
