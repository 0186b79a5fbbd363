"""LoRA: low-rank adaptation (Hu et al., ICLR 2022, arXiv 2106.09685); rsLoRA (2312.03732).

When: at the start, or behind another method's switch. Where: updates of frozen weights, merged at
the end. How many ranks: one for all. Action: y = W x + (alpha / r) U V x; only U and V learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rankwise.method import NO_CHANGE, Change, Method
from rankwise.options import option, validate
from rankwise.selection import Layers
from rankwise.updates import Updates, fields, scale_from_alpha


@dataclass
class LoRA(Method):
    """Train an update of rank r beside every chosen weight, and leave the weights alone.

    U begins at zero and V uniform within 1 / sqrt(in), as in the authors' program. The other
    parameters are frozen unless `others` names them: a new classifier, say.
    """

    provides: ClassVar[frozenset[str]] = fields.PROVIDES
    conflicts = fields.CONFLICTS

    rank: int = fields.rank(8)
    alpha: float = fields.alpha(16.0)
    rslora: bool = option(False, "scale by alpha / sqrt(rank), which lets large ranks learn")
    dropout: float = option(0.0, "of the update's inputs while training", at_least=0, at_most=0.99)
    layers: Layers = fields.layers()
    exclude: Layers = fields.exclude()
    others: str = fields.others("none")
    init: str = fields.draw()
    split: bool = fields.split()
    dtype: str = fields.dtype()
    after_switch: bool = option(False, "adapt what another method's switch has left dense")
    merge: bool = option(True, "fold the updates into the weights at the end")

    def __post_init__(self) -> None:
        validate(self)
        self._waiting = False
        if self.after_switch:  # it looks at the layers only then
            only = {k: v for k, v in fields.CONFLICTS.items() if k != "low-rank weights"}
            vars(self).update(conflicts=only, needs={"low-rank weights": "it waits for a switch"})

    def attach(self, context: Any) -> None:
        super().attach(context)
        scale = scale_from_alpha(self.alpha, self.rank, stabilized=self.rslora)
        self.updates = Updates.of(self, context, scale=scale, dropout=self.dropout)

    def prepare(self, model: nn.Module) -> Change:
        return NO_CHANGE if self.after_switch else self.updates.open(model)

    def on_change(self, model: nn.Module, change: Change) -> None:
        self._waiting = self.after_switch and bool(change.modules) and not self.updates.layers

    def after_step(self, model: nn.Module, step: int) -> Change:
        if not self._waiting:
            return NO_CHANGE
        self._waiting = False
        return self.updates.open(model, step)

    def resume(self, model: nn.Module) -> Change:
        return self.updates.resume(model)

    def finalize(self, model: nn.Module) -> Change:
        return self.updates.close(model) if self.merge else NO_CHANGE
