"""What each command does: build the recipe, call the library, print."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from rankwise import checkpoint, data, distributed, models, recipes
from rankwise.cli import series, tables
from rankwise.cli.planning import plan_command
from rankwise.cli.results import table_command
from rankwise.cli.screen import console, plain
from rankwise.errors import OptionError, unknown
from rankwise.methods import METHODS
from rankwise.training import train


def train_command(asked: argparse.Namespace) -> int:
    """`rankwise train`."""
    stored = None
    if asked.resume is not None and asked.recipe is None:
        stored = checkpoint.load(asked.resume).extra.get("recipe")
    recipe = series.read_recipe(asked.recipe, asked, stored)
    try:
        with series.reporter() as report:
            train(recipe, resume=asked.resume, report=report)
    finally:
        distributed.shutdown()
    return 0


def compare_command(asked: argparse.Namespace) -> int:
    """`rankwise compare`: every method with every seed, then the closing table."""
    recipe = series.read_recipe(asked.recipe, asked)
    methods, seeds = series.words(asked.methods), series.seeds(asked.seeds, recipe)
    options = recipe.method_options
    series.check_known(options, methods)
    jobs = []
    for name, seed in itertools.product(methods, seeds):
        each = series.variant(recipe, name, options, seed)
        if recipe.out is not None:
            each = dataclasses.replace(each, out=str(Path(recipe.out) / f"{name}-{seed}"))
        jobs.append(series.Job(f"{name}, seed {seed}", each))
    try:
        distributed.initialize()
        results = series.train_all(jobs)
        if distributed.worker() == 0:
            console.print()
            console.print(tables.comparison(results))
    finally:
        distributed.shutdown()
    return 0


def recipes_command(asked: argparse.Namespace) -> int:
    """`rankwise recipes [NAME]`."""
    if asked.name is not None:
        text = recipes.find(asked.name).read_text(encoding="utf-8")
        console.print(text, highlight=False, markup=False, end="")
        return 0
    table = plain("recipe", "what it trains", "source")
    for name in recipes.names():
        about = recipes.about(name)
        table.add_row(name, about["what"], about["source"])
    console.print(table)
    return 0


def methods_command(asked: argparse.Namespace) -> int:
    """`rankwise methods [NAME]`."""
    if asked.name is not None and asked.name not in METHODS:
        raise OptionError(unknown("method", asked.name, METHODS))
    if asked.name is None:
        table = plain("method", "what it does", "paper")
        for name, cls in METHODS.items():
            table.add_row(name, _first_line(cls), tables.paper(cls))
        console.print(table)
        return 0
    cls: Any = METHODS[asked.name]
    console.print(inspect.getdoc(inspect.getmodule(cls)) or "", highlight=False, markup=False)
    console.print()
    console.print(inspect.getdoc(cls) or "", highlight=False, markup=False)
    table = plain("option", "default", "meaning")
    for field in dataclasses.fields(cls):
        meaning = field.metadata.get("help", "")
        choices = field.metadata.get("choices") or ()
        if not all(choice in meaning for choice in choices):
            meaning += f": {', '.join(choices)}"
        name = f"--method.{field.name.replace('_', '-')}"
        table.add_row(name, str(field.default), meaning)
    if table.row_count:
        console.print()
        console.print(table)
    return 0


def models_command(asked: argparse.Namespace) -> int:
    """`rankwise models [PATTERN]`."""
    if asked.pattern is not None:
        for name in models.listed(asked.pattern):
            console.print(name, highlight=False, markup=False)
        return 0
    table = _listed("network", {**models.MODELS, **models.SIZES})
    for library in models.LIBRARIES:
        table.add_row(f"{library}:NAME", f"`rankwise models {library}:` lists them")
    console.print(table)
    return 0


def data_command(_: argparse.Namespace) -> int:
    """`rankwise data`."""
    console.print(_listed("data set", data.DATA))
    return 0


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "train": train_command,
    "compare": compare_command,
    "table": table_command,
    "plan": plan_command,
    "recipes": recipes_command,
    "methods": methods_command,
    "models": models_command,
    "data": data_command,
}


def _listed(kind: str, registry: Mapping[str, Any]) -> Table:
    table = plain(kind, "what it is")
    for name, entry in registry.items():
        table.add_row(name, entry.description)
    return table


def _first_line(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]
