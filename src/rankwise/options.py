"""Options declared once: a dataclass field is the signature, the config key, the flag and its help.

Imports no torch, so that `rankwise --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from rankwise.errors import OptionError, RankwiseError, unknown

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """A dataclass field with its meaning, unit and range.

    Args:
        default: value when nothing is said.
        help: one line for `--help`: meaning and unit.
        choices: the names allowed, if the value is one of a list.
        at_least: smallest value allowed.
        above: the value must be larger than this.
        at_most: largest value allowed.
        parse: turns what a user wrote (a string, or a value from a file) into the value.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "parse": parse,
    }
    return dataclasses.field(default=default, metadata=metadata)


def validate(options: Any) -> None:
    """Check every field of an options dataclass against its type, choices and range.

    Raises:
        OptionError: naming class, field, value and what is allowed.
    """
    owner = type(options).__name__
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value, rule = getattr(options, field.name), field.metadata
        wanted = _misfit(value, hints[field.name])
        if wanted:
            raise OptionError(
                f"{owner}: {field.name}={value!r} must be {wanted} ({rule.get('help', '')})"
            )
        if rule.get("choices") and value not in rule["choices"]:
            raise OptionError(f"{owner}: {unknown(field.name, str(value), rule['choices'])}")
        if value is None or isinstance(value, (str, bool)):
            continue
        limits = {
            "at least": (rule.get("at_least"), lambda v, limit: v >= limit),
            "above": (rule.get("above"), lambda v, limit: v > limit),
            "at most": (rule.get("at_most"), lambda v, limit: v <= limit),
        }
        for words, (limit, holds) in limits.items():
            if limit is not None and not holds(value, limit):
                raise OptionError(
                    f"{owner}: {field.name}={value} is out of range; it must be {words} {limit} "
                    f"({rule['help']})"
                )


def _misfit(value: Any, hint: Any) -> str:
    """What a plain number or switch should have been; empty if it is, or the type is another."""
    kinds = [*(typing.get_args(hint) or (hint,))]
    if value is None and types.NoneType in kinds:
        return ""
    kinds = [kind for kind in kinds if kind is not types.NoneType]
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kinds == [bool] and not isinstance(value, bool):
        return "True or False"
    if kinds == [int] and not whole:
        return "a whole number"
    if kinds == [float] and not (whole or (isinstance(value, float) and math.isfinite(value))):
        return "a finite number"
    return ""


def build(cls: type[T], given: Mapping[str, Any]) -> T:
    """Construct an options dataclass from names and values out of a file or from flags.

    Strings are converted to the field's type; an unknown name or a value that does not
    convert is an error that names the closest valid one.

    Raises:
        OptionError: unknown name, unreadable value, value out of range.
    """
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in given.items():
        key = name.replace("-", "_")
        if key not in fields:
            raise OptionError(f"{cls.__name__}: {unknown('option', name, fields)}")
        values[key] = convert(value, fields[key], hints[key], owner=cls.__name__)
    return cls(**values)


def convert(value: Any, field: dataclasses.Field[Any], hint: Any, *, owner: str) -> Any:
    """Read one value as the type its field declares."""
    parse = field.metadata.get("parse")
    try:
        return parse(value) if parse else _as_type(value, hint)
    except (TypeError, ValueError) as error:
        if isinstance(error, RankwiseError):
            raise
        wanted = getattr(hint, "__name__", str(hint))
        raise OptionError(
            f"{owner}: {field.name}={value!r} cannot be read as {wanted} "
            f"({field.metadata.get('help', '')}): {error}"
        ) from error


def _as_type(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _as_type(value, next(a for a in arguments if a is not types.NoneType))
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else list(value)
        return tuple(_as_type(p.strip() if isinstance(p, str) else p, arguments[0]) for p in parts)
    if hint is bool:
        return _as_bool(value)
    if hint is int and isinstance(value, float) and not value.is_integer():
        raise ValueError("not a whole number")
    if hint in (int, float, str):
        if isinstance(value, bool):
            raise ValueError("a switch was given where a value is wanted")
        if hint is str and not isinstance(value, (str, int, float)):
            raise ValueError("a text is wanted")
        return hint(value)
    return value


def _as_bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise ValueError("write true or false")
    return words[str(value).lower()]
