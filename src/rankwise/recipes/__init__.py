"""Recipes of the papers, as files: `rankwise train NAME`. Each says where its numbers come from.

A file holds the fields of `training.Recipe` and a table `about`, which trains nothing. Imports no
torch.
"""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path
from typing import Any

from rankwise.errors import OptionError, unknown

FOLDER = Path(__file__).parent
# What `about` says: the run in a line; where its numbers stand; what that source reports; what is
# done differently here, and why.
ABOUT = ("what", "source", "published", "differs")


def names(pattern: str = "*") -> list[str]:
    """The recipes whose names match a glob, in order."""
    every = sorted(path.stem for path in FOLDER.glob("*.toml"))
    return [name for name in every if fnmatch.fnmatchcase(name, pattern)]


def find(recipe: str) -> Path:
    """The file of a recipe: a name of ours, or a path.

    Raises:
        OptionError: neither; with the nearest name.
    """
    if recipe in names():
        return FOLDER / f"{recipe}.toml"
    path = Path(recipe)
    if path.suffix or path.exists() or len(path.parts) > 1:
        return path
    raise OptionError(
        f"{unknown('recipe', recipe, names())}; `rankwise recipes` lists them, and a file of "
        "yours ends in .toml"
    )


def choose(recipe: str) -> list[str]:
    """Names or files that a word on the command line means: a glob over the names may mean several.

    Raises:
        OptionError: a glob that matches none, or what `find` raises.
    """
    if not set("*?[") & set(recipe):
        find(recipe)
        return [recipe]
    found = names(recipe)
    if not found:
        raise OptionError(f"'{recipe}' matches none of our recipes; `rankwise recipes` lists them")
    return found


def about(name: str) -> dict[str, str]:
    """What a recipe of ours says of itself; keys of `ABOUT`."""
    content: dict[str, Any] = tomllib.loads(find(name).read_text(encoding="utf-8"))
    return {key: str(value) for key, value in content.get("about", {}).items()}
