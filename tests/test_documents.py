"""Streamed documents: where they come from, what a pass reads, and that no more is in memory."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import rankwise
from rankwise import data
from rankwise.data import TextSplit, batches, load_stream
from rankwise.data.texts import documents, passing
from rankwise.errors import DataError, OptionError
from rankwise.training import Recipe
from test_training import stopped_and_gone_on


def texts(count: int, of: str = "t") -> list[str]:
    return [f"{of}{i:03} " * (4 + i % 7) for i in range(count)]


def write(path: Path, lines: list[str], key: str = "text") -> Path:
    content = "".join(json.dumps({key: line, "url": "x"}) + "\n" for line in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content)
    return path


@pytest.fixture
def c4(tmp_path, monkeypatch) -> Path:
    """As C4's files: two of training, one of validation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(passing, "HELD", 10)
    folder = tmp_path / "c4"
    folder.mkdir()
    write(folder / "c4-train.00000-of-00002.json.gz", texts(150, "a"))
    write(folder / "c4-train.00001-of-00002.json.gz", texts(150, "b"))
    write(folder / "c4-validation.00000-of-00001.json.gz", texts(40, "v"))
    return folder


def read(split: TextSplit) -> list[str]:
    """Whole documents of a part of bytes."""
    return bytes(split.tokens.tolist()).decode().split("\0")


def test_parts_are_the_published_ones_and_a_pass_follows_the_stream(c4):
    splits = load_stream("c4:c4", tokens_per_epoch=1000, context=16, level="bytes")
    assert splits.task == "language modelling"
    assert len(splits.train) == 62
    assert read(splits.validation)[:-1] == texts(20, "v")[:10]
    assert read(splits.test)[:-1] == texts(20, "v")[10:]
    passes = [read(splits.train.for_pass(epoch)) for epoch in range(3)]
    every = texts(150, "a") + texts(150, "b")
    stride = splits.train.stride
    for epoch, found in enumerate(passes):
        first = epoch * stride
        assert found[:-1] == every[first : first + len(found) - 1]
        assert len(found) - 1 <= stride  # the next pass begins behind it
        assert sum(len(text) + 1 for text in found) - 1 == 62 * 16 + 1
    assert len(passes[0]) - 1 > 0.7 * stride


def test_behind_the_last_document_comes_the_first_and_a_set_too_small_is_refused(c4):
    splits = load_stream("c4:c4", tokens_per_epoch=1000, context=16, level="bytes")
    every = texts(150, "a") + texts(150, "b")
    last = 300 // splits.train.stride
    found = read(splits.train.for_pass(last))
    begin = last * splits.train.stride
    assert found[:-1] == (every[begin:] + every)[: len(found) - 1]
    assert begin + len(found) > 300
    later = read(splits.train.for_pass(last + 1))  # begins behind the end
    begin = (last + 1) * splits.train.stride - 300
    assert later[:-1] == every[begin : begin + len(later) - 1]
    fresh = load_stream("c4:c4", tokens_per_epoch=1000, context=16, level="bytes")
    assert read(fresh.train.for_pass(last + 1)) == later  # whatever was read before
    small = load_stream("c4:c4", tokens_per_epoch=50_000, context=16, level="bytes")
    with pytest.raises(DataError, match=r"have \d+,\d+ tokens, fewer than the tokens_per_epoch=50"):
        small.train.for_pass(0)


def test_no_more_is_read_than_a_pass_needs(c4, monkeypatch):
    seen: list[int] = []
    plain = documents._text

    def counted(path: Path, number: int, line: str, column: str) -> str:
        seen.append(number)
        return plain(path, number, line, column)

    splits = load_stream("c4:c4", tokens_per_epoch=1000, context=16, level="bytes")
    monkeypatch.setattr(documents, "_text", counted)
    found = read(splits.train.for_pass(5))
    assert len(seen) == len(found)  # what lies before is skipped, what lies behind is left
    splits.train.for_pass(5)
    assert len(seen) == len(found)  # and a pass is kept
    windows, following = splits.train.take(torch.tensor([1, 0]))
    assert len(seen) <= len(found) + 3  # as sizes are counted for
    assert_close(windows, splits.train.for_pass(0).take(torch.tensor([1, 0]))[0], rtol=0, atol=0)
    assert following.shape == (2, 16)


