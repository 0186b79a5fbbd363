"""Multi-head GaLore: many heads, each with projected gradients in a subspace of its own.

Ours, not published: LTE (2402.16828) with the subspaces of GaLore (2403.03507) for heads.
When: merges every `merge_every` steps; bases are renewed there. Where: N updates of each frozen
weight. How many ranks: one for all heads; merged they add up to N r, and more over time.
Action: each head sees its own chunk of the batch and steps P_n^T G_n; W += mean of scale P_n V_n.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rankwise.layers.adapted import Chunks
from rankwise.method import NO_CHANGE, Change, Method
from rankwise.optim.projected import MOMENTS
from rankwise.options import option, validate
from rankwise.selection import Layers
from rankwise.updates import HeadBases, Opening, Updates, fields


@dataclass
class MultiHeadGaLore(Method):
    """`parallel`: a chunk of the batch for each head; `workers`: a head for each worker, see LTE.

    A head is P V with a frozen orthonormal basis P on the shorter side; V begins at zero, and again
    at every merge. Its gradient is P^T G, so the moments the optimizer keeps of it are GaLore's.
    New bases are orth(G V^T), G of the step of the merge: a warm power step by what the head has
    learned since the last one, for one thin product. The first are random. Weight decay acts on W.
    """

    provides: ClassVar[frozenset[str]] = fields.PROVIDES
    conflicts: ClassVar[Mapping[str, str]] = {**fields.CONFLICTS, **fields.ONE_FACTOR}

    heads: int = option(4, "updates of each weight, N; by mode=workers one a worker", at_least=1)
    rank: int = fields.rank(32)
    scale: float = option(0.25, "factor on the update", above=0)
    merge_every: int = option(10, "optimizer steps between merges", at_least=1)
    renew: int = option(1, "merges between new bases; 0 keeps the first, random ones", at_least=0)
    moments: str = option("keep", "what a new basis does to moments", choices=MOMENTS)
    mode: str = option("parallel", "what a head sees", choices=("parallel", "workers"))
    layers: Layers = fields.layers()
    exclude: Layers = fields.exclude()
    others: str = fields.others("all")
    batch_dim: int = option(0, "dimension of the inputs that counts examples", at_least=0)
    rounding: str = fields.rounding()

    def __post_init__(self) -> None:
        validate(self)

    @property
    def trains_apart(self) -> bool:
        return self.mode == "workers"

    def attach(self, context: Any) -> None:
        super().attach(context)
        heads = 1 if self.trains_apart else self.heads
        opening = Opening(rank=self.rank, scale=self.scale, heads=heads)
        chunks = None if self.trains_apart else Chunks(heads, self.batch_dim)
        how: dict[str, Any] = {"apart": self.trains_apart, "rounding": self.rounding}
        self.updates = Updates(
            context, opening, self.layers, self.exclude, self.others, chunks=chunks, **how
        )
        self.bases = HeadBases(self, self.updates)

    def roles(self) -> Mapping[str, Mapping[str, Any]]:
        return {HeadBases.ROLE: {"weight_decay": 0.0}}

    def prepare(self, model: nn.Module) -> Change:
        return self.bases.without_decay(self.updates.open(model, begin=self.bases.begin))

    def before_step(self, model: nn.Module, step: int) -> None:
        self.bases.decay()

    def after_step(self, model: nn.Module, step: int) -> Change:
        if step % self.merge_every == 0:
            self.updates.merge(step)
            self.bases.restart()
        self.bases.listen(step + 1)
        return NO_CHANGE

    def resume(self, model: nn.Module) -> Change:
        return self.updates.resume(model) | self.bases.resume(model)

    def detach(self) -> None:
        self.updates.release()
        super().detach()

    def finalize(self, model: nn.Module) -> Change:
        self.bases.settle()
        return self.updates.close(model)

    def state_dict(self) -> dict[str, Any]:
        return self.bases.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.bases.load_state_dict(state_dict)
