"""Time the layers of a plan, dense and low-rank, on the machine and the batch they train on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import rankwise
from rankwise import accounting, distributed, selection
from rankwise.accounting.running import device_of
from rankwise.errors import LifeCycleError, OptionError, PlanError, RankwiseError, nearest, unknown
from rankwise.ranks.gains.cache import GainCache, default_place
from rankwise.ranks.gains.recurrence import recurrent_home, work_in
from rankwise.ranks.gains.stopwatch import Timer, Times, Work, time_layer, wall_clock
from rankwise.ranks.gains.table import Conditions, Gains, LayerGain
from rankwise.ranks.lines import Kind, ModelLayers
from rankwise.ranks.rules import is_number

if TYPE_CHECKING:
    from rankwise.accounting import Shape, Trace
    from rankwise.ranks.plan import LayerPlan, Plan

Progress = Callable[[int, int, str], None]

RATIOS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)  # those of the paper's benchmark (2305.02538)


def measure_gains(
    model: nn.Module,
    trace: Trace,
    plan: Plan,
    *,
    ratios: Sequence[float] = RATIOS,
    multiple: int = 8,
    batch: int | None = None,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seconds: float = 0.3,
    cache: bool | str | Path | None = True,
    fresh: bool = False,
    progress: Progress | None = None,
    timer: Timer = wall_clock,
) -> Gains:
    """Time forward and backward of the layers that a plan makes low-rank, or leaves open.

    Every distinct layer (class, options, weight, input shape, dtype, memory format) is timed once,
    dense and at its candidate ranks in turns, on layers and inputs made for it: the model, its
    gradients and torch's random state stay as they are. What the optimizer saves on fewer
    parameters is not in it, and neither is torch.compile. Several workers: a collective; worker 0
    measures and all get its numbers.

    Args:
        model: the dense model that `plan` is of, on the device and in the dtype and memory format
            it trains in.
        trace: one execution of it: `accounting.trace(model, batch)`, or what a run has watched.
        plan: which layers, and how they are factorised; also a provisional one.
        ratios: of the full rank, to time; 1 / 2 and 1 / 4 of 64 are ranks 32 and 16.
        multiple: to which these ranks are rounded, as rules do.
        batch: leading dimension of the model's input in training, if the trace was made with
            another; the leading dimensions of all inputs are scaled alike.
        autocast: dtype of torch.autocast in training; without it, that of the trace.
        device: where to measure instead, for a model on the meta device.
        seconds: for each distinct layer; slow ones take longer, for five rounds or three.
        cache: True for a file in the user's cache directory (`gain_cache.default_place`), or a
            file; False or None to measure everything anew and to keep nothing. Times that vary
            too much (`stopwatch.STEADY`, a busy machine) are not kept.
        fresh: measure anew what is in the cache, and keep that instead.
        progress: called before each distinct layer that is not in the cache with how many are
            done, how many there are, and which one comes; and at the end.
        timer: measures; for tests.

    Returns:
        The gains of the layers that a plan of the same choice can make low-rank.

    Raises:
        PlanError: a plan of another model, or a model on the meta device without `device`.
        OptionError: ratios outside (0, 1], a batch below 1, or a budget of seconds that is none.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
        >>> trace = accounting.trace(model, torch.zeros(32, 64))
        >>> decided = rankwise.plan(model, 0.25, trace=trace)
        >>> gains = measure_gains(model, trace, decided, seconds=0.01, cache=None)
        >>> list(gains.layers["1"].low_rank_ms)
        [8, 16, 32]
    """
    _check(ratios, batch, seconds)
    place = device_of(model) if device is None else torch.device(device)
    if place.type == "meta":
        raise PlanError(
            "the model is on the meta device, where nothing takes time; move it to the device it "
            'trains on, or say where to measure: device="cuda"'
        )
    shapes = _Shapes(trace, batch)
    conditions = _conditions(model, place, shapes.batch, autocast or trace.autocast, ratios)
    conditions = replace(conditions, multiple=multiple)
    jobs = list(_jobs(model, trace, plan, shapes, place, autocast or trace.autocast))

    def measured() -> Gains:
        kept = GainCache(_cache_path(cache))
        return _Session(conditions, kept, seconds, progress, timer).measure(jobs, fresh=fresh)

    return _on_worker_0(measured)


@dataclass(frozen=True)
class _Job:
    """One layer of the plan: what to time for each of its calls."""

    line: LayerPlan
    stack: str
    work: tuple[Work, ...]
    problem: str = ""


def _jobs(
    model: nn.Module,
    trace: Trace,
    plan: Plan,
    shapes: _Shapes,
    device: torch.device,
    autocast: torch.dtype | None,
) -> Iterator[_Job]:
    """The layers of the plan that are low-rank or open, in its order."""
    open_layers = [line for line in plan.layers if _open(line, plan)]
    names = tuple(line.name for line in open_layers)
    candidates = selection.survey(model, trace, form=plan.form, layers=names)
    for name in names:
        if name not in candidates:
            close = nearest(name, candidates) or list(candidates)[:8]
            raise PlanError(
                f"{unknown('layer of the model', name, close)}; the plan is of another model"
            )
    reasons = {name: "" if name in names else "not open in the plan" for name in candidates}
    found = ModelLayers(model, candidates, reasons, plan.form, None, trace)
    last = _channels_last(model)
    trained = _trained_before(model, trace)
    for line in open_layers:
        kind, dense = found.kinds[line.name], candidates[line.name].module
        if kind.shape != line.shape:
            raise PlanError(
                f"layer {line.name} is {kind.shape} in the model and {line.shape} in the plan; "
                "the plan is of another model"
            )
        calls = trace.calls.get(line.name, ())
        if not calls:
            yield _Job(line, "", (), "one forward of the model does not call it")
            continue
        needs = trained(line.name)
        form, stand_in = kind.keywords, _stand_in(kind)
        works = [
            Work(dense, stand_in, form, shapes.scaled(c.input), needs, device, autocast, last)
            for c in calls
        ]
        home, stack = recurrent_home(model, line.name), _stack(line.name, dense, calls[0].output)
        if home is not None:
            stack = line.name.rpartition(".")[0]
            works = [work_in(home, line.name, *each) for each in zip(calls, works, strict=True)]
        yield _Job(line, stack, tuple(works))


def _open(line: LayerPlan, plan: Plan) -> bool:
    return line.rank is not None or (bool(plan.provisional) and line.reason == plan.provisional)


def _stand_in(kind: Kind) -> Any:
    assert kind.stand_in is not None
    return kind.stand_in


def _trained_before(model: nn.Module, trace: Trace) -> Callable[[str], bool]:
    """Whether a layer's input needs a gradient: something before it learns, and it is no stem."""
    learning: set[str] = set()
    modules = dict(model.named_modules())
    any_before = False
    for name in trace.order:
        if any_before and name not in trace.stems:
            learning.add(name)
        # Projections of an attention are called under names of their own.
        owner = modules.get(name) or modules[name.rpartition(".")[0]]
        own = owner.parameters(recurse=False)
        any_before = any_before or any(p.requires_grad for p in own)
    return learning.__contains__


