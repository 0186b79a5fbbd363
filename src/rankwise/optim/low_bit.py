"""Optimizer states of few bits in checkpoints: taken apart into plain tensors, and put together.

torchao's optimizers keep moments as tensor subclasses, which would load only with their code. A
checkpoint names their class instead; on loading, only the classes listed here are looked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import CheckpointError

_CLASSES = (
    "torchao.optim.subclass_8bit.OptimState8bit",
    "torchao.optim.subclass_4bit.OptimState4bit",
    "torchao.optim.subclass_fp8.OptimStateFp8",
)
_MARK = "low-bit state"


def packed(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict whose low-bit states are dicts of plain tensors; a new dict."""
    states = {
        key: {name: _apart(value) for name, value in state.items()}
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def unpacked(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that `packed` took apart.

    Raises:
        CheckpointError: a state of a class that is not known, or not installed.
    """
    states = {
        key: {name: _together(value) for name, value in state.items()}
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def _apart(value: Any) -> Any:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if kind not in _CLASSES:
        return value
    names, options = value.__tensor_flatten__()
    parts = {name: getattr(value, name) for name in names}
    return {_MARK: kind, "parts": parts, "options": [_word(option) for option in options]}


def _word(option: Any) -> Any:
    if isinstance(option, torch.dtype):
        return {"dtype": str(option).removeprefix("torch.")}
    return {"size": list(option)} if isinstance(option, torch.Size) else option


def _meant(option: Any) -> Any:
    if isinstance(option, dict):
        if "size" in option:
            return torch.Size(option["size"])
        found = getattr(torch, str(option["dtype"]), None)
        if not isinstance(found, torch.dtype):
            raise CheckpointError(f"a low-bit state of the unknown dtype {option['dtype']!r}")
        return found
    return option


def _together(value: Any) -> Any:
    if not isinstance(value, dict) or _MARK not in value:
        return value
    kind = value[_MARK]
    if kind not in _CLASSES:
        raise CheckpointError(
            f"the checkpoint holds optimizer states of {kind!r}; known are {', '.join(_CLASSES)}"
        )
    module, _, name = kind.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint holds optimizer states of {kind}, which this installation lacks: "
            f"{error}; install the torchao of the saved run"
        ) from error
    parts: dict[str, Tensor] = value["parts"]
    options = [_meant(option) for option in value["options"]]
    return cls.__tensor_unflatten__(parts, options, None, None)
