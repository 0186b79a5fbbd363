"""The examples run as they stand, and end as their text says."""

from __future__ import annotations

import os
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


def test_lora_in_the_trainer_of_transformers_teaches_other_digits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "trainer.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("digits", "adapter"))]
    known, others = (float(part.split()[-1]) for part in lines[0].split(", "))
    assert known > 0.8
    assert others < 0.4
    assert float(lines[1].split()[2].rstrip(",")) > 0.7
    assert "4,421 of 71,749 parameters learned" in lines[1]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
