"""Recurrent language models: an embedding, stacked LSTM or GRU layers, and a head.

The form of Zaremba et al. (arXiv 1409.2329), with the tied head of Press and Wolf (1608.05859):
dropout on what enters and leaves the layers and between them, never on the state. Embedding and
head start uniform within 0.1, the head's bias at 0, the layers as torch draws them.

Shapes: `B` streams of text, `T` tokens, `D` width of the embedding, `H` hidden units, `L` layers.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rankwise.errors import OptionError, unknown

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}
BOUND = 0.1

State = tuple[Tensor, ...]


@runtime_checkable
class Stateful(Protocol):
    """A network whose next window begins in the state in which the one before it ended."""

    def initial_state(self, streams: int) -> State:
        """The state before the first token: tensors that hold the streams in dimension 1."""
        ...

    def __call__(self, tokens: Tensor, state: State | None = None) -> Any:
        """Scores; where a state is given, scores and the state after the last token."""
        ...


class RecurrentLanguageModel(nn.Module):
    """Predicts every next token from those before it, and from the state it is handed.

    Args:
        vocabulary: number of different tokens, at least 1.
        width: D; with `tied` it must be `hidden`.
        hidden: H.
        layers: L, at least 1.
        cell: "lstm" or "gru"; the stack is the child of this name.
        dropout: share of embeddings, outputs of layers and of the top that training drops.
        tied: use the embedding's weight as the head's as well.

    Raises:
        OptionError: sizes that do not fit each other, or an unknown cell.

    Example:
        >>> model = RecurrentLanguageModel(vocabulary=65, width=16, hidden=32, layers=2)
        >>> tokens = torch.zeros(4, 10, dtype=torch.int64)
        >>> scores, state = model(tokens, model.initial_state(4))
        >>> scores.shape, state[0].shape
        (torch.Size([4, 10, 65]), torch.Size([2, 4, 32]))
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        hidden: int,
        layers: int,
        cell: str = "lstm",
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        _check(vocabulary, width, hidden, layers, cell, dropout, tied)
        self.cell, self.hidden, self.layers = cell, hidden, layers
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        between = dropout if layers > 1 else 0.0  # torch warns of dropout that has no place
        self.add_module(cell, CELLS[cell](width, hidden, layers, dropout=between, batch_first=True))
        self.head = nn.Linear(hidden, vocabulary)
        nn.init.uniform_(self.embedding.weight, -BOUND, BOUND)
        nn.init.uniform_(self.head.weight, -BOUND, BOUND)
        nn.init.zeros_(self.head.bias)
        if tied:
            self.head.weight = self.embedding.weight

    def initial_state(self, streams: int) -> State:
        """Zeros (L, B, H): hidden state and memory of an LSTM, the hidden state of a GRU."""
        like = self.head.bias
        zeros = torch.zeros(self.layers, streams, self.hidden, device=like.device, dtype=like.dtype)
        return (zeros, zeros) if self.cell == "lstm" else (zeros,)

    def forward(self, tokens: Tensor, state: State | None = None) -> Any:
        """Scores of every token as the next one, at every position.

        Args:
            tokens: (B, T) int64.
            state: of the tokens before these; zeros without it.

        Returns:
            Scores (B, T, vocabulary); where a state is given, also the state after the last token.
        """
        x = self.dropout(self.embedding(tokens))
        stack: Any = getattr(self, self.cell)
        if self.cell == "lstm":
            x, after = stack(x, state)
        else:
            x, last = stack(x, None if state is None else state[0])
            after = (last,)
        scores = self.head(self.dropout(x))
        return scores if state is None else (scores, after)


def _check(
    vocabulary: int, width: int, hidden: int, layers: int, cell: str, dropout: float, tied: bool
) -> None:
    if cell not in CELLS:
        raise OptionError(unknown("cell", cell, CELLS))
    sizes = {"vocabulary": vocabulary, "width": width, "hidden": hidden, "layers": layers}
    for name, size in sizes.items():
        if size < 1:
            raise OptionError(f"RecurrentLanguageModel: {name}={size} must be at least 1")
    if not 0 <= dropout < 1:
        raise OptionError(f"RecurrentLanguageModel: dropout={dropout} must be 0 or more, below 1")
    if tied and width != hidden:
        raise OptionError(
            f"RecurrentLanguageModel: a tied head reads the {hidden} hidden units with the weight "
            f"of an embedding of width={width}; make them equal, or leave the head untied"
        )
