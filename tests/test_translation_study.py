"""The study of translation reads catalogues of messages, goes on where it ended, and reports."""

from __future__ import annotations

import importlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def catalogue(path: Path, messages: dict[str, str]) -> None:
    """A GNU .mo file of these messages."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", **messages}
    rows = sorted((k.encode(), v.encode()) for k, v in messages.items())
    begin = 28 + 16 * len(rows)
    tables, content = [b"", b""], b""
    for side in (0, 1):
        for row in rows:
            tables[side] += struct.pack("<II", len(row[side]), begin + len(content))
            content += row[side] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(rows), 28, 28 + 8 * len(rows), 0, begin)
    path.write_bytes(head + tables[0] + tables[1] + content)


@pytest.fixture
def study(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("translation_study")


def test_messages_are_read_once_in_an_order_of_their_own(study, tmp_path):
    long = "one " * 8
    catalogue(tmp_path / "b.mo", {"old file": "alte Datei", "new file": "neu", long: long + "x"})
    catalogue(tmp_path / "a.mo", {"old file": "die  alte\nDatei", "same words": "same words"})
    catalogue(tmp_path / "iso_3166.mo", {"New Zealand": "Neuseeland"})
    (tmp_path / "bad.mo").write_bytes(b"no catalogue")
    found = study.messages(tmp_path)
    assert sorted(found) == [("new file", "neu"), ("old file", "die alte Datei")]
    assert study.messages(tmp_path) == found


def test_rows_are_trained_and_shown(study, tmp_path, capsys):
    words = ("open", "close", "read", "write", "new", "old", "file", "line")
    messages = {f"{a} {b} {c}": f"{c} {a} {b}en" for a in words for b in words for c in words[:3]}
    catalogue(tmp_path / "a.mo", messages)
    record = tmp_path / "record.jsonl"
    line = ["--catalogues", str(tmp_path), "--record", str(record), "--smoke"]
    assert study.main([*line, "--rows", "dense", "Pufferfish"]) == 0
    shown = capsys.readouterr().out
    facts, *runs = (json.loads(each) for each in record.read_text().splitlines())
    assert facts["settings"]["pairs"] == len(messages)
    assert [(run["row"], run["seed"]) for run in runs] == [("dense", 0), ("Pufferfish", 0)]
    assert runs[0]["parameters"][0] > runs[1]["parameters"][0]
    assert f"{runs[1]['test_bleu']:.2f}" in shown
    assert study.main(["--table", "--record", str(record)]) == 0
    again = capsys.readouterr().out
    assert f"{runs[1]['test_loss'] - runs[0]['test_loss']:.3f}" in again
    assert len(record.read_text().splitlines()) == 3
    catalogue(tmp_path / "c.mo", {"another line": "noch eine"})
    with pytest.raises(SystemExit, match="made with other settings"):
        study.main(line)
    with pytest.raises(SystemExit, match="holds no German catalogues"):
        study.main(["--catalogues", str(tmp_path / "none"), "--record", str(record)])
