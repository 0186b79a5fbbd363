"""What a figure depends on beside the recipe: versions, hardware, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import rankwise
from rankwise import accounting


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute."""
    found = {"python": platform.python_version(), "rankwise": rankwise.__version__}
    # With what it is built for, which its package may not say.
    found["torch"] = str(torch.__version__)
    for name in ("numpy", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def hardware(device: torch.device, workers: int) -> dict[str, Any]:
    """The device and how much of the machine is used."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "processor": accounting.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "workers": workers,
    }


def commit() -> str | None:
    """The git commit of this source, with -dirty if it was edited; None for an installed copy."""
    here = Path(__file__)
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name)
    if tracked is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(directory: Path, *words: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", "-C", str(directory), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
