"""What a network is trained to do: the loss of a batch, how its quality is measured and written.

All tasks predict one of several classes: once an image, or at every token of a window or a target.
So there is one loss, the mean cross-entropy over all predictions, and the tasks differ in their
words. What fills up a target is `data.IGNORED`, no prediction, and counts nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise import data, distributed
from rankwise.training.carried import CarriedState, reading_order

# Predictions of one batch in evaluation; images were always taken by 500.
EVALUATION_BATCH = 500
SCORES_AT_ONCE = 2**23
VALUES_AT_ONCE = 2**23  # of inputs: 500 images of 64x64 in colour, 55 of 224x224


@dataclass(frozen=True)
class Score:
    """Quality of a model on a split: mean loss in nats and share of right predictions.

    For translations perhaps BLEU, 0 to 100.
    """

    loss: float
    accuracy: float
    bleu: float | None = None

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
        padded: batches hold a varying number of predictions.
    """

    unit: str
    probe: int
    describe: Callable[[Score], str]
    padded: bool = False

    def loss(self, scores: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
        """What a worker goes down: `loss_of` its part of a batch.

        Where that holds more or fewer predictions than the others', it is weighted by them, so that
        the mean over workers is that over all predictions. A collective then.
        """
        own = loss_of(scores, targets, label_smoothing=label_smoothing)
        if not self.padded or distributed.workers() == 1:
            return own
        count = float((targets != data.IGNORED).sum())
        return own * (count / distributed.mean(count))


TASKS: Mapping[str, Task] = {
    "classification": Task("image", 500, lambda score: f"accuracy {score.accuracy:.2%}"),
    "language modelling": Task(
        "token",
        8_192,
        lambda score: f"perplexity {score.perplexity:.2f} ({score.bits:.3f} bits/token)",
    ),
    "translation": Task(
        "token",
        8_192,
        lambda score: (
            f"perplexity {score.perplexity:.2f}, token accuracy {score.accuracy:.2%}"
            + ("" if score.bleu is None else f", BLEU {score.bleu:.2f}")
        ),
        padded=True,
    ),
}


def loss_of(scores: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over all predictions of a batch, in float32.

    Args:
        scores: (B, C) or (B, T, C).
        targets: (B,) or (B, T) int64; `data.IGNORED` is no prediction.
        label_smoothing: share of the target that all classes get.
    """
    flat = scores.float().flatten(0, -2)
    flat_targets = targets.flatten()
    return F.cross_entropy(
        flat, flat_targets, ignore_index=data.IGNORED, label_smoothing=label_smoothing
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: data.Examples,
    move: Callable[[Any], Any],
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
    values = sum(part.numel() for part in (sample if isinstance(sample, tuple) else (sample,)))
    fitting = min(SCORES_AT_ONCE // (split.units * classes), VALUES_AT_ONCE // values)
    at_once = max(1, min(EVALUATION_BATCH, fitting))
    loss, right, predictions = 0.0, 0, 0
    carried = CarriedState(model)
    order = reading_order(count, at_once, streams=carried.streams)
    with eval_mode(model), closing(data.read(split, order)) as batches:
        for batch in batches:
            inputs, targets = (move(part) for part in batch)
            with precision():
                scores = carried.scores(model, inputs)
            scores, targets = scores.float().flatten(0, -2), targets.flatten()
            summed = F.cross_entropy(scores, targets, ignore_index=data.IGNORED, reduction="sum")
            loss += summed.item()
            right += int((scores.argmax(1) == targets).sum())
            predictions += int((targets != data.IGNORED).sum())
    return Score(loss / predictions, right / predictions)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout and the like; every module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
