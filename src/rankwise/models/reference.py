"""Names of networks that another package holds: `timm:resnet50?num_classes=10&drop_rate=0.1`.

    LIBRARY : NAME ? KEY = VALUE & KEY = VALUE ...

A key is an argument of the network's class or a field of its configuration, with dots into nested
ones (`text_config.hidden_size`). A value is JSON (`4`, `0.1`, `true`, `null`, `[2,2]`); anything
else is text, and with commas a list. Nothing in a name is ever executed or downloaded.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from rankwise.errors import OptionError, nearest, unknown

LIBRARIES = ("timm", "torchvision", "transformers")


@dataclass(frozen=True)
class Reference:
    """A parsed name.

    Attributes:
        library: one of `LIBRARIES`; empty for a network of this package.
        name: what the library calls the network.
        overrides: key -> value, in the order given.
    """

    library: str
    name: str
    overrides: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.library}:{self.name}" if self.library else self.name

    def error(self, why: str) -> OptionError:
        """An error about this network, its text on one line."""
        return OptionError(f"{self}: {' '.join(why.split())}")

    def check(self, allowed: Mapping[str, Any]) -> None:
        """Refuse keys that are none of those allowed and values of another type than the default.

        Args:
            allowed: key -> default; None or a class where a value of any type may stand.

        Raises:
            OptionError: naming the key, and the nearest allowed one.
        """
        for key, value in self.overrides.items():
            if key not in allowed:
                raise self.error(_unknown_key(key, allowed))
            wanted = _misfit(value, allowed[key])
            if wanted:
                raise self.error(f"{key}={value!r} must be {wanted}, such as {allowed[key]!r}")

    def settle(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """The overrides together with what the data, or the caller, ask for.

        Raises:
            OptionError: the name says something else about one of them.
        """
        for key, value in wanted.items():
            if self.overrides.get(key, value) != value:
                raise self.error(
                    f"its name says {key}={self.overrides[key]}, but {value} is asked for; take "
                    "it out of the name"
                )
        return {**self.overrides, **wanted}

    @contextmanager
    def building(self, given: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Around the library's code that makes the network, or its configuration.

        Args:
            given: what a user or the data have set, for the message.

        Raises:
            OptionError: the network cannot be had so.
        """
        try:
            yield
        except OptionError:
            raise
        except Exception as error:  # a constructor may raise anything for what a user has set
            what = "" if given is None else f" with {dict(given)}"
            raise self.error(f"cannot be built{what}: {error}") from error


def parse(text: str) -> Reference:
    """Read LIBRARY:NAME?KEY=VALUE&KEY=VALUE.

    Raises:
        OptionError: an unknown library, no name, or an override that is not KEY=VALUE.

    Example:
        >>> parse("timm:resnet50?layers=1,1,1,1&drop_rate=0.1").overrides
        {'layers': [1, 1, 1, 1], 'drop_rate': 0.1}
    """
    library, _, rest = text.partition(":")
    if library not in LIBRARIES:
        raise OptionError(unknown("library of networks", library, LIBRARIES) + f" (in {text!r})")
    name = rest.partition("?")[0]
    if not name:
        raise OptionError(f"{text!r} names no network; write {library}:NAME")
    return Reference(library, name, parse_overrides(text))


def parse_overrides(text: str) -> dict[str, Any]:
    """What stands behind the question mark of a name, in the order given.

    Raises:
        OptionError: an override that is not KEY=VALUE, or a key given twice.
    """
    query = text.partition("?")[2]
    overrides: dict[str, Any] = {}
    for part in query.split("&") if query else ():
        key, equals, value = part.partition("=")
        if not (key and equals):
            raise OptionError(f"{text!r}: {part!r} is no override; write KEY=VALUE, & between")
        if key in overrides:
            raise OptionError(f"{text!r}: {key} is given twice")
        overrides[key] = _value(value)
    return overrides


def load(reference: Reference, module: str = "") -> ModuleType:
    """Import the library that a name asks for, or a module of it.

    Args:
        reference: the name.
        module: the module's name behind the library's.

    Raises:
        OptionError: it is not installed, with what installs it; or it cannot be imported.
    """
    library = reference.library
    try:
        return importlib.import_module(f"{library}.{module}" if module else library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise _broken(reference, error) from error
        raise reference.error(
            f"{library} is not installed; pip install 'rankwise[{library}]'"
        ) from error
    except Exception as error:  # of any kind: in a build for another torch, say
        raise _broken(reference, error) from error


def check_name(reference: Reference, known: Collection[str]) -> None:
    """Refuse a name that the library does not have, with those that come close.

    Raises:
        OptionError: as said.
    """
    if reference.name not in known:
        close = nearest(reference.name, known, limit=5)
        hint = f"the closest are {', '.join(close)}; " if close else ""
        raise OptionError(
            f"unknown {reference.library} network '{reference.name}'; {hint}"
            f"`rankwise models '{reference.library}:*'` lists all {len(known)}"
        )


def check_image(reference: Reference, shape: tuple[int, ...]) -> None:
    """Refuse an input that is no image.

    Raises:
        OptionError: as said.
    """
    if len(shape) != 3:
        raise reference.error(
            f"reads images (channels, height, width), not inputs of shape {shape}; give "
            "input_shape three numbers"
        )


def arguments(kind: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a network's class that a name may set: name -> default, None without one."""
    taken = inspect.signature(kind).parameters.values()
    return {
        p.name: None if p.default is p.empty else p.default
        for p in taken
        if p.name not in _NOT_DATA and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


# Classes, and where the weights would lie.
_NOT_DATA = frozenset({"block", "device", "dtype"})


def _broken(reference: Reference, error: Exception) -> OptionError:
    why = f"{reference.library} is installed but cannot be imported ({error})"
    if "torchvision::" in str(error):
        why += "; torchvision was built for another torch: install the two from the same index"
    return reference.error(why)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return [_value(part) for part in text.split(",")] if "," in text else text


def _misfit(value: Any, default: Any) -> str:
    """What a value should have been, judged by the default it replaces; empty if it may stand."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        return "" if number and value == int(value) else "a whole number"
    if isinstance(default, float):
        return "" if number else "a number"
    if isinstance(default, (list, tuple)):
        return "" if isinstance(value, list) else "a list"
    if isinstance(default, str):
        return "" if isinstance(value, str) else "text"
    return ""


def _unknown_key(key: str, allowed: Iterable[str]) -> str:
    # All keys of a configuration would fill the screen.
    close = nearest(key, allowed, limit=4) or sorted(allowed)[:12]
    return f"unknown key '{key}'; the closest are {', '.join(close)}"
