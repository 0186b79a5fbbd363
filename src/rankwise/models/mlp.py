"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """A perceptron with ReLU between its layers; it flattens whatever it is given.

    Args:
        inputs: elements of one input.
        layers: widths of the layers before the output, at least one.
        classes: number of outputs.
    """

    def __init__(self, inputs: int, layers: Sequence[int], classes: int) -> None:
        super().__init__()
        self.input = nn.Linear(inputs, layers[0])
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(layers))
        self.output = nn.Linear(layers[-1], classes)

    def forward(self, x: Tensor) -> Tensor:  # (B, ...) -> (B, classes)
        x = F.relu(self.input(x.flatten(1)))
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.output(x)
