"""LoRA+ (Hayou, Ghosh and Yu, ICML 2024, arXiv 2402.12354): U learns faster than V.

When: every step. Where: the updates of another method. How many ranks: those of that method.
Action: the learning rate of U is `ratio` times that of V, so that both learn in wide networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn
from torch.nn import Parameter

from rankwise.layers import adapted_layers
from rankwise.method import Change, Method, Successors
from rankwise.options import option, validate


@dataclass
class LoRAPlus(Method):
    """`[LoRA(...), LoRAPlus()]`, and beside ReLoRA or LTE as well.

    U moves to a parameter group of its own, made at the start, whose rate is `ratio` times that of
    the group V is in; schedulers drive both. Weight decay is the group's own; where it is
    decoupled (AdamW) U, with its larger rate, decays faster, as in the authors' program.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"rates of the factors"})
    needs: ClassVar[Mapping[str, str]] = {"low-rank updates": "it sets the rate of their factor U"}
    conflicts: ClassVar[Mapping[str, str]] = {
        "rates of the factors": "the rate of U would be multiplied twice"
    }

    ratio: float = option(16.0, "learning rate of U over that of V", above=0)

    def __post_init__(self) -> None:
        validate(self)

    def roles(self) -> Mapping[str, Mapping[str, Any]]:
        return {"lora+": {"lr": lambda rate: rate * self.ratio}}

    def amend(self, model: nn.Module, change: Change) -> Change:
        fast = {p for layer in adapted_layers(model).values() for p in layer.last_factors()}
        added: dict[Parameter, Successors] = {}
        for anchor, new in change.added.items():
            slow = tuple(p for p in new.parameters if p not in fast)
            quick = tuple(p for p in new.parameters if p in fast)
            added[anchor] = replace(new, parameters=slow)
            if quick:
                added[slow[-1]] = replace(new, parameters=quick, role="lora+")
        return replace(change, added=added)
