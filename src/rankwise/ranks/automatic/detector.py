"""When the stable ranks of a network have settled: the moment to become low-rank (2305.02538).

A detector is told, now and then, the scaled stable rank of every layer, and says which layers have
settled, which still move and by how much, and whether the switch is due. It knows neither model
nor weights. A value of 0 or nan is no observation: a layer that has only such values neither
settles nor holds up the others.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from rankwise.errors import CheckpointError, OptionError, unknown

# Epochs are sums of steps over steps per epoch.
_ROUNDING = 1e-9


# A share of the stable rank of random weights that only learning falls below.
BEGUN = 0.95


class Detector(ABC):
    """Watches stable ranks and says when the switch is due.

    Attributes:
        times: when each observation was made, in epochs, or in observations where epochs are not
            known.
        history: layer -> its values, one for each observation; nan where there was none.
        settled: layer -> when it settled.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.history: dict[str, list[float]] = {}
        self.settled: dict[str, float] = {}
        self._due = False

    def observe(self, when: float, values: Mapping[str, float]) -> None:
        """Take note of one observation.

        Args:
            when: epochs of training so far, or the number of the observation; above the last.
            values: layer -> scaled stable rank, neither rounded nor limited to the full rank.

        Raises:
            OptionError: a time that is not after the last one.
        """
        if not math.isfinite(when) or (self.times and when <= self.times[-1]):
            last = f"after {self.times[-1]:g}" if self.times else "a number"
            raise OptionError(f"an observation at {when!r}: its time must be {last}")
        for name in values:
            self.history.setdefault(name, [math.nan] * len(self.times))
        for name, seen in self.history.items():
            value = float(values.get(name, math.nan))
            seen.append(value if math.isfinite(value) else math.nan)
        self.times.append(float(when))
        self._judge()
        self._due = self._due or self._is_due()

    @property
    def due(self) -> bool:
        """Whether the switch is due; once it is, it stays so."""
        return self._due

    @property
    def watched(self) -> list[str]:
        """The layers that count: those whose last value is an observation, or that have settled."""
        return [n for n, seen in self.history.items() if n in self.settled or _counts(seen[-1])]

    @property
    def moving(self) -> dict[str, float]:
        """Layers that have not settled -> their slope (`slope`), the fastest first."""
        slopes = {name: self.slope(name) for name in self.watched if name not in self.settled}
        return dict(sorted(slopes.items(), key=lambda item: -_speed(item[1])))

    @abstractmethod
    def slope(self, name: str) -> float:
        """How fast a layer moves now, in this detector's unit; nan if that is not known yet."""

    @abstractmethod
    def _judge(self) -> None:
        """Bring `settled` up to date after an observation."""

    @abstractmethod
    def _is_due(self) -> bool:
        """Whether what has settled is enough."""

    def state_dict(self) -> dict[str, Any]:
        """All that was observed and concluded: tensors, numbers and names."""
        return {
            "times": torch.tensor(self.times, dtype=torch.float64, device="cpu"),
            "history": {
                name: torch.tensor(seen, dtype=torch.float64, device="cpu")
                for name, seen in self.history.items()
            },
            "settled": dict(self.settled),
            "due": self._due,
            "kind": type(self).__name__,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CheckpointError: the state of something else.
        """
        kind, own = state_dict.get("kind"), type(self).__name__
        if kind != own:
            raise CheckpointError(f"this is the state of {kind or 'no detector'}, not of {own}")
        self.times = state_dict["times"].tolist()
        self.history = {name: seen.tolist() for name, seen in state_dict["history"].items()}
        self.settled = dict(state_dict["settled"])
        self._due = bool(state_dict["due"])


class RelativeSlope(Detector):
    """A layer has settled while its stable rank moves by less than a share of itself.

    The slope is that of the straight line through ln(stable rank) over a window, by least squares,
    so it means the same for a layer of any width. A layer that moves again is open again. The
    switch is due when the settled layers hold the quorum of the parameters.

    A layer that is at the stable rank of random weights has not begun to learn, and does not
    settle: while the learning rate rises, or a deep network is stuck at chance, ranks stand still
    as well. All values of the window must be below `BEGUN` of it. A layer that never falls so far
    holds up the switch, if it is more than the quorum leaves open.

    Args:
        window: length of the window, in the unit of `when`; at least the last three observations
            are used.
        tolerance: largest slope of a settled layer: its change in one unit of `when` over itself.
        quorum: share of the layers, by their sizes, that has to be settled.
        sizes: layer -> number of its parameters; all layers count the same without it.
        full: layer -> full rank, which is the scaled stable rank of random weights; without it the
            first value that was observed.

    Example:
        >>> detector = RelativeSlope(window=2, tolerance=0.01)
        >>> for epoch, rank in enumerate([40.0, 20.0, 20.1, 20.0]):
        ...     detector.observe(epoch, {"layer": rank})
        >>> detector.settled, detector.due
        ({'layer': 3.0}, True)
    """

    def __init__(
        self,
        window: float = 3.0,
        tolerance: float = 0.03,
        *,
        quorum: float = 0.9,
        sizes: Mapping[str, int] = MappingProxyType({}),
        full: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        for option, value in (("window", window), ("tolerance", tolerance)):
            if not (math.isfinite(value) and value > 0):
                raise OptionError(f"RelativeSlope: {option}={value!r} must be above 0")
        if not 0 < quorum <= 1:
            raise OptionError(f"RelativeSlope: quorum={quorum!r} is outside (0, 1]: it is a share")
        self.window, self.tolerance = float(window), float(tolerance)
        self.quorum, self.sizes, self.full = float(quorum), dict(sizes), dict(full)

    @property
    def share(self) -> float:
        """Share of the watched layers, by their sizes, that has settled; 0 if none is watched."""
        sizes = {name: self.sizes.get(name, 1) for name in self.watched}
        settled = sum(size for name, size in sizes.items() if name in self.settled)
        return settled / max(sum(sizes.values()), 1)

    @property
    def untrained(self) -> list[str]:
        """The watched layers whose stable rank is still that of random weights."""
        last = {name: next(filter(_counts, self.history[name][::-1])) for name in self.watched}
        return [name for name, value in last.items() if value > self._random(name)]

    def _random(self, name: str) -> float:
        return BEGUN * self.full.get(name, next(filter(_counts, self.history[name])))

    def slope(self, name: str) -> float:
        """d ln(stable rank) / d when over the window; nan before as much has been seen."""
        times, values = self._window(name)
        return _slope(times, [math.log(value) for value in values]) if times else math.nan

    def _window(self, name: str) -> tuple[list[float], list[float]]:
        """Times and values of the last observations; none before the window has passed."""
        begin, passed = self.times[-1] - self.window, False
        chosen: list[tuple[float, float]] = []
        for time, value in zip(self.times[::-1], self.history[name][::-1], strict=True):
            if _counts(value):
                passed = passed or time <= begin + _ROUNDING
                if time < begin - _ROUNDING and len(chosen) >= 3:
                    break
                chosen.append((time, value))
        if len(chosen) < 3 or not passed:
            return [], []
        return [time for time, _ in chosen], [value for _, value in chosen]

    def _judge(self) -> None:
        for name in self.history:
            _, values = self._window(name)
            learns = bool(values) and max(values) <= self._random(name)
            if learns and abs(self.slope(name)) <= self.tolerance:
                self.settled.setdefault(name, self.times[-1])
            else:
                self.settled.pop(name, None)

    def _is_due(self) -> bool:
        return self.share >= self.quorum - _ROUNDING


@dataclass(frozen=True)
class Constants:
    """Numbers of one of the published programs.

    Attributes:
        smoothing: N; the moving average gives the newest value the weight 2 / (N + 1).
        window: L, how many slopes are averaged.
        threshold: largest mean slope of a stable layer, in ranks an epoch.
        earliest: the first epoch at which a layer may be stable.
        relaxed: pairs (so many layers left or fewer, factor on the threshold), the least first.
    """

    smoothing: int
    window: int
    threshold: float
    earliest: int
    relaxed: tuple[tuple[int, float], ...]

    def allowed(self, left: int) -> float:
        """The threshold while so many layers are left."""
        return self.threshold * next((f for limit, f in self.relaxed if left <= limit), 1.0)


PRESETS: Mapping[str, Constants] = MappingProxyType(
    {
        "cifar": Constants(15, 11, 0.1, 15, ((1, 5.0), (2, 2.5))),
        "imagenet": Constants(5, 5, 0.33, 5, ((3, 5.0), (6, 2.5))),
        "transformer": Constants(5, 5, 0.411, 5, ((4, 5.0), (9, 2.5))),
    }
)


class Published(Detector):
    """The rule of the published programs of 2305.02538, with the constants of one of them.

    One observation an epoch (of several, the first counts): the rank ceil(value), at most the full
    rank. It is smoothed by a moving average; a layer is stable, for good, when the mean of the
    last slopes of that average is below a threshold in ranks an epoch; the threshold is relaxed
    when few layers are left, counted before the observation. The switch is due one epoch after
    the last layer became stable.

    Args:
        preset: "cifar" (also SVHN), "imagenet" (its CNNs), or "transformer" (DeiT, ResMLP).
        full: layer -> full rank.

    Raises:
        OptionError: an unknown preset.
    """

    def __init__(self, preset: str, full: Mapping[str, int]) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise OptionError(unknown("preset of the published detector", preset, PRESETS))
        self.constants, self.full = PRESETS[preset], dict(full)

    def slope(self, name: str) -> float:
        """Mean of the last slopes of the moving average, ranks an epoch, without sign."""
        ranks = self._ranks(name)
        if len(ranks) < 2:
            return math.nan
        average, weight = [float(ranks[0])], 2 / (self.constants.smoothing + 1)
        for rank in ranks[1:]:
            average.append(weight * rank + (1 - weight) * average[-1])
        slopes = [abs(slope) for slope in _gradient(average)][-self.constants.window :]
        return sum(slopes) / len(slopes)

    def _ranks(self, name: str) -> list[int]:
        """The rank of a layer, epoch by epoch."""
        if name not in self.full:
            raise OptionError(unknown("layer of the detector", name, self.full))
        values = (self.history[name][i] for i in self._epochs())
        return [min(math.ceil(value), self.full[name]) for value in values if _counts(value)]

    def _epochs(self) -> list[int]:
        """The observations that count: the first one, and then the first after a whole epoch."""
        chosen: list[int] = []
        for i, time in enumerate(self.times):
            if not chosen or time >= self.times[chosen[-1]] + 1 - _ROUNDING:
                chosen.append(i)
        return chosen

    def _judge(self) -> None:
        now = self.times[-1]
        if now < self.constants.earliest - _ROUNDING or self._epochs()[-1] != len(self.times) - 1:
            return
        left = [name for name in self.watched if name not in self.settled]
        allowed = self.constants.allowed(len(left))
        self.settled |= {name: now for name in left if self.slope(name) <= allowed}

    def _is_due(self) -> bool:
        last = max(self.settled.values(), default=math.inf)
        complete = all(name in self.settled for name in self.watched)
        return complete and self.times[-1] >= last + 1 - _ROUNDING


def _counts(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _speed(slope: float) -> float:
    return math.inf if math.isnan(slope) else abs(slope)


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the straight line with the least squares."""
    middle, height = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - middle) ** 2 for a in x)
    return sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / across


def _gradient(values: Sequence[float]) -> list[float]:
    """Differences of neighbours: half of that of the two beside, one-sided at the ends."""
    inner = [(after - before) / 2 for before, after in zip(values, values[2:], strict=False)]
    return [values[1] - values[0], *inner, values[-1] - values[-2]]
