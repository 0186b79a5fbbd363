"""Scale every group's learning rate for one step, and put it back for the scheduler."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class LearningRateScale:
    """Multiplies before the step and restores after it, so schedulers never see the factor."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._saved: list[tuple[dict[str, Any], Any]] = []

    def scale(self, factor: float) -> None:
        """Multiply all learning rates; a factor of 1 touches nothing."""
        self.restore()
        if factor == 1.0:
            return
        scaled: set[int] = set()
        for group in self._optimizer.param_groups:
            lr = group["lr"]
            if isinstance(lr, Tensor):  # captured graphs hold this very tensor: edit in place
                if id(lr) in scaled:  # groups made with one default share it
                    continue
                scaled.add(id(lr))
                self._saved.append((group, lr.clone()))
                lr.mul_(factor)
            else:
                self._saved.append((group, lr))
                group["lr"] = lr * factor

    def restore(self) -> None:
        """Put back what `scale` found; nothing if it was not called since."""
        for group, lr in self._saved:
            if isinstance(lr, Tensor):
                group["lr"].copy_(lr)
            else:
                group["lr"] = lr
        self._saved.clear()
