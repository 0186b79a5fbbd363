"""The learning rate over a run: a function of the step, and on a plateau of validation losses."""

from __future__ import annotations

import math
from typing import Any

from rankwise.errors import OptionError
from rankwise.training.recipe import Recipe


class Schedule:
    """What multiplies `recipe.lr` after so many finished steps, called with their number.

    A linear rise from `lr_start` over the warm-up, then the recipe's schedule. All but "plateau"
    are functions of the step alone, which resume without any state.

    Raises:
        OptionError: the warm-up is as long as the run, or the schedule needs one and has none.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self.total = recipe.epochs * steps_per_epoch
        steps, epochs = recipe.lr_warmup_steps, recipe.lr_warmup_epochs
        self.rise = round(epochs * steps_per_epoch) if steps is None else steps
        if self.rise >= self.total:
            raise OptionError(
                f"Recipe: the learning rate rises over {self.rise:,} steps, and the run has "
                f"{self.total:,}; shorten lr_warmup_steps"
            )
        if recipe.schedule == "noam" and self.rise == 0:
            raise OptionError(
                "Recipe: schedule='noam' falls from the end of a warm-up on; give lr_warmup_steps "
                "(4,000 in the paper) or lr_warmup_epochs"
            )
        self.best = math.inf
        self.plateaus = 0

    def __call__(self, step: int) -> float:
        """The factor for the step that follows `step` finished ones."""
        if step < self.rise:
            start = self.recipe.lr_start
            return start + (1 - start) * (step + 1) / self.rise
        kind, end = self.recipe.schedule, self.recipe.lr_end
        if kind in ("cosine", "linear"):
            done = min(1.0, (step - self.rise) / (self.total - self.rise))
            left = (1 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1 - done
            return end + (1 - end) * left
        if kind == "step":
            passed = sum(step >= round(m * self.total) for m in self.recipe.milestones)
            return self.recipe.lr_decay**passed
        if kind == "plateau":
            return self.recipe.lr_decay**self.plateaus
        if kind == "noam":  # Vaswani et al., arXiv 1706.03762, section 5.3, with its peak as lr
            return math.sqrt(self.rise / (step + 1))
        return 1.0

    def observe(self, validation_loss: float) -> bool:
        """Take note of an epoch's validation loss.

        Returns:
            Whether the factor has changed: a plateau, on which this loss is no new best.
        """
        if self.recipe.schedule != "plateau":
            return False
        if validation_loss < self.best:
            self.best = validation_loss
            return False
        self.plateaus += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a plateau remembers; nothing for the other schedules."""
        if self.recipe.schedule != "plateau":
            return {}
        return {"best": self.best, "plateaus": self.plateaus}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.best = state.get("best", self.best)
        self.plateaus = state.get("plateaus", self.plateaus)
