"""What a network is trained to do: the loss of a batch, how its quality is measured and written.

Both tasks predict one of several classes: once an image, or at every token of a window. So there
is one loss, the mean cross-entropy over all predictions, and the tasks differ in their words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise import data
from rankwise.training.carried import CarriedState, reading_order

# Predictions of one batch in evaluation; images were always taken by 500.
EVALUATION_BATCH = 500
SCORES_AT_ONCE = 2**23
VALUES_AT_ONCE = 2**23  # of inputs: 500 images of 64x64 in colour, 55 of 224x224


@dataclass(frozen=True)
class Score:
    """Quality of a model on a split: mean loss in nats and share of right predictions."""

    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """e to the loss: among how many equally likely classes the model seems to choose."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits(self) -> float:
        """The loss in bits."""
        return self.loss / math.log(2)


@dataclass(frozen=True)
class Task:
    """One kind of prediction.

    Attributes:
        unit: what a loss is the mean over and what speed counts, in the singular.
        probe: units that a switch is judged by.
        describe: a score in words, for a line of a log.
    """

    unit: str
    probe: int
    describe: Callable[[Score], str]


TASKS: Mapping[str, Task] = {
    "classification": Task("image", 500, lambda score: f"accuracy {score.accuracy:.2%}"),
    "language modelling": Task(
        "token",
        8_192,
        lambda score: f"perplexity {score.perplexity:.2f} ({score.bits:.3f} bits/token)",
    ),
}


def loss_of(scores: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over all predictions of a batch, in float32.

    Args:
        scores: (B, C) or (B, T, C).
        targets: (B,) or (B, T) int64.
        label_smoothing: share of the target that all classes get.
    """
    flat = scores.float().flatten(0, -2)
    return F.cross_entropy(flat, targets.flatten(), label_smoothing=label_smoothing)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: data.Examples,
    move: Callable[[Tensor], Tensor],
    precision: Callable[[], AbstractContextManager[object]],
    *,
    classes: int,
    units: int | None = None,
) -> Score:
    """Score of a model in eval mode; its modes are restored.

    A network with a state is handed it from window to window, in a few streams.

    Args:
        model: the bare model.
        split: what to read, in order.
        move: brings a batch to the model's device.
        precision: autocast of the run.
        classes: scores of one prediction; with the units it decides how many fit at once.
        units: read no more than so many, but one example at least.
    """
    count = len(split) if units is None else min(len(split), max(1, units // split.units))
    sample, _ = split.take(torch.zeros(1, dtype=torch.int64))
    fitting = min(SCORES_AT_ONCE // (split.units * classes), VALUES_AT_ONCE // sample.numel())
    at_once = max(1, min(EVALUATION_BATCH, fitting))
    loss, right, predictions = 0.0, 0, 0
    carried = CarriedState(model)
    order = reading_order(count, at_once, streams=carried.streams)
    with _eval_mode(model), closing(data.read(split, order)) as batches:
        for batch in batches:
            inputs, targets = (move(part) for part in batch)
            with precision():
                scores = carried.scores(model, inputs)
            scores, targets = scores.float().flatten(0, -2), targets.flatten()
            loss += F.cross_entropy(scores, targets, reduction="sum").item()
            right += int((scores.argmax(1) == targets).sum())
            predictions += len(targets)
    return Score(loss / predictions, right / predictions)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
