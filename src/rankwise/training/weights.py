"""Weights that training begins with: those of another run, or of a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from rankwise import checkpoint
from rankwise.errors import CheckpointError, nearest


@torch.no_grad()
def begin_with(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Copy into a network what a file has for it; nothing in the file is executed.

    What has another shape there, such as a classifier of other classes, keeps its fresh values;
    so does what the file lacks.

    Args:
        model: a fresh network.
        path: folder of a run, or one of its checkpoints, trained dense; or FILE.safetensors.

    Returns:
        The event "weights": how many numbers were taken, and which tensors were not.

    Raises:
        CheckpointError: nothing to read, or less than half of the network's numbers are in it.
    """
    given, own = _read(Path(path)), model.state_dict()
    fitting = {
        name: value
        for name, value in given.items()
        if name in own and own[name].shape == value.shape
    }
    numbers, every = _numbers(fitting), _numbers(own)
    left = [name for name in own if name not in fitting]
    if 2 * numbers < every:
        first = left[0]
        there = given.get(first)
        near = nearest(first, given, limit=1)
        what = "is not there" + (f" (the closest is {near[0]})" if near else "")
        if isinstance(there, Tensor):
            what = f"has the shape {tuple(there.shape)} there, and {tuple(own[first].shape)} here"
        raise CheckpointError(
            f"{path} has {numbers:,} of the network's {every:,} numbers: {first} {what}; give the "
            "weights of the same network, trained dense or made dense by rankwise.to_dense"
        )
    for name, value in fitting.items():
        own[name].copy_(value)
    unused = [name for name in given if name not in own]
    return {
        "event": "weights",
        "step": 0,
        "source": str(path),
        "numbers": [numbers, every],
        "fresh": left,
        "unused": unused,
    }


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        found = checkpoint.load(path).weights
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"weights {path} cannot be read: {error}") from error


def _numbers(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() for t in tensors.values())
