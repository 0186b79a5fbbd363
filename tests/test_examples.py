"""The examples run as they stand, and end as their text says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_loop_of_ones_own_switches_and_learns() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_loop.py")],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert "8 of 10 layers low-rank; parameters 2,508,298 -> 1,459,722 (58.2%)" in done.stdout
    assert lines[-1].endswith("events: ['plan', 'switch']")
    assert float(lines[-1].split()[1].rstrip(";")) > 0.85
