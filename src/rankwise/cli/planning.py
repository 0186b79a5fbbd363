"""`rankwise plan`: which layers would become low-rank, at which rank, and what time that gains."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from rankwise import accounting, models, ranks
from rankwise.cli import tables
from rankwise.cli.screen import console
from rankwise.errors import OptionError
from rankwise.methods import Factorized
from rankwise.options import build, option, validate
from rankwise.ranks.gains.gate import MIN_GAIN, PER
from rankwise.training import Recipe, setup

# Names, meanings and defaults as in a recipe: what is timed is a step of `rankwise train`.
_STEP = {field.name: field for field in dataclasses.fields(Recipe)}
_OF_STEP = ("batch_size", "amp", "channels_last", "threads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What `rankwise plan` needs to build a network, and to time its layers."""

    input_shape: tuple[int, ...] | None = option(
        None, "channels, height, width of an image, or tokens of a text"
    )
    classes: int | None = option(None, "outputs", at_least=1)
    measure: bool = option(False, "time the layers here, dense and low-rank")
    fresh: bool = option(False, "time anew what was timed before")
    gains: str | None = option(None, "use the times of this file")
    save_gains: str | None = option(None, "write the times")
    min_gain: float = option(MIN_GAIN, "smallest speed-up of a low-rank layer", above=0)
    per: str = option("layer", "what stays dense together", choices=PER)
    batch_size: int = option(_STEP["batch_size"].default, "inputs of a step", at_least=1)
    amp: str = option("none", "reduced precision", choices=_STEP["amp"].metadata["choices"])
    channels_last: bool = option(True, "kernels in channels-last order")
    threads: int | None = option(None, "CPU threads", at_least=1)

    def __post_init__(self) -> None:
        validate(self)


def plan_command(asked: argparse.Namespace) -> int:
    """`rankwise plan`."""
    given = vars(asked)
    options = build(PlanOptions, {n: v for n, v in given.items() if n in _names(PlanOptions)})
    _check(options, given)
    method = build(Factorized, {n: v for n, v in given.items() if n in _names(Factorized)})
    model, sample, notes = _asked_network(asked, options, method)
    trace = None if sample is None else accounting.trace(model, sample)
    choice: dict[str, Any] = {
        name: getattr(method, name)
        for name in ("layers", "exclude", "keep_first", "keep_last", "core", "separable", "split")
    }
    gains = None if options.gains is None else ranks.Gains.load(options.gains)
    if options.measure:
        gains = _measured(model, trace, choice, options)
        console.print(tables.gains(gains))
        console.print()
    gated: dict[str, Any] = {"gains": gains, "min_gain": options.min_gain, "per": options.per}
    plan = ranks.plan(model, method.ranks, sample, trace=trace, **choice, **gated)
    plan = dataclasses.replace(plan, notes=(*plan.notes, *_size(model, plan), *notes))
    console.print(tables.plan(plan))
    if gains is not None and not plan.ranks:
        console.print("none of these layers gains from low rank here: they stay dense")
    _save("--save", asked.save, plan, "the plan")
    _save("--save-gains", options.save_gains, gains, "the gains")
    return 0


def _size(model: Any, plan: ranks.Plan) -> list[str]:
    """What the weights occupy: tables that say MB often mean millions of numbers."""
    now = accounting.parameters(model)
    if plan.provisional or not now.stored:
        return []
    dense, planned = (count * now.bytes / now.stored / 1e6 for count in plan.parameters)
    return [f"weights {dense:,.2f} MB -> {planned:,.2f} MB (10^6 bytes)"]


def _names(declared: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(declared)}


