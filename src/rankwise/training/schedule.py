"""The learning rate over a run, as a pure function of the step: it resumes without any state."""

from __future__ import annotations

import math
from collections.abc import Callable

from rankwise.training.recipe import Recipe


def factor(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """What multiplies `recipe.lr` after so many finished steps.

    A linear rise over the first `lr_warmup_epochs`, then the recipe's schedule over the rest.
    """
    total = recipe.epochs * steps_per_epoch
    rise = round(recipe.lr_warmup_epochs * steps_per_epoch)

    def at(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        if recipe.schedule == "cosine":
            return (1 + math.cos(math.pi * min(1.0, (step - rise) / (total - rise)))) / 2
        if recipe.schedule == "step":
            return 0.1 ** ((step >= 0.5 * total) + (step >= 0.75 * total))
        return 1.0

    return at
