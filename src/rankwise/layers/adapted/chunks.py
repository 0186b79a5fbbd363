"""Which examples of a batch belong to which head (2402.16828): told by the forward, not guessed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rankwise.errors import LifeCycleError


class Chunks:
    """How the batch of the forward under way is divided among heads; one object a model.

    Head n of N sees the n-th of N chunks of the examples, whose sizes differ by one at most. A
    layer may see several rows an example (tokens that were flattened into the batch); those of an
    example stay together.

    Args:
        heads: N.
        dim: dimension of the inputs, of the model and of its layers alike, that counts examples.

    Attributes:
        batch: examples in the forward under way; None before the first.
    """

    def __init__(self, heads: int, dim: int = 0) -> None:
        self.heads, self.dim, self.batch = heads, dim, None

    batch: int | None

    def watch(self, model: nn.Module) -> RemovableHandle:
        """Learn the number of examples from the first tensor that the model is called with."""

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim())
            first = next(tensors, None)
            if first is not None and first.dim() > self.dim:
                self.batch = first.shape[self.dim]

        return model.register_forward_pre_hook(look, with_kwargs=True)

    def sizes(self, x: Tensor) -> list[int]:
        """Rows of each chunk along `dim` of a layer's input.

        Raises:
            LifeCycleError: fewer examples than heads, or rows that are not those of the examples.
        """
        rows = x.shape[self.dim] if x.dim() > self.dim else 0
        batch = rows if self.batch is None else self.batch
        if batch < self.heads:
            raise LifeCycleError(
                f"a batch of {batch} cannot be divided among {self.heads} heads, each of which "
                "sees a chunk of its own; take larger batches (drop_last=True for a short last "
                "one), fewer heads, or mode='sequential'"
            )
        if rows % batch:
            raise LifeCycleError(
                f"a layer with parallel heads was given {rows} rows (input {tuple(x.shape)}, "
                f"dimension {self.dim}) of a batch of {batch}; where examples are not along "
                f"dimension {self.dim} (sequence first), give batch_dim, or leave the layer out"
            )
        base, more = divmod(batch, self.heads)
        return [(base + (n < more)) * (rows // batch) for n in range(self.heads)]

    def split(self, x: Tensor) -> list[Tensor]:
        """The chunks of a layer's input, in the order of the heads."""
        return list(torch.split(x, self.sizes(x), self.dim))
