"""Flags from the recipe's fields: name, default, unit and choices are declared there, once."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

import rankwise
from rankwise.cli.rows import ROWS
from rankwise.errors import OptionError, nearest, unknown
from rankwise.training.recipe import Recipe

METHOD_FLAG = "--method."


class Parser(argparse.ArgumentParser):
    """Errors are raised in the words of the library, not printed with a usage text."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; see `{self.prog} --help`")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read a command line.

    Returns:
        The command's arguments; `recipe_flags` holds the recipe fields that were given, and
        `method_options` the `--method.NAME` flags.

    Raises:
        OptionError: an unknown flag, with the nearest one, or a missing value.
    """
    parser, commands = _parser()
    rest, method_options = _method_options(arguments or ["--help"])
    word = next((word for word in rest if not word.startswith("-")), None)
    if word is not None and word not in commands:
        raise OptionError(unknown("command", word, commands))
    asked, extra = parser.parse_known_args(rest)
    command = commands[asked.command]
    if extra:
        raise OptionError(_unknown(extra[0], command))
    asked.method_options = method_options
    if asked.command not in ("train", "compare", "table") and method_options:
        raise OptionError(
            f"`rankwise {asked.command}` takes no {METHOD_FLAG}{next(iter(method_options))}"
        )
    names = [field.name for field in dataclasses.fields(Recipe)]
    given = vars(asked)
    asked.recipe_flags = {name: given[name] for name in names if name in given}
    asked.recipe_flags.pop("method_options", None)
    return asked


def _parser() -> tuple[Parser, dict[str, argparse.ArgumentParser]]:
    parser = Parser(
        prog="rankwise",
        description="Low-rank training for PyTorch.",
        allow_abbrev=False,
        epilog="`rankwise COMMAND --help` says what a command takes.",
    )
    parser.add_argument("--version", action="version", version=f"rankwise {rankwise.__version__}")
    made = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = _command(made, "train", "train a network from a recipe")
    _recipe_flags(train)
    train.add_argument(
        "--resume", metavar="DIR", help="go on with the run in this folder, bit for bit"
    )

    compare = _command(made, "compare", "train with several methods and set them side by side")
    _recipe_flags(compare, leave_out=("method", "seed"))
    compare.add_argument(
        "--methods",
        default="dense,pufferfish",
        help="methods, comma between (default: %(default)s)",
    )
    compare.add_argument("--seeds", help="seeds, comma between (default: the recipe's)")

    table = _command(made, "table", "train recipes in all forms and print the field's table")
    _table_flags(table)

    plan = _command(made, "plan", "show which layers would become low-rank, without training")
    _plan_flags(plan)

    recipes = _command(made, "recipes", "list the recipes of the papers, or show one")
    recipes.add_argument("name", nargs="?", help="show this recipe's file")
    methods = _command(made, "methods", "list the methods, or the options of one")
    methods.add_argument("name", nargs="?", help="show the options of this method")
    models = _command(made, "models", "list the networks, or those of a library")
    models.add_argument(
        "pattern", nargs="?", metavar="LIBRARY:GLOB", help="such as timm:, 'timm:*resnet*'"
    )
    _command(made, "data", "list the data sets")

    report = _command(made, "report", "show what runs were, decided and came to")
    report.add_argument("run", nargs="+", metavar="RUN", help="folder of a run, such as runs/NAME")
    report.add_argument(
        "--html",
        nargs="?",
        const="",
        metavar="FILE",
        help="write a page with plots as well (without FILE: report.html in the run's folder)",
    )
    return parser, dict(made.choices)


def _command(made: Any, name: str, summary: str) -> argparse.ArgumentParser:
    return made.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
    )


def _table_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipes",
        nargs="+",
        metavar="RECIPE",
        help="recipes by name, glob or file: each is a network on its data; flags go before values",
    )
    parser.add_argument(
        "--rows",
        default=",".join(ROWS),
        help="forms of each network, comma between (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", default="0,1,2", help="seeds, comma between (default: %(default)s)"
    )
    parser.add_argument("--show", action="store_true", help="print what is finished, train nothing")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there as well")
    _field_flags(parser, leave_out=("method", "seed"))


def _recipe_flags(parser: argparse.ArgumentParser, *, leave_out: Sequence[str] = ()) -> None:
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="a file, or a name of `rankwise recipes`; flags go before its values",
    )
    _field_flags(parser, leave_out=leave_out)


def _field_flags(parser: argparse.ArgumentParser, *, leave_out: Sequence[str]) -> None:
    group = parser.add_argument_group("the recipe")
    hints = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if field.name in leave_out or field.name == "method_options":
            continue
        flag = f"--{field.name.replace('_', '-')}"
        described = f"{field.metadata['help']} (default: {_shown(field.default)})"
        described = described.replace("%", "%%")
        if hints[field.name] is bool:
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=described,
            )
            continue
        choices = field.metadata.get("choices")
        metavar = "|".join(choices) if choices else _metavar(hints[field.name])
        # Values stay text here: the recipe reads them, with the same words as from a file.
        group.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=described)
    group.add_argument(
        f"{METHOD_FLAG}OPTION",
        dest="unused",
        default=argparse.SUPPRESS,
        metavar="VALUE",
        help="an option of the method, such as --method.ranks 0.25; `rankwise methods NAME`",
    )


def _plan_flags(parser: argparse.ArgumentParser) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    parser.add_argument("--model", default=defaults["model"], help="network (default: %(default)s)")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        "--data", help="data set that gives shape and classes (default: the model's)"
    )
    shape.add_argument(
        "--input-shape",
        metavar="C,H,W",
        help="shape of an image, such as 3,32,32, or tokens of a text, such as 256",
    )
    parser.add_argument(
        "--classes",
        default=None,
        metavar="N",
        help="outputs or vocabulary (default: the data's, or the model's)",
    )
    parser.add_argument("--save", metavar="FILE.json", help="write the plan, to edit and to build")
    group = parser.add_argument_group("which layers, at which rank")
    for flag, metavar, described in (
        (
            "--ranks",
            "RULE",
            "0.25: ratio of full rank; 32: rank; budget=0.3, flops=0.5, memory=0.5: share of the "
            "dense model's parameters, forward FLOPs, training memory; energy=0.9, stable, "
            "scaled-stable, entropy, vbmf: from the weights; options after a comma: "
            "'0.25, floor=8, cap=0.5, multiple=16'",
        ),
        ("--layers", "GLOBS", "auto, or globs over names, comma between"),
        ("--exclude", "GLOBS", "globs over names that stay dense"),
        ("--keep-first", "K", "layers=auto: first layers that stay dense"),
        ("--keep-last", "K", "layers=auto: last layers that stay dense"),
    ):
        group.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=described)
    for flag, described in (
        ("--core", "three factors U C V"),
        ("--separable", "2-D convolutions as 1 x k, then k x 1"),
        ("--split", "factors for each part of a fused projection, each gate of an LSTM or GRU"),
    ):
        group.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=described)
    _gain_flags(parser)


def _gain_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the layers gain in time")
    group.add_argument(
        "--measure",
        action="store_true",
        default=argparse.SUPPRESS,
        help="time forward + backward of the layers on this machine, dense and at 1/2 to 1/16 of "
        "full rank, and leave dense what gains too little; times are kept in the user's cache",
    )
    group.add_argument(
        "--fresh",
        action="store_true",
        default=argparse.SUPPRESS,
        help="with --measure: time anew what is in the cache",
    )
    step = {field.name: field for field in dataclasses.fields(Recipe)}
    for flag, metavar, described in (
        ("--gains", "FILE.json", "use the times of an earlier --save-gains instead"),
        ("--save-gains", "FILE.json", "write the measured times"),
        ("--min-gain", "X", "smallest speed-up of a low-rank layer (default: 1.1)"),
        ("--per", "layer|stack", "what stays dense together: a layer or a stage (default: layer)"),
        ("--batch-size", "N", f"inputs of a timed step (default: {step['batch_size'].default})"),
        ("--amp", "none|bf16|fp16", f"{step['amp'].metadata['help']} (default: none)"),
        ("--threads", "N", step["threads"].metadata["help"]),
    ):
        group.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=described)
    group.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help=f"{step['channels_last'].metadata['help']} (default: yes)",
    )


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return ",".join(map(_shown, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _metavar(hint: Any) -> str:
    kinds = [k for k in (typing.get_args(hint) or (hint,)) if k is not type(None)]
    return {int: "N", float: "X"}.get(kinds[0], "NAME")


def _method_options(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--method.NAME VALUE` and `--method.NAME=VALUE` out of a command line."""
    rest: list[str] = []
    options: dict[str, Any] = {}
    left = list(arguments)
    while left:
        word = left.pop(0)
        if not word.startswith(METHOD_FLAG):
            rest.append(word)
            continue
        name, equals, value = word.removeprefix(METHOD_FLAG).partition("=")
        if not equals:
            if not left or left[0].startswith("--"):
                raise OptionError(f"{word} needs a value")
            value = left.pop(0)
        options[name.replace("-", "_")] = _value(value)
    return rest, options


def _value(text: str) -> Any:
    """Numbers and switches as a TOML file would hold them, so that both make equal recipes."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _unknown(flag: str, command: argparse.ArgumentParser) -> str:
    if not flag.startswith("-"):
        return f"{flag!r} is one argument too many; see `{command.prog} --help`"
    name = flag.partition("=")[0]
    known = [o for action in command._actions for o in action.option_strings]
    close = nearest(name, known, limit=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown flag {name}; {hint}`{command.prog} --help` lists them"