def _channels_last(model: nn.Module) -> bool:
    """Whether any kernel is in channels-last order and in no other."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return any(
        p.dim() in formats
        and p.is_contiguous(memory_format=formats[p.dim()])
        and not p.is_contiguous()
        for p in model.parameters()
    )


def _stack(name: str, dense: nn.Module, output: Shape) -> str:
    """Layers under the same first numbered container whose outputs have the same grid.

    `layer1.0.conv1` is in `layer1`, `blocks.3.mlp.fc1` in `blocks`; the grid (height and width of
    an image, tokens of a text) divides networks that keep all stages in one container.
    """
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts[:-1]) if re.search(r"\d", part)), None)
    if first is None:
        container = ".".join(parts[:-1]) if parts[-1].isdecimal() else name
    else:
        container = ".".join(parts[:first] if parts[first].isdecimal() else parts[: first + 1])
    spatial = isinstance(dense, nn.modules.conv._ConvNd)
    grid = output[2:] if spatial else output[1:-1]
    size = "×".join(str(length) for length in grid)
    return f"{container or 'the model'} ({size})" if size else container or "the model"


class _Shapes:
    """Input shapes for another batch than that of the trace."""

    def __init__(self, trace: Trace, batch: int | None) -> None:
        first = (*trace.stems, *trace.order)[:1]
        inputs = [call.input for name in first for call in trace.calls.get(name, ()) if call.input]
        self._traced = inputs[0][0] if inputs else 0
        self.batch = batch or self._traced

    def scaled(self, shape: Shape) -> Shape:
        """The same with the leading dimension times new over traced batch.

        One that is no multiple of the traced batch does not depend on it (positions, say).
        """
        if not shape or self._traced == 0 or shape[0] % self._traced:
            return shape
        return (shape[0] // self._traced * self.batch, *shape[1:])


class _Session:
    """One round of measurements, each distinct layer once."""

    def __init__(
        self,
        conditions: Conditions,
        cache: GainCache,
        seconds: float,
        progress: Progress | None,
        timer: Timer,
    ) -> None:
        self.conditions, self.cache, self.seconds = conditions, cache, seconds
        self.progress, self.timer = progress, timer
        self._known: dict[str, Times | str] = {}

    def measure(self, jobs: Sequence[_Job], *, fresh: bool) -> Gains:
        """Times of all jobs, or why there are none."""
        distinct: dict[str, tuple[_Job, Work]] = {}
        for job in jobs:
            for work in job.work:
                distinct.setdefault(self._key(job, work), (job, work))
        if not fresh:
            self._known.update({key: kept for key in distinct if (kept := self.cache.get(key))})
        missing = {key: each for key, each in distinct.items() if key not in self._known}
        for done, (key, (job, work)) in enumerate(missing.items()):
            if self.progress is not None:
                self.progress(done, len(missing), f"{job.line.name}: {_what(job, work)}")
            self._known[key] = self._time(key, job, work)
        if self.progress is not None and missing:
            self.progress(len(missing), len(missing), "")
        return Gains({job.line.name: self._sum(job) for job in jobs}, self.conditions)

    def _time(self, key: str, job: _Job, work: Work) -> Times | str:
        ranks = sorted(set(self.conditions.ranks(job.line.shape.full_rank)))
        try:
            times = time_layer(work, ranks, self.seconds, self.timer)
        except RuntimeError as error:  # out of memory, or no kernel for such numbers here
            return f"it cannot be run by itself: {' '.join(str(error).split())[:200]}"
        if times.steady:
            self.cache.put(key, times)
        return times

    def _sum(self, job: _Job) -> LayerGain:
        """Of all calls of a layer."""
        full = job.line.shape.full_rank
        problem = job.problem
        dense, spread, low = 0.0, 0.0, {}
        for work in job.work:
            times = self._known[self._key(job, work)]
            if isinstance(times, str):
                problem = times
                break
            dense, spread = dense + times.dense, max(spread, times.spread)
            low = {rank: low.get(rank, 0.0) + ms for rank, ms in times.low_rank.items()}
        return LayerGain(
            what=_what(job, job.work[0]) if job.work else f"{job.line.kind} {job.line.shape}",
            full_rank=full,
            calls=len(job.work),
            stack=job.stack,
            dense_ms=0.0 if problem else dense,
            low_rank_ms={} if problem else low,
            problem=problem,
            spread=0.0 if problem else spread,
        )

    def _key(self, job: _Job, work: Work) -> str:
        """Everything that a time depends on, as text."""
        weight: Any = work.dense.weight
        bias = getattr(work.dense, "bias", None)
        told = self.conditions
        return " | ".join(
            (
                f"{told.device}, {told.threads} threads, torch {told.torch}, "
                f"rankwise {rankwise.__version__}, {_settings(work.device)}, {self.seconds:g} s",
                f"{work.dense!r} {tuple(weight.shape)} {weight.dtype} bias {bias is not None} "
                f"trained {weight.requires_grad} {getattr(bias, 'requires_grad', False)} "
                f"kernel {'last' if _kernel_last(weight) else 'first'}",
                f"{work.stand_in.kind} {sorted(work.form.items())} "
                f"ranks {sorted(set(told.ranks(job.line.shape.full_rank)))}",
                f"input {tuple(work.input)} gradient {work.needs_gradient} "
                f"channels last {work.channels_last} autocast {work.autocast}{work.place}",
            )
        )


def _kernel_last(weight: torch.Tensor) -> bool:
    return not weight.is_contiguous()


def _settings(device: torch.device) -> str:
    """Switches of torch that choose kernels."""
    chosen = [torch.get_float32_matmul_precision()]
    chosen += ["deterministic"] if torch.are_deterministic_algorithms_enabled() else []
    chosen += ["benchmark"] if device.type == "cuda" and torch.backends.cudnn.benchmark else []
    return " ".join(chosen)


def _what(job: _Job, work: Work) -> str:
    shape = "×".join(str(n) for n in work.input)
    return f"{job.line.kind} {job.line.shape}, input {shape}{work.place}"


def _conditions(
    model: nn.Module,
    device: torch.device,
    batch: int,
    autocast: torch.dtype | None,
    ratios: Sequence[float],
) -> Conditions:
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    under = f" under autocast {str(autocast).removeprefix('torch.')}" if autocast else ""
    return Conditions(
        device=accounting.device_name(device),
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),  # a subclass of str, which no checkpoint may hold
        dtype=" and ".join(sorted(kinds)) + under,
        memory_format="channels_last" if _channels_last(model) else "contiguous",
        batch=batch,
        ratios=tuple(sorted(ratios, reverse=True)),
    )


def _check(ratios: Sequence[float], batch: int | None, seconds: float) -> None:
    if not ratios or not all(is_number(ratio) and 0 < ratio <= 1 for ratio in ratios):
        raise OptionError(
            f"ratios={ratios!r}: give one or more ratios of the full rank, each in (0, 1]"
        )
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise OptionError(f"batch={batch!r}: the training batch has at least 1 sample")
    if not is_number(seconds) or not 0 < seconds < math.inf:
        raise OptionError(f"seconds={seconds!r}: the time for each layer must be above 0")


def _cache_path(cache: bool | str | Path | None) -> Path | None:
    if cache is True:
        return default_place()
    return Path(cache) if cache else None


def _on_worker_0(measure: Callable[[], Gains]) -> Gains:
    """What worker 0 measures, on all of them; its error too, or the others would wait for ever."""
    outcome: Any = None
    if distributed.worker() == 0:
        try:
            outcome = measure()
        except Exception as error:  # raised below, on every worker
            if distributed.workers() == 1:
                raise
            known = isinstance(error, RankwiseError)  # and pickles, as others may not
            outcome = error if known else LifeCycleError(f"worker 0 could not measure: {error!r}")
    outcome = distributed.share(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
