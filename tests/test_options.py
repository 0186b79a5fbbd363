"""Options: declared once, read from text, checked with a message that says what is allowed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from rankwise.errors import OptionError, RankwiseError, nearest, unknown
from rankwise.options import build, option, validate


def parse_even(value: Any) -> int:
    number = int(value)
    if number % 2:
        raise ValueError("odd")
    return number


@dataclass(frozen=True)
class Example:
    """One field of every kind."""

    epochs: int = option(8, "passes over the data", at_least=1)
    lr: float = option(0.1, "learning rate", above=0)
    momentum: float = option(0.9, "share kept", at_least=0, at_most=1)
    clip: float | None = option(None, "limit of the norm", above=0)
    steps: int | None = option(None, "steps", at_least=1)
    init: str = option("spectral", "start", choices=("spectral", "variance"))
    norm: bool = option(False, "extra normalisation")
    widths: tuple[int, ...] = option((8, 8), "widths")
    pair: int = option(2, "an even number", parse=parse_even)
    layers: Any = option("auto", "anything")

    def __post_init__(self) -> None:
        validate(self)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("epochs", "12", 12),
        ("epochs", 12, 12),
        ("epochs", 12.0, 12),
        ("lr", "1e-3", 1e-3),
        ("lr", 1, 1.0),
        ("momentum", "1", 1.0),
        ("clip", "0.5", 0.5),
        ("clip", "none", None),
        ("clip", "None", None),
        ("clip", None, None),
        ("steps", "7", 7),
        ("init", "variance", "variance"),
        ("norm", "true", True),
        ("norm", "No", False),
        ("norm", 1, True),
        ("norm", False, False),
        ("widths", "16, 8,4", (16, 8, 4)),
        ("widths", [16, 8], (16, 8)),
        ("pair", "4", 4),
        ("layers", ["a"], ["a"]),
    ],
)
def test_values_are_read_as_the_type_of_their_field(name: str, text: Any, value: Any) -> None:
    read = getattr(build(Example, {name: text}), name)
    assert read == value
    assert type(read) is type(value)


def test_names_may_be_written_as_flags() -> None:
    @dataclass
    class Dashed:
        keep_first: int = option(1, "layers kept")

    assert build(Dashed, {"keep-first": "2"}).keep_first == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", "many", r"epochs='many' cannot be read as int \(passes over the data\)"),
        ("epochs", 1.5, "not a whole number"),
        ("epochs", "1.5", "cannot be read as int"),
        ("epochs", True, "a switch was given"),
        ("epochs", None, "cannot be read as int"),
        ("epochs", [3], "cannot be read as int"),
        ("epochs", float("inf"), "not a whole number"),
        ("epochs", 0, r"epochs=0 is out of range; it must be at least 1 \(passes over"),
        ("lr", "fast", "cannot be read as float"),
        ("lr", 0, "must be above 0"),
        ("lr", "nan", "must be a finite number"),
        ("lr", "inf", "must be a finite number"),
        ("momentum", 1.01, "must be at most 1"),
        ("clip", -1, "must be above 0"),
        ("clip", "nan", "must be a finite number"),
        ("steps", "0", "must be at least 1"),
        ("init", "varience", "did you mean 'variance'"),
        ("init", None, "cannot be read as str .* a text is wanted"),
        ("init", ["variance"], "a text is wanted"),
        ("norm", "maybe", "write true or false"),
        ("norm", 2, "write true or false"),
        ("widths", "8,x", "cannot be read"),
        ("widths", 8, "cannot be read"),
        ("pair", "3", r"pair='3' cannot be read as int \(an even number\): odd"),
        ("epoch", 3, "unknown option 'epoch'; did you mean 'epochs'"),
        ("zzz", 3, "unknown option 'zzz'; Known: clip, epochs"),
    ],
)
def test_what_cannot_be_read_or_is_out_of_range_says_what_is_allowed(
    name: str, value: Any, message: str
) -> None:
    with pytest.raises(OptionError, match=rf"^Example: .*{message}"):
        build(Example, {name: value})


WRONG: list[dict[str, Any]] = [
    {"epochs": "8"},
    {"epochs": 2.0},
    {"epochs": True},
    {"epochs": None},
    {"lr": "0.1"},
    {"lr": float("nan")},
    {"lr": True},
    {"momentum": None},
    {"clip": "1"},
    {"steps": 1.5},
    {"norm": 1},
    {"norm": "false"},
]


@pytest.mark.parametrize("given", WRONG, ids=str)
def test_a_value_of_the_wrong_type_is_refused_also_without_text(given: dict[str, Any]) -> None:
    name, value = next(iter(given.items()))
    with pytest.raises(OptionError, match=rf"^Example: {name}={value!r} must be "):
        Example(**given)


def test_defaults_pass_their_own_checks() -> None:
    assert build(Example, {}) == Example()


def test_an_unknown_name_says_what_there_is() -> None:
    assert unknown("method", "puferfish", ["dense", "pufferfish"]) == (
        "unknown method 'puferfish'; did you mean 'pufferfish'? Known: dense, pufferfish"
    )
    assert unknown("data set", "x", []) == "unknown data set 'x'; Known: none"
    assert nearest("fc1", ["conv", "fc2", "fc1a"]) == ["fc1a", "fc2"]
    assert nearest("q", ["conv"]) == []


def test_errors_can_be_caught_by_family_and_by_the_builtin_kind() -> None:
    assert issubclass(OptionError, RankwiseError)
    assert issubclass(OptionError, ValueError)


def test_options_import_no_torch() -> None:
    code = "import rankwise.options, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
