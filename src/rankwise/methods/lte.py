"""LTE, LoRA the Explorer: multi-head LoRA (Huh et al., 2024, arXiv 2402.16828).

When: merges every `merge_every` steps. Where: N updates of each frozen weight. How many ranks: one
for all heads; merged they add up to N r. Action: each head learns from its own chunk of the batch;
the mean of what they learned is merged, and they go on from there, moments and all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from rankwise.layers.adapted import Chunks
from rankwise.method import NO_CHANGE, Change, Method
from rankwise.options import option, validate
from rankwise.selection import Layers
from rankwise.updates import Updates, fields

MODES = ("parallel", "sequential", "workers")


@dataclass
class LTE(Method):
    """Many heads: `parallel`, a chunk of the batch for each; `sequential`, all of it for every one;
    `workers`, one head for each data-parallel worker, which sends its factors at merges alone.

    Parallel: y_n = W x_n + s (U_n V_n - U_n' V_n') x_n, ' the values at the last merge. Factors and
    moments are never reset. Sequential heads add s / N of each, so merging them changes nothing,
    and is left for the end. Two choices differ from the published program: evaluation adds the mean
    of what is not merged yet (`evaluate_open`), and a head's gradient is that of its own chunk's
    mean loss, N times its part in the batch's (`own_mean`): the same to Adam, not to SGD.

    Workers train apart: do not wrap the model in DDP, and give each its part of every batch. It is
    the parallel mode with `own_mean`, exactly so with `others="none"`; else other parameters learn
    apart too and become their means at merges, as do BatchNorm's statistics. Evaluation reads W and
    this worker's own head, the same everywhere right behind a merge. All must take as many steps.
    """

    provides: ClassVar[frozenset[str]] = fields.PROVIDES
    conflicts = fields.CONFLICTS

    heads: int = option(32, "updates of each weight, N; by mode=workers one a worker", at_least=1)
    rank: int = fields.rank(32)
    alpha: float = fields.alpha(4096.0)
    merge_every: int = option(10, "optimizer steps between merges", at_least=1)
    mode: str = option("parallel", "what a head sees", choices=MODES)
    layers: Layers = fields.layers()
    exclude: Layers = fields.exclude()
    others: str = fields.others("all")
    init: str = fields.draw("orthogonal")
    own_mean: bool = option(True, "a head's gradient is of its own chunk's mean loss")
    evaluate_open: bool = option(True, "evaluation adds what is not merged yet")
    batch_dim: int = option(0, "dimension of the inputs that counts examples", at_least=0)
    split: bool = fields.split()
    dtype: str = fields.dtype()
    rounding: str = fields.rounding()

    def __post_init__(self) -> None:
        validate(self)

    def attach(self, context: Any) -> None:
        super().attach(context)
        chunks = Chunks(self.heads, self.batch_dim) if self.mode == "parallel" else None
        heads = 1 if self.trains_apart else self.heads
        merges = self.mode != "sequential"
        self.updates = Updates.of(self, context, heads=heads, anchored=merges, chunks=chunks)

    @property
    def trains_apart(self) -> bool:
        return self.mode == "workers"

    @property
    def switch_step(self) -> int | None:
        """The optimizer step of the first merge."""
        return None if self.mode == "sequential" else self.merge_every

    def prepare(self, model: nn.Module) -> Change:
        return self.updates.open(model)

    def after_step(self, model: nn.Module, step: int) -> Change:
        if self.mode != "sequential" and step % self.merge_every == 0:
            self.updates.merge(step)
        return NO_CHANGE

    def resume(self, model: nn.Module) -> Change:
        return self.updates.resume(model)

    def detach(self) -> None:
        self.updates.release()
        super().detach()

    def finalize(self, model: nn.Module) -> Change:
        return self.updates.close(model)
