"""The loader's benchmark runs and writes what its document reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "loader.py"


def test_the_loader_is_timed_alone_and_under_a_step(tmp_path: Path) -> None:
    words = ["--smoke", "--threads", "1", "--json", str(tmp_path / "record.json")]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    alone = [row for row in record["rows"] if "kind" in row]
    assert {row["kind"] for row in alone} == {"processes", "threads", "DataLoader"}
    assert all(min(row["images_per_s"]) > 0 for row in alone)
    sides = {row["side"]: row for row in record["rows"] if "side" in row}
    assert set(sides) == {"memory", "stream, 1", "stream, 2"}
    assert all(0 <= wait < 1 for row in sides.values() for wait in row["wait"])
    assert "24 files" in done.stdout
