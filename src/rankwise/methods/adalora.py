"""AdaLoRA: adaptive budget allocation (Zhang et al., ICLR 2023, arXiv 2303.10512).

When: every `every` steps while the budget falls. Where: updates of frozen weights, merged at the
end. How many ranks: a budget for all layers, spent where the loss is most sensitive. Action:
y = W x + s P diag(lam) Q x; the least important lam become zero, and leave all tensors in the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rankwise.method import NO_CHANGE, Change, Context, Method
from rankwise.options import option, validate
from rankwise.selection import Layers
from rankwise.updates import Updates, fields
from rankwise.updates.budget import CubicBudget
from rankwise.updates.orthogonality import add_orthogonality_
from rankwise.updates.triplets import Triplets


@dataclass
class AdaLoRA(Method):
    """Updates whose ranks fall to a budget, layer by layer as gradients say; needs `total_steps`.

    P and Q begin normal with a standard deviation of .02, lam at 0; s = alpha / initial_rank, for
    good. Importance is |w dL/dw|, the regulariser part of L, w the weight before the step: so the
    paper; in PEFT's loop it is that after. The regulariser joins behind clipping. PEFT masks to the
    end; here tensors shrink, the function but for rounding the same: when the mask is `final`, or
    also (`eager`) once a quarter of the triplets was masked `patience` times in a row, for good.
    """

    provides: ClassVar[frozenset[str]] = fields.PROVIDES
    conflicts: ClassVar[Mapping[str, str]] = {
        **fields.CONFLICTS,
        "rates of the factors": "P and Q are kept alike, and neither begins at zero",
        "low-rank gradients": "the importance of P and Q is read off their whole gradients",
    }

    initial_rank: int = option(12, "triplets of each matrix at the start", at_least=1)
    target_rank: int = option(8, "triplets of a matrix in the end, in the mean", at_least=1)
    warmup: float = option(0.1, "steps until the budget falls; below 1 of the run", at_least=0)
    final: float = option(0.5, "steps behind the last allocation; below 1 of the run", at_least=0)
    every: int = option(10, "optimizer steps between allocations", at_least=1)
    gamma: float = option(0.1, "strength of the orthogonality of P and Q", at_least=0)
    beta1: float = option(0.85, "smoothing of the importance", at_least=0, at_most=1)
    beta2: float = option(0.85, "smoothing of its uncertainty", at_least=0, at_most=1)
    shrink: str = option("final", "when tensors shrink", choices=("final", "eager", "none"))
    patience: int = option(5, "allocations at zero until eager takes out", at_least=1)
    alpha: float = fields.alpha(16.0)
    dropout: float = option(0.0, "of the update's inputs while training", at_least=0, at_most=0.99)
    layers: Layers = fields.layers()
    exclude: Layers = fields.exclude()
    others: str = fields.others("none")
    split: bool = fields.split()
    dtype: str = fields.dtype()

    def __post_init__(self) -> None:
        validate(self)

    def attach(self, context: Context) -> None:
        self.budget = CubicBudget.of(self, context)
        super().attach(context)
        begin = {"rank": self.initial_rank, "diagonal": True}
        self.updates = Updates.of(self, context, dropout=self.dropout, **begin)

    def prepare(self, model: nn.Module) -> Change:
        change = self.updates.open(model)
        self.triplets = Triplets(model, self.beta1, self.beta2)
        return change

    def resume(self, model: nn.Module) -> Change:
        change = self.updates.resume(model)
        self.triplets = Triplets(model, self.beta1, self.beta2)
        return change

    def before_step(self, model: nn.Module, step: int) -> None:
        add_orthogonality_(self.triplets.heads.values(), self.gamma)
        if step < self.budget.ends:
            self.triplets.weigh()

    def after_step(self, model: nn.Module, step: int) -> Change:
        if step > self.budget.ends:
            self.triplets.hold()
        if not self.budget.allocates(step):
            return NO_CHANGE
        self.triplets.allocate(self.budget.at(step, self.triplets.matrices))
        return self.triplets.shrink(model, self.shrink, self.patience, step == self.budget.ends)

    def finalize(self, model: nn.Module) -> Change:
        return self.updates.close(model)

    def state_dict(self) -> dict[str, Any]:
        return self.triplets.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.triplets.load_state_dict(state_dict)