def _check(options: PlanOptions, given: Mapping[str, Any]) -> None:
    """Refuse flags that would have no effect."""
    if options.measure and options.gains is not None:
        raise OptionError("--measure and --gains: measure the times, or read them from a file")
    timed = options.measure or options.gains is not None
    for name in (*_OF_STEP, "fresh", "save_gains", "min_gain", "per"):
        needs = "--measure or --gains FILE" if name in ("min_gain", "per") else "--measure"
        if name in given and not (timed if name in ("min_gain", "per") else options.measure):
            flag = f"--{name.replace('_', '-')}"
            raise OptionError(f"{flag} is about measured times; give {needs} as well")


def _asked_network(
    asked: argparse.Namespace, options: PlanOptions, method: Factorized
) -> tuple[Any, Any, list[str]]:
    shape, classes = options.input_shape, options.classes
    if shape is None and asked.data is not None:
        splits = setup.load_data(dataclasses.replace(Recipe(), data=asked.data))
        shape, classes = setup.input_shape(splits), classes or len(splits.classes)
    rule = ranks.as_rule(method.ranks)
    return _network(asked.model, classes, shape, real=rule.reads_weights)


def _measured(model: Any, trace: Any, choice: Mapping[str, Any], options: PlanOptions) -> Any:
    """Times of every layer that the choice of layers leaves open, whatever its rank."""
    import torch

    if trace is None:
        raise OptionError(
            "--measure: the network's forward cannot be followed without values, so the inputs of "
            "its layers are unknown; call rankwise.ranks.measure_gains on the real one"
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    open_plan = ranks.plan(model, ranks.Later(ranks.as_rule(0.25), "later"), trace=trace, **choice)
    dtypes = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    return ranks.measure_gains(
        model,
        trace,
        open_plan,
        batch=options.batch_size,
        autocast=dtypes[options.amp],
        fresh=options.fresh,
        device="cuda" if torch.cuda.is_available() else "cpu",
        progress=_progress,
    )


def _progress(done: int, total: int, what: str) -> None:
    """One line that moves in a terminal, a line per layer elsewhere; never among the results."""
    moving = sys.stderr.isatty()
    line = f"timing layer {done + 1} of {total}: {what}" if done < total else ""
    if moving:
        print(f"\r\033[K{line[:100]}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)


def _save(flag: str, place: str | None, table: Any, what: str) -> None:
    if place is None:
        return
    try:
        table.save(place)
    except OSError as error:
        raise OptionError(
            f"{flag} {place}: {what} cannot be written: {error.strerror or error}"
        ) from error


def _network(
    name: str, classes: int | None, shape: tuple[int, ...] | None, *, real: bool
) -> tuple[Any, Any, list[str]]:
    """A network to plan for, an input if it reads one here, and what to say about the two.

    It is built without storage unless its weights or the values of its input matter.
    """
    import torch

    def make(device: str) -> Any:
        with torch.device(device):
            return models.build(name, classes=classes, input_shape=shape)

    model, sample = make("meta"), models.sample(name, input_shape=shape)
    size = accounting.parameters(model).bytes
    if real and size > _MOST_BYTES:
        raise OptionError(
            f"{name} would have {size / 2**30:.0f} GiB of fresh random weights, of whose ranks "
            "nothing follows; take a rule that reads no weights (0.25, budget=0.3), or call "
            "rankwise.plan(model, rule) on the trained model"
        )
    model = make("cpu") if real else model
    given = sample if isinstance(sample, Mapping) else {"input": sample}
    shapes = [f"{key} {tuple(v.shape)}" for key, v in given.items() if hasattr(v, "shape")]
    notes = [f"counted for one input: {', '.join(shapes)}"]
    if real:
        return model, sample, notes
    try:
        accounting.trace(model, sample)
    except Exception as error:
        # A forward of any library, which without storage may fail in any way: its path depends on
        # values, which such tensors do not have. It is built then, or the note says why not.
        if size <= _MOST_BYTES:
            return make("cpu"), sample, notes
        why = " ".join(str(error).split())[:200]
        return model, None, [f"no order of execution and no FLOPs: its forward failed ({why})"]
    return model, sample, notes


_MOST_BYTES = 2**31  # of a network that is built with storage for a plan alone
