"""Texts in pairs: what a batch holds, which pairs meet, every format, and errors that help."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rankwise import data
from rankwise.data import IGNORED, PairSplits, batches, load_pairs
from rankwise.data.parts import Uneven
from rankwise.data.reading import POOL, alike
from rankwise.data.texts.coding import END, PADDING, SPECIAL, START, Bytes, Parts
from rankwise.errors import DataError, OptionError

GERMAN = ["ein Haus", "der alte Mann liest ein Buch .", "Hallo !", "zwei Hunde laufen im Schnee ."]
ENGLISH = ["a house", "the old man reads a book .", "hello !", "two dogs run in the snow ."]


def written(path: Path, count: int = 40) -> str:
    lines = [f"{GERMAN[i % 4]}\t{ENGLISH[i % 4]}\n" for i in range(count)]
    path.write_text("".join(lines), encoding="utf-8")
    return f"pairs:{path}"


def folder(path: Path, **parts: tuple[list[str], list[str]]) -> str:
    path.mkdir(exist_ok=True)
    for name, sides in parts.items():
        for ending, lines in zip(("de", "en"), sides, strict=True):
            (path / f"{name}.{ending}").write_text("".join(f"{line}\n" for line in lines))
    return f"pairs:{path}"


def words(splits: PairSplits, row: Tensor) -> list[str]:
    return [splits.classes[number] for number in row.tolist()]


def test_a_target_is_read_behind_its_start_and_predicts_itself_and_its_end(tmp_path):
    splits = load_pairs(written(tmp_path / "a.tsv"), min_count=1)
    (source, read), following = splits.train.take(torch.tensor([0, 1]))
    assert words(splits, source[0]) == ["ein", "Haus", "</s>", *["<pad>"] * 5]
    assert words(splits, source[1]) == [*GERMAN[1].split(), "</s>"]
    assert words(splits, read[1]) == ["<s>", *ENGLISH[1].split()]
    assert words(splits, following[1]) == [*ENGLISH[1].split(), "</s>"]
    assert following[0, 2] == END
    assert following[0, 3:].tolist() == [IGNORED] * 5
    # What is read at a place is never what is predicted there.
    real = following != IGNORED
    assert_close(read[:, 1:][real[:, 1:]], following[:, :-1][real[:, 1:]], rtol=0, atol=0)
    assert splits.task == "translation"
    assert (splits.train.unit, splits.train.noun) == ("token", "pair")
    assert splits.train.units == round((3 + 8 + 3 + 8) / 4)


def test_a_file_is_cut_and_its_end_held_out_with_references(tmp_path):
    splits = load_pairs(written(tmp_path / "a.tsv"), min_count=1)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [32, 4, 4]
    assert splits.name == "a.tsv"
    assert splits.test.references == tuple(ENGLISH)
    again = load_pairs(f"pairs:{tmp_path / 'a.tsv'}", min_count=1)
    assert again.checksum == splits.checksum
    assert load_pairs(written(tmp_path / "b.tsv", 44), min_count=1).checksum != splits.checksum


def test_empty_sides_are_left_out_and_long_pairs_only_of_training(tmp_path):
    german, english = [*GERMAN, "", " ", "leer"], [*ENGLISH, "empty", "blank", ""]
    name = folder(tmp_path / "f", train=(german, english), val=(GERMAN, ENGLISH), test=([], []))
    with pytest.raises(DataError, match="its test part has no pairs of lines that are not empty"):
        load_pairs(name, languages="de-en")
    folder(tmp_path / "f", test=(german, english))
    splits = load_pairs(name, context=4, min_count=1, languages="de-en")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (2, 4, 4)
    assert splits.left_out == 2
    (source, read), _ = splits.train.take(torch.tensor([1]))
    assert (words(splits, source[0]), words(splits, read[0])) == (
        ["Hallo", "!", "</s>"],
        ["<s>", "hello", "!"],
    )
    with pytest.raises(DataError, match=r"at most context=2 tokens a side; the shortest one has 3"):
        load_pairs(name, context=2, min_count=1, languages="de-en")


def test_words_that_training_does_not_know_are_unknown_but_stay_in_the_references(tmp_path):
    german, english = [*GERMAN] * 2, [*ENGLISH] * 2
    name = folder(
        tmp_path / "f",
        train=(german, english),
        val=(["ein Boot"], ["a boat, <s> too"]),
        test=(["x"], ["y"]),
    )
    splits = load_pairs(name, languages="de-en")
    (source, read), _ = splits.validation.take(torch.tensor([0]))
    assert words(splits, source[0]) == ["ein", "<unk>", "</s>"]
    assert words(splits, read[0]) == ["<s>", "a", "<unk>", "<unk>", "<unk>", "<unk>"]
    assert splits.validation.references == ("a boat , <s> too",)
    (source, read), following = splits.test.take(torch.tensor([0]))  # one token a side
    assert words(splits, source[0]) == ["<unk>", "</s>"]
    assert words(splits, following[0]) == ["<unk>", "</s>"]


@pytest.mark.parametrize("level", ["bytes", "characters"])
def test_bytes_and_characters_are_tokens_as_well(tmp_path, level):
    path = tmp_path / "a.tsv"
    path.write_text("süß\tsweet\n" * 20, encoding="utf-8")
    splits = load_pairs(f"pairs:{path}", level=level)
    (source, _), following = splits.test.take(torch.tensor([0]))
    assert source.shape[1] == (6 if level == "bytes" else 4)
    assert splits.test.coding.decode(source[0].tolist()) == "süß"
    assert splits.test.coding.decode(following[0].tolist()) == "sweet"
    assert splits.test.references == ("sweet", "sweet")
    assert splits.classes[: len(SPECIAL)] == SPECIAL


def test_codings_go_back_and_forth():
    for code in (Bytes(), Parts(["Grüße, Welt!"], "characters", 1, "it")):
        line = "Grüße, Welt!"
        assert code.decode([START, *code.encode(line), END, PADDING]) == line == code.written(line)
    by_words = Parts(["a b b", "b c <unk> </s> <pad>"], "words", 1, "it")
    assert by_words.classes[4:6] == ("b", "/")  # by frequency, then by the alphabet
    assert by_words.encode("<unk> <pad> b") == [1, 1, 4]
    with pytest.raises(DataError, match=r"nothing occurs min_count=9 times among the 2 different"):
        Parts(["a b"], "words", 9, "it")


def test_pairs_of_like_length_meet_and_the_order_follows_from_seed_and_epoch(tmp_path):
    path = tmp_path / "long.tsv"
    source = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (400,), generator=source).tolist()
    path.write_text("".join(f"{'x ' * n}\t{'y ' * n}{i}\n" for i, n in enumerate(lengths)))
    split = load_pairs(f"pairs:{path}", min_count=1).train

    def pass_over(epoch: int, **how: Any) -> list[tuple[Tensor, Tensor]]:
        found = batches(split, batch_size=8, seed=5, epoch=epoch, **how)
        return [(inputs[1], following) for inputs, following in found]

    first = pass_over(0)
    assert len(first) == len(split) // 8
    filled = sum(int((f == IGNORED).sum()) for _, f in first) / sum(f.numel() for _, f in first)
    assert filled < 0.05  # some 40 % of random batches
    ends = [f[f != IGNORED].tolist() for _, f in first]
    assert len({tuple(e) for e in ends}) == len(ends)  # every pair once
    widths = [f.shape[1] for _, f in first]
    assert widths != sorted(widths)  # no length has a time of its own
    assert_close(pass_over(0), first, rtol=0, atol=0)
    assert [f.shape for _, f in pass_over(1)] != [f.shape for _, f in first]
    assert_close(pass_over(0, start=7), first[7:], rtol=0, atol=0)
    for (_, whole), *shares in zip(
        first, *(pass_over(0, worker=w, workers=2) for w in (0, 1)), strict=True
    ):
        real = sum(int((f != IGNORED).sum()) for _, f in shares)
        assert real == int((whole != IGNORED).sum())


def test_alike_keeps_every_example_of_whole_batches_once():
    generator = torch.Generator().manual_seed(0)
    order, lengths = torch.randperm(1003, generator=generator), torch.arange(1003) % 37
    found = alike(order, lengths, 8, generator)
    assert sorted(found.tolist()) == sorted(order[:1000].tolist())
    spread = [int(lengths[b].max() - lengths[b].min()) for b in found.split(8)]
    assert sum(spread) / len(spread) < 3
    assert POOL * 8 < 1000


def test_the_example_that_sizes_are_counted_for_is_of_median_length(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"{'x ' * n}\t{'y ' * n}\n" for n in [1, 9, 2, 8, 3, 1, 1, 1, 1, 1]))
    (source, read), units = data.example(load_pairs(f"pairs:{path}", min_count=1).train)
    assert (source.shape, read.shape, units) == ((1, 3), (1, 3), 3)


def test_a_limit_takes_the_first_pairs_and_keeps_their_lengths(tmp_path):
    whole = load_pairs(written(tmp_path / "a.tsv"), min_count=1)
    train = data.limited(whole, 7).train
    assert len(train) == 7
    assert isinstance(train, Uneven)
    assert_close(train.take(torch.arange(7)), whole.train.take(torch.arange(7)), rtol=0, atol=0)
    assert whole.test.some(torch.tensor([2])).references == (ENGLISH[2],)


def test_a_folder_says_which_language_is_the_source(tmp_path):
    name = folder(
        tmp_path / "f", train=(GERMAN, ENGLISH), dev=(GERMAN, ENGLISH), test=(GERMAN, ENGLISH)
    )
    back = load_pairs(name, languages="en-de", min_count=1)
    assert back.test.references == tuple(GERMAN)
    with pytest.raises(OptionError, match=r"which language is the source; set .* for: de, en\)"):
        load_pairs(name)
    with pytest.raises(OptionError, match="languages='deen': write source and target with a dash"):
        load_pairs(name, languages="deen")
    with pytest.raises(DataError, match=r"must hold train.de and train.fr"):
        load_pairs(name, languages="de-fr")
    (tmp_path / "f" / "test.en").write_text("one\n")
    with pytest.raises(DataError, match=r"test.de has 4 lines and test.en has 1; line by line"):
        load_pairs(name, languages="de-en")
    (tmp_path / "f" / "test.en").unlink()
    with pytest.raises(DataError, match=r"must hold test.de and test.en or test2016.de and"):
        load_pairs(name, languages="de-en")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a\tb\n\nc d\n", r"a.tsv, line 3: 0 tabs, not 1; per line it must hold a source, a tab"),
        (b"a\tb\tc\n", r"a.tsv, line 1: 2 tabs"),
        (b"caf\xe9\tb\n", r"is no UTF-8 text \(byte 3\); convert it"),
        (b"\n\n", "its training part has no pairs"),
    ],
)
def test_a_malformed_file_is_named_with_the_line(tmp_path, content, words):
    path = tmp_path / "a.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_pairs(f"pairs:{path}")


def test_marks_of_other_systems_are_read(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(("\ufeff" + "a\u2028b\tc\r\n" * 20).encode())
    splits = load_pairs(f"pairs:{path}", level="characters")
    assert splits.test.references == ("c", "c")
    (source, _), _ = splits.train.take(torch.tensor([0]))
    assert splits.train.coding.decode(source[0].tolist()) == "a\u2028b"


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"name": "pairs:"}, OptionError, "names no file or folder; write pairs:PATH"),
        ({"name": "pair:x"}, OptionError, "unknown text in pairs 'pair:x'; did you mean 'pairs"),
        ({"name": "pairs:nowhere"}, DataError, "nowhere cannot be read: No such file"),
        ({"level": "word"}, OptionError, "unknown token level 'word'; did you mean 'words'"),
        ({"context": 0}, OptionError, "context=0; it must be at least 1"),
        ({"languages": "de-en"}, OptionError, "is no folder; in a file the source comes first"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_to_do(tmp_path, monkeypatch, how, error, words):
    monkeypatch.chdir(tmp_path)
    written(Path("a.tsv"))
    with pytest.raises(error) as caught:
        load_pairs(**{"name": "pairs:a.tsv", **how})
    assert words in str(caught.value)


def test_pairs_are_known_by_their_name():
    assert data.is_pairs("pairs:anything")
    assert data.is_pairs("multi30k")
    assert data.is_pairs("multi30k:folder")
    assert not data.is_pairs("text:pairs")
    with pytest.raises(OptionError, match=r"is text, not images; read it with data\.load_p"):
        data.load("pairs:x")


class Rows(dict[str, list[str]]):
    """Columns as the package datasets gives them."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def hub(load: Any) -> ModuleType:
    module: Any = ModuleType("datasets")
    module.load_dataset = load
    return module


