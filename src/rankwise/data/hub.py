"""Data sets of the Hugging Face Hub, through the package datasets; no code of theirs is run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from rankwise.errors import DataError

INSTALL = "pip install 'rankwise[datasets]'"


def available() -> bool:
    """Whether the package datasets is installed; it is not imported."""
    if "datasets" in sys.modules:
        return sys.modules["datasets"] is not None
    return importlib.util.find_spec("datasets") is not None


def load(name: str, repository: str, *configuration: str, instead: str) -> Any:
    """A data set's parts by name.

    Args:
        name: how messages call it.
        repository: OWNER/NAME on the Hub.
        configuration: which of its forms, if there are several.
        instead: what to do where there is no package or no network, as it follows on "or" and ",".

    Raises:
        DataError: the package is missing, or the Hub cannot be reached.
    """
    datasets = package(name, repository, instead)
    try:
        # The data are Parquet files; no code of theirs is run.
        return datasets.load_dataset(repository, *configuration)
    except Exception as error:  # of network, cache and Parquet, each from a package of its own
        raise _unreadable(name, repository, error, instead) from error


def rows(
    name: str, repository: str, *configuration: str, part: str, skip: int, instead: str
) -> Iterator[Mapping[str, Any]]:
    """The rows of one part, streamed: read as they are asked for, never all at once.

    Args:
        name: how messages call it.
        repository: OWNER/NAME on the Hub.
        configuration: which of its forms.
        part: the Hub's name of the part.
        skip: rows to leave out at the beginning.
        instead: as of `load`.

    Raises:
        DataError: the package is missing, or the Hub cannot be reached, then or later.
    """
    datasets = package(name, repository, instead)
    try:
        found = datasets.load_dataset(repository, *configuration, split=part, streaming=True)
        yield from found.skip(skip) if skip else found
    except Exception as error:  # as of `load`; of the network also long after the beginning
        raise _unreadable(name, repository, error, instead) from error


def _unreadable(name: str, repository: str, error: Exception, instead: str) -> DataError:
    why = " ".join(str(error).split())[:200]
    return DataError(
        f"{name} cannot be read from {repository} ({why}); where there is no network, {instead}"
    )


def package(name: str, repository: str, instead: str) -> ModuleType:
    """The package datasets; arguments as of `load`.

    Raises:
        DataError: it is missing.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"{name} is read from the Hub ({repository}) by the package datasets, which is "
            f"missing: {INSTALL}; or {instead}"
        ) from error
    return datasets