def test_one_file_gives_up_its_first_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(passing, "HELD", 10)
    path = write(tmp_path / "pages.jsonl", texts(100))
    splits = load_stream(f"c4:{path}", tokens_per_epoch=500, context=16, level="bytes")
    assert read(splits.validation)[:-1] == texts(100)[:10]
    assert read(splits.test)[:-1] == texts(100)[10:20]
    assert read(splits.train.for_pass(0))[:3] == texts(100)[20:23]


def test_articles_have_a_test_part_and_their_own_column(tmp_path, monkeypatch):
    monkeypatch.setattr(passing, "HELD", 10)
    for part in ("train", "validation", "test"):
        write(tmp_path / f"{part}.jsonl", texts(60, part), key="article")
    name = f"cnn-dailymail:{tmp_path}"
    splits = load_stream(name, tokens_per_epoch=500, context=16, level="bytes")
    assert read(splits.test)[:-1] == texts(10, "test")
    assert read(splits.train.for_pass(0))[0] == texts(1, "train")[0]
    assert splits.name == "cnn-dailymail"


def test_every_epoch_of_batches_reads_its_own_pass(c4):
    train_part = load_stream("c4:c4", tokens_per_epoch=1000, context=16, level="bytes").train

    def epoch(number: int, start: int = 0) -> list[Any]:
        return list(batches(train_part, batch_size=8, seed=1, epoch=number, start=start))

    first, second = epoch(0), epoch(1)
    assert len(first) == len(second) == 7
    assert_close(epoch(1, start=3), second[3:], rtol=0, atol=0)
    windows = [{tuple(row.tolist()) for x, _ in each for row in x} for each in (first, second)]
    assert not windows[0] & windows[1]


def test_subwords_are_learned_from_the_first_documents_or_read_from_a_file(c4):
    pytest.importorskip("tokenizers")
    how: dict[str, Any] = {"tokens_per_epoch": 600, "context": 8, "vocabulary": 300}
    splits = load_stream("c4:c4", **how)
    assert splits.classes[0] == "<|endoftext|>"
    assert 257 < len(splits.classes) <= 300
    part = splits.train.for_pass(0).tokens.tolist()
    code: Any = splits.train.code
    ends = [i for i, number in enumerate(part) if number == 0]
    assert code.decode(part[: ends[0]]) == texts(1, "a")[0]
    assert code.decode(part[ends[0] + 1 : ends[1]]) == texts(2, "a")[1]
    again = load_stream("c4:c4", **how)
    assert (again.checksum, again.classes) == (splits.checksum, splits.classes)
    code._tokenizer.save("tokenizer.json")
    loaded = load_stream("c4:c4", tokens_per_epoch=600, context=8, tokenizer="tokenizer.json")
    assert loaded.classes == splits.classes
    assert_close(loaded.train.for_pass(1).tokens, splits.train.for_pass(1).tokens, rtol=0, atol=0)


def test_real_pages_are_given_back(tmp_path, monkeypatch):
    """What the packages that are installed here say of themselves."""
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(passing, "HELD", 4)
    held: list[Any] = [distribution.metadata for distribution in metadata.distributions()]
    found = {each["Name"]: each.get_payload() for each in held}
    pages = [str(page) for _, page in sorted(found.items()) if page and len(page) > 200][:40]
    assert len(pages) > 12
    path = write(tmp_path / "pages.json.gz", pages)
    splits = load_stream(f"c4:{path}", tokens_per_epoch=4000, context=32, vocabulary=600)
    code: Any = splits.train.code
    part = splits.train.for_pass(0).tokens
    assert code.decode(part.tolist()).startswith(pages[8][:500])
    kept = splits.validation.tokens
    ends = (kept == code.end).nonzero().flatten().tolist()
    texts_of = [code.decode(kept[a + 1 : b].tolist()) for a, b in itertools.pairwise([-1, *ends])]
    assert texts_of == pages[:4]


def test_a_run_on_a_stream_is_resumed_in_its_second_pass(c4):
    def recipe(out: str) -> Recipe:
        return Recipe(
            model="llama-tiny",
            data="c4:c4",
            tokens_per_epoch=600,
            context=16,
            batch_size=6,
            epochs=2,
            optimizer="adamw",
            lr=0.001,
            method="factorized",
            out=out,
        )

    stopped_and_gone_on(recipe, 9)
    assert rankwise.load("whole").extra["position"] == 12


class Rows:
    """A streamed part as the package datasets gives it."""

    def __init__(self, lines: list[str], key: str, skipped: int = 0) -> None:
        self.lines, self.key, self.skipped = lines, key, skipped

    def skip(self, count: int) -> Rows:
        return Rows(self.lines, self.key, self.skipped + count)

    def __iter__(self) -> Iterator[dict[str, str]]:
        for line in itertools.islice(self.lines, self.skipped, None):
            if line == "broken":
                raise ConnectionError("lost\nthe Hub")
            yield {self.key: line}


