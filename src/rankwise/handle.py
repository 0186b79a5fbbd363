"""A stable handle on a model whose wrapper (DDP, torch.compile) is made anew after a change."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch import nn

Wrap = Callable[[nn.Module], Any]


class ModelHandle:
    """Delegates everything to the present wrapper, so the loop never holds an outdated one."""

    def __init__(self, model: nn.Module, wrap: Wrap) -> None:
        self._bare, self._wrap = model, wrap
        self._current: Any = None

    def wrap_again(self) -> None:
        """Make a new wrapper around the model as it is now."""
        # DDP's old reducer keeps hooks on parameters that stay; it must be gone before the new
        # one exists, or both would reduce their gradients.
        self._current = None
        gc.collect()
        self._current = self._wrap(self._bare)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._current(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_current"], name)

    def __repr__(self) -> str:
        return f"ModelHandle({self._current!r})"
