"""The state that a recurrent network hands over from one window of a text to the next.

Truncated back-propagation through time (Williams and Peng, Neural Computation 1990): a batch reads
parallel streams of text, window after window; the state goes on, gradients stop at its beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rankwise import distributed
from rankwise.data import Inputs
from rankwise.models import Stateful

# Parallel streams that a part is evaluated in: each begins without knowing what came before.
EVALUATION_STREAMS = 20


class CarriedState:
    """Calls a network on the windows of a batch, in the state in which it left those before.

    Networks without a state are just called.

    Args:
        network: the bare one, which knows its initial state.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network if isinstance(network, Stateful) else None
        self._state: tuple[Tensor, ...] | None = None

    @property
    def streams(self) -> bool:
        """Whether batches have to follow each other."""
        return self._network is not None

    def scores(self, model: Any, windows: Inputs) -> Any:
        """What the network says of these windows; the state waits for the next ones.

        Args:
            model: the network, or what is wrapped around it.
            windows: (B, T), or the first of the streams where the others have ended; what else a
                network reads, several tensors as its arguments.
        """
        if isinstance(windows, tuple):
            return model(*windows)
        if self._network is None:
            return model(windows)
        state = self._state
        if state is None:
            state = self._network.initial_state(len(windows))
        scores, after = model(windows, tuple(part[:, : len(windows)] for part in state))
        self._state = tuple(part.detach() for part in after)
        return scores

    def forget(self) -> None:
        """The next windows begin streams."""
        self._state = None

    def state_dict(self) -> list[Tensor]:
        """The state of the streams of all workers; empty where none is carried. A collective."""
        if self._state is None:
            return []
        own = [part.cpu() for part in self._state]
        return [
            torch.stack(parts, dim=2).flatten(1, 2)  # stream b is worker b % workers' b // workers
            for parts in zip(*distributed.gather(own), strict=True)
        ]

    def load_state_dict(self, state: list[Tensor], device: torch.device) -> None:
        """Go on from what `state_dict` returned, with this worker's streams."""
        mine = slice(distributed.worker(), None, distributed.workers())
        self._state = tuple(part[:, mine].to(device) for part in state) or None


def reading_order(count: int, at_once: int, *, streams: bool) -> Iterator[Tensor]:
    """The numbers of examples to be read together, so that all are read once.

    With streams, place b of a batch follows place b of the one before; the last stream may end
    earlier than the others.
    """
    if not streams:
        yield from torch.arange(count).split(at_once)
        return
    length = math.ceil(count / min(at_once, EVALUATION_STREAMS))
    begins = torch.arange(0, count, length)
    for place in range(length):
        chosen = begins + place
        yield chosen[chosen < count]
