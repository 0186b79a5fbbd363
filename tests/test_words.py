"""Words as tokens, and WikiText-2: what is a word, and whose vocabulary it is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rankwise import data
from rankwise.data import TextSplits, load_text
from rankwise.errors import DataError, OptionError


def words_of(splits: TextSplits) -> dict[str, list[str]]:
    return {
        name: [splits.classes[i] for i in getattr(splits, name).tokens.tolist()]
        for name in ("train", "validation", "test")
    }


def written(tmp_path: Path, content: str) -> str:
    path = tmp_path / "some.txt"
    path.write_text(content, encoding="utf-8")
    return f"text:{path}"


def test_marks_and_line_ends_are_words_of_their_own(tmp_path):
    name = written(tmp_path, "Don't <unk> stop, naïve co-op!\n" * 40)
    splits = load_text(name, context=4, level="words")
    words = words_of(splits)["train"][:11]
    assert words == ["Don't", "<unk>", "stop", ",", "naïve", "co", "-", "op", "!", "<eos>", "Don't"]


def test_the_vocabulary_is_that_of_the_training_part_and_its_frequent_words(tmp_path):
    text = "a a a b b c\n" * 20 + "once " + "a a b new\n" * 5  # the end is held out
    name = written(tmp_path, text)
    splits = load_text(name, context=3, level="words", min_count=2)
    assert splits.classes == ("<unk>", "a", "b", "c", "<eos>")  # by frequency; a line was cut
    parts = words_of(splits)
    assert "new" in text
    assert "<unk>" in parts["test"]
    assert "<unk>" not in parts["train"]
    rare = load_text(name, context=3, level="words", min_count=21)
    assert rare.classes == ("<unk>", "a", "b")
    assert words_of(rare)["train"][:7] == ["a", "a", "a", "b", "b", "<unk>", "<unk>"]
    # The parts themselves do not depend on the vocabulary.
    assert len(rare.train.tokens) == len(splits.train.tokens)


def test_words_that_cannot_be_had_are_refused(tmp_path):
    name = written(tmp_path, "each word here is alone")
    with pytest.raises(DataError, match=r"no word occurs min_count=2 times .* lower min_count"):
        load_text(name, context=1, level="words")
    with pytest.raises(OptionError, match="min_count=0; a word of the vocabulary occurs at least"):
        load_text(name, level="words", min_count=0)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1") * 9)
    with pytest.raises(DataError, match=r"no UTF-8 text \(byte 3\), so it has no characters or wo"):
        load_text(f"text:{latin}", level="words")


LINES = {
    "train": ["", " = One = \n", "", " The <unk> @-@ cat 's U.S. home \n"] * 3,
    "validation": [" The cat \n", ""] * 2,
    "test": [" A dog \n", ""] * 2,
}


def hub(load: Any) -> ModuleType:
    module: Any = ModuleType("datasets")
    module.load_dataset = load
    return module


def test_wikitext_comes_from_the_hub_in_its_parts_with_its_words(monkeypatch):
    asked = []

    def load(*names: str) -> Any:
        asked.append(names)
        return {part: {"text": lines} for part, lines in LINES.items()}

    monkeypatch.setitem(sys.modules, "datasets", hub(load))
    splits = load_text("wikitext-2", context=2, level="words", min_count=1)
    parts = words_of(splits)
    read = " ".join(parts["train"])
    assert read.startswith("<eos> = One = <eos> <eos> The <unk> @-@ cat 's U.S. home <eos>")
    assert parts["validation"][:4] == ["The", "cat", "<eos>", "<eos>"]
    assert parts["test"][:3] == ["<unk>", "<unk>", "<eos>"]
    assert splits.name == "wikitext-2"
    characters = load_text("wikitext-2", context=2, level="characters")
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-v1"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    ]
    text = "".join(characters.classes[i] for i in characters.validation.tokens.tolist())
    assert text == " The cat \n\n The cat \n\n"


def test_wikitext_can_be_read_from_its_own_files(tmp_path):
    for part, lines in (("train", 3), ("valid", 1), ("test", 1)):
        (tmp_path / f"wiki.{part}.tokens").write_text("a b <unk> \n" * lines)
    splits = load_text(f"wikitext-2:{tmp_path}", context=2, level="words", min_count=1)
    assert words_of(splits)["test"] == ["a", "b", "<unk>", "<eos>"]
    assert data.is_text(f"wikitext-2:{tmp_path}")
    assert data.is_text("wikitext-2")
    with pytest.raises(DataError, match=r"wiki.train.raw cannot be read .* must hold wiki.train.r"):
        load_text(f"wikitext-2:{tmp_path}")


def test_without_hub_or_package_wikitext_says_what_to_do(monkeypatch):
    hidden: Any = sys.modules
    monkeypatch.setitem(hidden, "datasets", None)
    with pytest.raises(DataError, match=r"rankwise\[datasets\]'; or give the folder of its files"):
        load_text("wikitext-2")

    def offline(*names: str) -> Any:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setitem(sys.modules, "datasets", hub(offline))
    with pytest.raises(DataError, match=r"\(Couldn't reach the Hub\); where there is no network"):
        load_text("wikitext-2")