def test_multi30k_comes_from_the_hub_from_german_in_lower_case(monkeypatch):
    asked = []

    def load(*names: str) -> Any:
        asked.append(names)
        rows = Rows({"en": ["Two DOGS .", *ENGLISH], "de": ["Zwei Hunde .", *GERMAN]})
        return {part: rows for part in ("train", "validation", "test")}

    monkeypatch.setitem(sys.modules, "datasets", hub(load))
    splits = load_pairs("multi30k", min_count=1)
    assert asked == [("bentrevett/multi30k",)]
    assert splits.name == "multi30k"
    (source, _), _ = splits.train.take(torch.tensor([0]))
    assert words(splits, source[0]) == ["zwei", "hunde", ".", "</s>"]
    assert splits.test.references[0] == "two dogs ."
    back = load_pairs("multi30k", min_count=1, languages="en-de")
    assert back.test.references[0] == "zwei hunde ."
    with pytest.raises(OptionError, match="unknown language of multi30k 'fr'"):
        load_pairs("multi30k", languages="de-fr")


def test_multi30k_can_be_read_from_its_own_files(tmp_path):
    both = (GERMAN, ENGLISH)
    folder(tmp_path / "m", train=both, val=both, test_2016_flickr=both)
    splits = load_pairs(f"multi30k:{tmp_path / 'm'}", min_count=1)
    assert splits.test.references[1] == ENGLISH[1].lower()


def test_without_hub_or_package_multi30k_says_what_to_do(monkeypatch):
    hidden: Any = sys.modules
    monkeypatch.setitem(hidden, "datasets", None)
    with pytest.raises(DataError, match=r"rankwise\[datasets\]'; or give the folder of its files"):
        load_pairs("multi30k")

    def offline(*names: str) -> Any:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setitem(sys.modules, "datasets", hub(offline))
    with pytest.raises(DataError, match=r"\(Couldn't reach the Hub\); where there is no network"):
        load_pairs("multi30k")
