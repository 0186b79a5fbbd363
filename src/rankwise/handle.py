"""A stable handle on a model whose wrapper (DDP, torch.compile) is made anew after a change."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

from torch import nn

from rankwise.errors import LifeCycleError

Wrap = Callable[[nn.Module], Any]


class ModelHandle:
    """Delegates everything to the present wrapper, so the loop never holds an outdated one.

    A deep copy (an average, a teacher) is one of the bare model, without the wrapper.
    """

    def __init__(self, model: nn.Module, wrap: Wrap) -> None:
        self.__dict__.update(_bare=model, _wrap=wrap, _current=None)

    def wrap_again(self) -> None:
        """Make a new wrapper around the model as it is now.

        Raises:
            LifeCycleError: `wrap` returned nothing that can be called.
        """
        # DDP's old reducer keeps hooks on parameters that stay; it must be gone before the new
        # one exists, or both would reduce their gradients.
        self.__dict__["_current"] = None
        gc.collect()
        self.__dict__["_current"] = self._wrap(self._bare)
        if not callable(self._current):
            raise LifeCycleError(
                f"wrap returned {self._current!r}, which cannot be called; it must return the "
                "wrapped model, as in wrap=lambda model: torch.compile(model)"
            )
        if isinstance(self._current, nn.Module):
            self._current.training = self._bare.training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._current(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # While being unpickled the handle is still empty.
        return getattr(self.__dict__.get("_current"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._current, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self._bare, memo)

    def __repr__(self) -> str:
        return f"ModelHandle({self._current!r})"