def test_the_hub_is_streamed(monkeypatch):
    monkeypatch.setattr(passing, "HELD", 10)
    asked = []

    def load_dataset(*names: str, split: str, streaming: bool) -> Rows:
        asked.append((*names, split, streaming))
        return Rows(texts(100, split), "text")

    module: Any = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    splits = load_stream("c4", tokens_per_epoch=500, context=16, level="bytes")
    assert set(asked) == {
        ("allenai/c4", "en", "validation", True),
        ("allenai/c4", "en", "train", True),
    }
    stride = splits.train.stride
    assert read(splits.train.for_pass(2))[0] == texts(100, "train")[2 * stride]
    assert read(splits.test)[0] == texts(11, "validation")[10]
    module.load_dataset = lambda *_, **__: Rows([*texts(30), "broken"], "text")
    broken = load_stream("c4", tokens_per_epoch=5000, context=16, level="bytes")
    with pytest.raises(DataError, match=r"c4 cannot be read from allenai/c4 \(lost the Hub\); whe"):
        broken.train.for_pass(0)
    hidden: Any = sys.modules
    monkeypatch.setitem(hidden, "datasets", None)
    with pytest.raises(DataError, match=r"or give the folder of its files: c4:PATH"):
        load_stream("c4", level="bytes")


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"level": "words"}, OptionError, "of a stream only bytes and bpe are known before its"),
        ({"level": "byte"}, OptionError, "unknown token level 'byte'; did you mean 'bytes'"),
        ({"context": 0}, OptionError, "context=0, tokens_per_epoch=500; a window holds at least 1"),
        ({"context": 501}, OptionError, "context=501, tokens_per_epoch=500"),
        ({"name": "c4:nowhere"}, DataError, "nowhere holds no documents: give a file of JSON li"),
        ({"name": "c4:empty"}, DataError, "empty holds no documents"),
        ({"name": "c4:few.jsonl"}, DataError, "no documents are left for its training part"),
        ({"name": "c4:bad.jsonl"}, DataError, "bad.jsonl, line 2 is no JSON"),
        ({"name": "c4:keys.jsonl"}, DataError, "keys.jsonl, line 1 has no text: a line is an obj"),
        ({"name": "c4:torn.json.gz"}, DataError, "torn.json.gz cannot be read"),
        ({"name": "c4:tests"}, DataError, "has files of validation or test alone"),
        ({"name": "c4:short.jsonl", "context": 500}, DataError, "its validation part has"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_to_do(tmp_path, monkeypatch, how, error, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(passing, "HELD", 3)
    for folder in ("empty", "tests"):
        Path(folder).mkdir()
    write(Path("tests/test.jsonl"), texts(3))
    write(Path("few.jsonl"), texts(6))
    write(Path("short.jsonl"), texts(30))
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("keys.jsonl").write_text('{"txt": "a"}\n')
    whole = write(Path("torn.json.gz"), texts(50)).read_bytes()
    Path("torn.json.gz").write_bytes(whole[: len(whole) // 2])
    usual: dict[str, Any] = {
        "name": "c4:few.jsonl",
        "level": "bytes",
        "context": 8,
        "tokens_per_epoch": 500,
    }
    with pytest.raises(error) as caught:
        load_stream(**{**usual, **how}).train.for_pass(0)
    assert words in str(caught.value)


def test_options_that_mean_nothing_are_refused(tmp_path, monkeypatch):
    from rankwise.training import setup

    monkeypatch.chdir(tmp_path)
    assert data.is_stream("c4:x")
    assert data.is_text("c4")
    assert data.is_text("cnn-dailymail:x")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"data": "c4:x", "limit": 5}, "limit=5: c4:x is a stream; tokens_per_epoch says"),
        ({"data": "text:x", "tokens_per_epoch": 5}, "tokens_per_epoch=5: text:x is no stream of"),
        ({"data": "text:x", "tokenizer": "x"}, "tokenizer=x: text:x is read as bytes, not bpe"),
        ({"data": "mnist-5k", "languages": "de-en"}, "languages=de-en: mnist-5k is no text in p"),
    ]
    for how, words in refused:
        with pytest.raises(OptionError) as caught:
            setup.load_data(Recipe(**how))
        assert words in str(caught.value)
    assert not list(Path().iterdir())
