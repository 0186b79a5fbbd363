"""Subwords: what they are learned from, that every text can be read, and whose file is read."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from torch.testing import assert_close

from rankwise.data import load_pairs, load_text
from rankwise.data.texts import subwords
from rankwise.data.texts.subwords import PIECE, Subwords
from rankwise.errors import DataError, OptionError

pytest.importorskip("tokenizers")

LINES = "the quick brown fox jumps over the lazy dog\nGrüße aus Köln 🙂, naïve co-op!\n"


def test_every_text_is_given_back_and_frequent_words_are_one_token():
    code = Subwords.learned([LINES * 30], 400)
    assert len(code.classes) <= 400
    for text in (LINES, "\n\n \t never seen: ŻÓŁĆ 漢字 \x00", ""):
        assert code.decode(code.encode(text).tolist()) == text
    assert len(code.encode(" quick")) == 1
    assert len(code.encode(" kciuq")) > 1
    assert code.classes[code.end or 0] == "<|endoftext|>"
    long = LINES * (3 * PIECE // len(LINES))
    assert code.decode(code.encode(long).tolist()) == long
    assert code.classes == Subwords.learned([LINES * 30], 400).classes


def test_a_text_has_the_parts_of_its_characters_and_the_subwords_of_the_first(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINES * 40 + "zzzzqqqq " * 40, encoding="utf-8")
    how: Any = {"name": f"text:{path}", "context": 4}
    characters = load_text(level="characters", **how)
    splits = load_text(level="bpe", vocabulary=500, **how)
    code = Subwords.learned([_train(characters)], 500)
    assert code.classes == splits.classes
    for part in ("train", "validation", "test"):
        plain = "".join(characters.classes[i] for i in getattr(characters, part).tokens.tolist())
        assert code.decode(getattr(splits, part).tokens.tolist()) == plain
    assert any("brown" in token for token in splits.classes)
    assert not any("zz" in token for token in splits.classes)  # is held out


def _train(splits: Any) -> str:
    return "".join(splits.classes[i] for i in splits.train.tokens.tolist())


def test_a_tokenizer_of_a_file_is_taken_and_its_cutting_and_filling_undone(tmp_path):
    code = Subwords.learned([LINES * 30], 400)
    tokenizer: Any = code._tokenizer
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=90)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = Subwords.load(tmp_path / "tokenizer.json")
    assert loaded.classes == code.classes
    tokenizer.no_truncation()
    tokenizer.no_padding()
    assert_close(loaded.encode(LINES), code.encode(LINES), rtol=0, atol=0)


def test_pairs_are_read_as_subwords_of_both_sides(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("das alte Haus\tthe old house\n" * 40)
    splits = load_pairs(f"pairs:{path}", level="bpe", vocabulary=300)
    assert splits.test.references[0] == "the old house"
    assert splits.classes[:5] == ("<pad>", "<unk>", "<s>", "</s>", "<|endoftext|>")
    code = splits.test.coding
    assert code.decode([2, *code.encode("das alte Haus"), 3, 0]) == "das alte Haus"
    assert splits.train.units < 8  # words of both sides were learned
    assert max(splits.train.sources.tokens.tolist()) < len(splits.classes)


def test_what_cannot_be_had_is_named_with_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="vocabulary=256; subwords start from the 256 bytes"):
        Subwords.learned(["x"], 256)
    with pytest.raises(DataError, match=r"nowhere.json cannot be read: No such file"):
        Subwords.load("nowhere.json")
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {}}')
    with pytest.raises(DataError, match=r"is no tokenizer.json of the package tokenizers \("):
        Subwords.load(path)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1") * 99)
    with pytest.raises(DataError, match=r"no UTF-8 text \(byte 3\)"):
        load_text(f"text:{latin}", level="bpe")
    hidden: Any = sys.modules
    monkeypatch.setitem(hidden, "tokenizers", None)
    with pytest.raises(DataError, match=r"missing: pip install 'rankwise\[tokenizers\]'; or take"):
        subwords.subwords(["x"], vocabulary=300, tokenizer=None)


def test_pieces_end_with_lines_and_lose_nothing(monkeypatch):
    monkeypatch.setattr(subwords, "PIECE", 10)
    text = "abc\ndefgh\nij" + "k" * 25 + "\nl"
    pieces = list(subwords._pieces(text))
    assert "".join(pieces) == text
    assert pieces[:2] == ["abc\ndefgh\n", "ijkkkkkkkk"]
    assert max(map(len, pieces)) <= 10
