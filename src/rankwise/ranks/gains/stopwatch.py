"""Time of forward and backward of one layer: dense beside low-rank layers of several ranks.

The sides take turns, so that whatever else the machine does meets all of them; a low-rank time is
the median dense time divided by the median speed-up over neighbours in time. Layers and inputs are
made for it: the model's weights, gradients and buffers, and torch's random state, stay as they are.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.accounting import Shape
from rankwise.layers import LowRankLayer
from rankwise.ranks.costs import stand_in_for

Timer = Callable[["Pass", int], float]

_FEWEST_ROUNDS, _FEW_ROUNDS, _MOST_ROUNDS = 3, 5, 200
STEADY = 0.08  # a measurement more uncertain than this goes on for longer, and is not kept
_PATIENCE = 3  # how many times the seconds asked for it may then take


def _least_seconds(device: torch.device) -> float:
    """How long one timing is to last, far above the clock's grain and the cost of a synchronise.

    On a CPU that others use too, short ones mostly end before the system takes the processor away.
    """
    return 1e-4 if device.type == "cpu" else 2e-3


@dataclass(frozen=True)
class Work:
    """What is timed: one layer on one input.

    Attributes:
        dense: the layer; only its shape, options, dtype and memory format matter.
        stand_in: its low-rank class.
        form: what the class's `from_dense` takes beside the rank.
        input: shape of the input.
        needs_gradient: whether the input needs one: not in the first layer of a network.
        device: where to run.
        autocast: dtype of torch.autocast, or None without it.
        channels_last: memory format of the input.
    """

    dense: nn.Module
    stand_in: type[LowRankLayer]
    form: Mapping[str, Any]
    input: Shape
    needs_gradient: bool
    device: torch.device
    autocast: torch.dtype | None = None
    channels_last: bool = False

    @property
    def place(self) -> str:
        """What more there is to say of how the layer is used, after a space, or empty."""
        return ""

    def dense_layer(self, source: torch.Generator) -> Any:
        """A dense layer of its own."""
        dense = stand_in_for(self.dense, self.device)
        with torch.no_grad():
            # Numbers of an ordinary size: what lies in fresh memory may be slow to multiply.
            for tensor in (*dense.parameters(), *dense.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(std=0.02, generator=source)
        return dense

    def low_rank_layer(self, dense: Any, rank: int, source: torch.Generator) -> nn.Module:
        """What stands for that layer at a rank."""
        return self.stand_in.from_dense(dense, rank, init="variance", generator=source, **self.form)

    def example(self, dense: Any, source: torch.Generator) -> Tensor:
        """An input of both."""
        if isinstance(dense, nn.Embedding):
            count = dense.num_embeddings
            return torch.randint(count, self.input, generator=source, device=self.device)
        # Under autocast, what comes from an earlier layer mostly is in the dtype of autocast.
        inner = self.autocast if self.needs_gradient else None
        x = torch.randn(self.input, generator=source, device=self.device)
        x = x.to(inner or dense.weight.dtype)
        if self.channels_last and x.dim() in (4, 5):
            layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            x = x.to(memory_format=layout)
        return x.requires_grad_(self.needs_gradient)


@dataclass(frozen=True)
class Times:
    """Milliseconds of one forward and backward.

    Attributes:
        dense: of the dense layer.
        low_rank: by rank, never less at a higher rank.
        spread: how uncertain they are, relatively: the largest standard error of a median.
    """

    dense: float
    low_rank: Mapping[int, float]
    spread: float = 0.0

    @property
    def steady(self) -> bool:
        """Whether another measurement would say about the same."""
        return self.spread <= STEADY


class Pass:
    """Forward and backward of a layer on a fixed input, as a call without arguments.

    Attributes:
        layer: a layer of its own, dense or low-rank.
        rank: None if dense.
        work: what it belongs to.
    """

    def __init__(self, layer: nn.Module, rank: int | None, x: Tensor, work: Work) -> None:
        self.layer, self.rank, self.work = layer.train(), rank, work
        self._x, self._seed = x, None
        self._leaves = [x, *layer.parameters()]

    def __call__(self) -> None:
        with _precision(self.work):
            y = self.layer(self._x)
        y = y[0] if isinstance(y, tuple) else y  # recurrent layers return their state as well
        if y.requires_grad:  # not in a frozen layer without anything trained before it
            if self._seed is None:
                self._seed = torch.ones_like(y)
            y.backward(self._seed)
        for leaf in self._leaves:  # as optimizers do: gradients are written, not added
            leaf.grad = None


def _precision(work: Work) -> Any:
    kind = work.device.type
    if work.autocast is not None:
        return torch.autocast(kind, dtype=work.autocast)
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def wall_clock(each: Pass, times: int) -> float:
    """Seconds that this many passes in a row take, until the device has finished them."""
    wait = torch.get_device_module(each.work.device).synchronize
    wait()
    began = time.perf_counter()
    for _ in range(times):
        each()
    wait()
    return time.perf_counter() - began


def time_layer(
    work: Work, ranks: Sequence[int], seconds: float, timer: Timer = wall_clock
) -> Times:
    """Time a layer dense and at several ranks.

    Args:
        work: the layer.
        ranks: each from 1 to its full rank.
        seconds: to spend on it; at least five rounds are run, three of a slow layer, and up to
            three times as many where the times vary.
        timer: seconds that so many passes in a row take.

    Raises:
        RuntimeError: torch cannot run the layer on such an input, for want of memory, say.
    """
    with _apart(work.device):
        passes = _passes(work, ranks)
        for each in passes:  # kernels are chosen, and compiled, at the first call
            timer(each, 1)
        rounds = _rounds(passes, seconds, timer)
    dense = statistics.median(times[0] for times in rounds)
    low = [
        dense / statistics.median(times[0] / times[side] for times in rounds)
        for side in range(1, len(passes))
    ]
    by_rank = zip(sorted(ranks), monotone(low), strict=True)
    return Times(1e3 * dense, {rank: 1e3 * t for rank, t in by_rank}, _spread(rounds))


def _rounds(passes: Sequence[Pass], seconds: float, timer: Timer) -> list[list[float]]:
    """Seconds of one pass of each side, round by round; every second one in reverse order."""
    once = [timer(each, 1) for each in passes]
    shortest = _least_seconds(passes[0].work.device)
    repeats = [max(1, math.ceil(shortest / max(t, 1e-9))) for t in once]
    least = _FEW_ROUNDS if sum(once) * _FEW_ROUNDS < 4 * seconds else _FEWEST_ROUNDS
    spent, rounds = sum(once), [once] if max(repeats) == 1 else []
    while not _enough(rounds, least, spent / seconds):
        times = [0.0] * len(passes)
        order = range(len(passes))
        for side in reversed(order) if len(rounds) % 2 else order:
            taken = timer(passes[side], repeats[side])
            times[side] = taken / repeats[side]
            spent += taken
        rounds.append(times)
    return rounds


def _enough(rounds: Sequence[Sequence[float]], least: int, spent: float) -> bool:
    """Whether to stop; `spent` is the share of the seconds asked for."""
    if len(rounds) < least or (spent < 1 and len(rounds) < _MOST_ROUNDS):
        return False
    late = spent >= _PATIENCE or len(rounds) >= _PATIENCE * _MOST_ROUNDS
    return late or _spread(rounds) <= STEADY


def _spread(rounds: Sequence[Sequence[float]]) -> float:
    """The largest relative standard error among the median of dense and those of the speed-ups."""
    sides = [[times[0] for times in rounds]]
    sides += [[times[0] / times[i] for times in rounds] for i in range(1, len(rounds[0]))]
    largest = 0.0
    for values in sides:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        # Of a normal distribution: 1.25 deviations / sqrt n, the quartiles 1.35 deviations apart.
        largest = max(largest, 0.93 * (high - low) / middle / math.sqrt(len(values)))
    return largest


def monotone(times: Sequence[float]) -> list[float]:
    """The closest sequence that never falls: neighbours that fall take their mean.

    That is least squares by pooling adjacent violators. More rank is more work, so a time that
    falls with the rank is noise.

    Example:
        >>> monotone([1.0, 4.0, 2.0, 5.0])
        [1.0, 3.0, 3.0, 5.0]
    """
    pools: list[tuple[float, int]] = []
    for value in times:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, size = pools.pop()
            mean = (before * size + mean * count) / (size + count)
            count += size
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Ordinary gradients whatever the caller's mode, and its random numbers left alone."""
    indices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=indices),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


def _passes(work: Work, ranks: Sequence[int]) -> list[Pass]:
    """The dense side, then one for each rank, in rising order; all read the same input."""
    source = torch.Generator(work.device).manual_seed(0)
    dense = work.dense_layer(source)
    low = (work.low_rank_layer(dense, rank, source) for rank in sorted(ranks))
    x = work.example(dense, source)
    sides: list[tuple[nn.Module, int | None]] = [(dense, None)]
    sides += zip(low, sorted(ranks), strict=True)
    return [Pass(layer, rank, x, work) for layer, rank in sides]
