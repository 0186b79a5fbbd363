"""WikiText-2 (Merity et al., arXiv 1609.07843): two million words of Wikipedia, in three parts.

Read from the Hugging Face Hub through the package datasets, or from a folder of its own files.
"""

from __future__ import annotations

from pathlib import Path

from rankwise.data import hub
from rankwise.errors import DataError

NAME = "wikitext-2"
HUB = "Salesforce/wikitext"
PARTS = {"train": "train", "validation": "valid", "test": "test"}  # the Hub's names, the files'


def load_wikitext(folder: str = "", *, words: bool) -> list[bytes]:
    """Training, validation and test part as UTF-8.

    Args:
        folder: holds wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens (or the raw text, with
            the ending .raw); without one, the Hub.
        words: the published words, rare ones as `<unk>`; otherwise the raw text.

    Raises:
        DataError: a file is missing, the package datasets is missing, or the Hub cannot be reached.
    """
    return _from_folder(Path(folder), words) if folder else _from_hub(words)


def _from_folder(folder: Path, words: bool) -> list[bytes]:
    ending = "tokens" if words else "raw"
    paths = [folder.expanduser() / f"wiki.{part}.{ending}" for part in PARTS.values()]
    try:
        return [path.read_bytes() for path in paths]
    except OSError as error:
        raise DataError(
            f"{NAME}: {error.filename} cannot be read ({error.strerror or error}); the folder must "
            f"hold {', '.join(path.name for path in paths)}"
        ) from error


def _from_hub(words: bool) -> list[bytes]:
    form = f"{NAME}-v1" if words else f"{NAME}-raw-v1"
    loaded = hub.load(NAME, HUB, form, instead=f"give the folder of its files: {NAME}:PATH")
    # A row is a line with its end, but of an empty line nothing is left.
    return ["".join(row or "\n" for row in loaded[part]["text"]).encode() for part in PARTS]
