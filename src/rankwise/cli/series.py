"""A series of runs: each is trained, gone on with, or read if an earlier call has finished it."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise import composition, distributed, recipes
from rankwise.cli.console import Live, Plain
from rankwise.cli.screen import console
from rankwise.errors import NonFiniteLossError, OptionError, unknown
from rankwise.training import Recipe, Result, records, setup, train


@dataclass(frozen=True)
class Job:
    """One run of a series: what it is called while it goes, and what it is."""

    name: str
    recipe: Recipe


def read_recipe(
    name: str | None, asked: argparse.Namespace, stored: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe of a name or file, or of the run to resume, with the flags on top.

    Raises:
        OptionError: no such recipe, or a value of it or of a flag is wrong.
    """
    base = Recipe()
    if name is not None:
        base = Recipe.from_file(recipes.find(name))
    elif stored is not None:
        base = Recipe.from_mapping(stored)
    values = base.as_dict()
    if asked.recipe_flags.get("method", base.method) != base.method:
        values["method_options"] = {}  # those of the other method
    values.update(asked.recipe_flags)
    values["method_options"] = {**values["method_options"], **asked.method_options}
    return Recipe.from_mapping(values)


def words(text: str) -> list[str]:
    """What stands between the commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def seeds(text: str | None, recipe: Recipe) -> list[int]:
    """The seeds of a flag, or the recipe's.

    Raises:
        OptionError: the text is no list of whole numbers.
    """
    if text is None:
        return [recipe.seed]
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise OptionError(
            f"--seeds {text!r}: write whole numbers with commas between: 0,1,2"
        ) from error


def check_known(options: Iterable[str], methods: Sequence[str]) -> None:
    """Refuse an option that none of the methods has.

    Raises:
        OptionError: naming it, and the nearest one.
    """
    every = set().union(*(_options_of(name) for name in methods))
    for name in options:
        if name not in every:
            raise OptionError(f"{', '.join(methods)}: {unknown('option', name, every)}")


def variant(recipe: Recipe, method: str, options: Mapping[str, Any], seed: int) -> Recipe:
    """The recipe with another method and seed; the method takes the options that it has.

    Raises:
        OptionError: a wrong value, or methods that do not go together.
    """
    known = _options_of(method)
    own = {name: value for name, value in options.items() if name in known}
    composition.check_methods(setup.build_methods(method, own))
    return dataclasses.replace(recipe, method=method, method_options=own, seed=seed)


def train_all(jobs: Sequence[Job], *, forgive: bool = False) -> list[Result]:
    """The results of all runs, in their order.

    Under torchrun every worker takes part, and worker 0 alone looks at the folders.

    Args:
        jobs: the runs.
        forgive: go on with the next one where the loss of one leaves the numbers.

    Raises:
        NonFiniteLossError: a run diverged, and that is not forgiven.
    """
    places = distributed.share([str(records.place(job.recipe, again=True)) for job in jobs])
    placed = [
        dataclasses.replace(job.recipe, out=place) for job, place in zip(jobs, places, strict=True)
    ]
    results = []
    with setup.keeping_data():
        for number, (job, recipe) in enumerate(zip(jobs, placed, strict=True), start=1):
            if distributed.worker() == 0:
                console.rule(f"{number} of {len(jobs)}: {job.name}", align="left")
            try:
                results.append(_train_or_read(recipe))
            except NonFiniteLossError as error:
                if not forgive:
                    raise
                if distributed.worker() == 0:
                    console.print(f"diverged: {error}", style="bold red", markup=False)
    return results


def reporter() -> Plain:
    """Shows a run: live in a terminal; nothing for any worker but the first."""
    # Under torchrun the process group does not exist yet, but the number of the worker does.
    if os.environ.get("RANK", "0") != "0":
        return Plain(quiet=True)
    return Live() if console.is_terminal else Plain()


def _train_or_read(recipe: Recipe) -> Result:
    place = Path(recipe.out or "")
    done = distributed.share(records.finished(place, recipe))
    if done is not None:
        if distributed.worker() == 0:
            console.print(f"finished before; its records are in {place}")
        return Result.from_record(done)
    begun = distributed.share(any(place.glob("step-*")))
    with reporter() as report:
        return train(recipe, resume=place if begun else None, report=report)


def _options_of(method: str) -> set[str]:
    classes: Any = setup.method_classes(method)
    return {field.name for cls in classes for field in dataclasses.fields(cls)}
