"""What of U diag(c) V matters: scores of its triplets (u_i, c_i, v_i), and which are kept.

B: blocks of a head, R: rank, S: the rank it gets; a head has B R triplets, in the order of c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from rankwise import distributed, linalg, surgery
from rankwise.errors import FactorizeError
from rankwise.layers import LowRankLayer, adapted_layers
from rankwise.layers.base import PARTS
from rankwise.method import NO_CHANGE, Carry, Change

_torch: Any = torch  # whose calls on lists are documented, but not typed as public
_WORTH = 0.25  # share of the triplets that is worth an exchange of all tensors before the end


class Triplets:
    """The triplets of all open updates of a model: how important, which of them masked.

    The importance of a number w is |w dL/dw|, smoothed over steps; its uncertainty, how much that
    moves, is smoothed likewise, and its score is their product. A triplet's score is that of c_i,
    plus the means over u_i and v_i (2303.10512, eq. 7 to 11). Heads that layers share count once.

    Args:
        model: holds adapted layers; of those only heads with a diagonal core count.
        beta1: smoothing of the importance.
        beta2: smoothing of its uncertainty.

    Raises:
        FactorizeError: an embedding with sparse gradients.

    Attributes:
        heads: name -> head, each once.
        kept: by the same names: True for triplets that the last allocation left, (B R,).
        idle: how many allocations in a row have masked a triplet, (B R,).
    """

    def __init__(self, model: nn.Module, beta1: float, beta2: float) -> None:
        self.smoothing = beta1, beta2
        self.heads = _distinct(_heads(model))
        for name, head in self.heads.items():
            if getattr(head.u, "sparse", False):
                raise FactorizeError(
                    f"{name}: the triplets of an embedding with sparse gradients cannot be scored, "
                    "nor kept orthogonal, row by row; build it with sparse=False, or exclude it"
                )
        self.kept = {n: torch.ones_like(_core(h), dtype=torch.bool) for n, h in self.heads.items()}
        self.idle = {n: torch.zeros_like(k, dtype=torch.int32) for n, k in self.kept.items()}
        self._masked = list(self.heads)  # names of heads that may hold masked triplets
        self._importance = {n: _blank(w) for n, w in self._weights().items()}
        self._uncertainty = {n: _blank(w) for n, w in self._weights().items()}

    def _weights(self) -> dict[str, Parameter]:
        return {f"{n}.{p}": getattr(h, p).weight for n, h in self.heads.items() for p in PARTS}

    @property
    def ranks(self) -> dict[str, int]:
        """How many triplets the last allocation left to each head."""
        return {name: int(kept.sum()) for name, kept in self.kept.items()}

    @property
    def matrices(self) -> int:
        """How many matrices have an update: heads, or the blocks that they consist of."""
        return sum(head.blocks for head in self.heads.values())

    @torch.no_grad()
    def weigh(self) -> None:
        """Take the gradients of a step into the smoothed importance and uncertainty.

        They are to be those of the loss, regulariser included; None counts as zero.
        """
        weights = list(self._weights().values())
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        now = _torch._foreach_mul(_wide(weights), _wide(grads))
        _torch._foreach_abs_(now)
        importance, uncertainty = [*self._importance.values()], [*self._uncertainty.values()]
        _torch._foreach_lerp_(importance, now, 1 - self.smoothing[0])
        _torch._foreach_sub_(now, importance)
        _torch._foreach_abs_(now)
        _torch._foreach_lerp_(uncertainty, now, 1 - self.smoothing[1])

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """S_i of every triplet: name of the head -> (B R,)."""
        result = {}
        for name, head in self.heads.items():
            u, core, v = (self._score(f"{name}.{part}", head, part) for part in PARTS)
            result[name] = core + (u.mean(-2) + v.mean(-1)).flatten()
        return result

    def _score(self, key: str, head: LowRankLayer, part: str) -> Tensor:
        score = self._importance[key] * self._uncertainty[key]
        return score if part == "core" else head.to_factor(part, score)

    @torch.no_grad()
    def allocate(self, budget: int) -> None:
        """Keep the triplets of the highest scores in all heads; set c of the others to zero.

        As many as the budget, exactly: of equal scores those that come first are kept. The others
        go on learning, and the next allocation may keep them.
        """
        own = list(self.scores().values())
        scores = torch.cat([each.to(own[0].device) for each in own])
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.sort(descending=True, stable=True).indices[:budget]] = True
        distributed.broadcast_([kept])  # sums may differ in their last bits between machines
        for name, part in zip(self.heads, kept.split([len(each) for each in own]), strict=True):
            idle = self.idle[name]
            self.kept[name] = part.to(idle.device, copy=True)
            self.idle[name] = torch.where(self.kept[name], 0, idle + 1)
        self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Set c of the masked triplets to zero."""
        cores = {name: _core(self.heads[name]) for name in self._masked}
        if cores:
            masks = [self.kept[name].to(core.dtype) for name, core in cores.items()]
            _torch._foreach_mul_([*cores.values()], masks)

    def shrink(self, model: nn.Module, when: str, patience: int, last: bool) -> Change:
        """Take triplets out, if it is time to, behind an allocation.

        Args:
            model: the one that holds them.
            when: "final", behind the last allocation; "eager", also as soon as a quarter of them
                can go; "none".
            patience: how many allocations in a row mask what eager takes out.
            last: whether no allocation follows.
        """
        if last:
            self._importance, self._uncertainty = {}, {}  # not needed any more
            change = NO_CHANGE if when == "none" else self.drop(model)
            self._masked = self._partly()
            return change
        if when == "eager" and self.droppable(patience) >= _WORTH:
            return self.drop(model, patience)
        return NO_CHANGE

    def droppable(self, patience: int) -> float:
        """The share of triplets that `drop` would take out now."""
        ranks = self._ranks(patience)
        left = sum(ranks[name] * head.blocks for name, head in self.heads.items())
        return 1 - left / sum(len(kept) for kept in self.kept.values())

    def _ranks(self, patience: int) -> dict[str, int]:
        """S of every head: what the block that wants most wants, and one at least."""
        wanted = [
            _by_block(idle < patience, self.heads[name]).sum(-1).max()
            for name, idle in self.idle.items()
        ]
        most = torch.stack(wanted).clamp_min(1).tolist()
        return dict(zip(self.heads, most, strict=True))

    @torch.no_grad()
    def drop(self, model: nn.Module, patience: int = 1) -> Change:
        """Take out the triplets that so many allocations in a row have masked.

        Tensors, moments, importance and masks keep the numbers of the others, bit for bit. All
        blocks of a head keep as many as the one that needs most, and one at least: an update of
        rank 0 stays as one triplet at zero.
        """
        selections: dict[Parameter, Tensor] = {}
        for name, rank in self._ranks(patience).items():
            head = self.heads[name]
            if rank < head.rank:
                selections[_core(head)] = _first(self.idle[name] < patience, head, rank)
        ranks = {
            name: selections[_core(head)].shape[-1]
            for name, head in _heads(model).items()
            if _core(head) in selections
        }
        if not ranks:
            return NO_CHANGE

        def fill(name: str, before: Any, after: Any) -> Mapping[str, Carry]:
            carries = {p: Selection(before, after, p, selections[_core(before)]) for p in PARTS}
            for part, select in carries.items():
                getattr(after, part).weight.copy_(select(getattr(before, part).weight))
            return carries

        change = surgery.change_ranks(model, ranks, fill)
        for name, old in self.heads.items():
            if name in ranks:
                self.heads[name] = _head(model, name)
                self._follow(name, old, selections[_core(old)])
        return change

    def _follow(self, name: str, old: LowRankLayer, keep: Tensor) -> None:
        new = self.heads[name]
        core = Selection(old, new, "core", keep)
        self.kept[name], self.idle[name] = core(self.kept[name]), core(self.idle[name])
        for part in PARTS if self._importance else ():
            select, key = Selection(old, new, part, keep), f"{name}.{part}"
            self._importance[key] = select(self._importance[key])
            self._uncertainty[key] = select(self._uncertainty[key])

    def _partly(self) -> list[str]:
        """Names of the heads of which some triplets are masked."""
        return [name for name, kept in self.kept.items() if not bool(kept.all())]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Importance, uncertainty and masks, by names."""
        return {
            "kept": dict(self.kept),
            "idle": dict(self.idle),
            "importance": dict(self._importance),
            "uncertainty": dict(self._uncertainty),
        }

    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `state_dict` returned, for a model of the same structure."""
        own = self.state_dict()
        for kind, values in state_dict.items():
            for name, value in values.items():
                own[kind][name].copy_(value)
        if not state_dict["importance"]:  # behind the last allocation
            self._importance, self._uncertainty = {}, {}
            self._masked = self._partly()


@dataclass(frozen=True, eq=False)
class Selection:
    """The numbers of a head's part that belong to some of its triplets; exact for every moment.

    Attributes:
        old: the head they are taken from.
        new: one of the lower rank.
        part: "u", "core" or "v".
        keep: (S,) or (B, S), places among R, ascending.
    """

    old: LowRankLayer
    new: LowRankLayer
    part: str
    keep: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Of anything in the shape of the old part's weight, in that of the new one's."""
        factor = self.old.to_factor(self.part, values)
        if self.part != "v":
            factor = factor.take_along_dim(self.keep[..., None, :], -1)
        if self.part != "u":
            factor = factor.take_along_dim(self.keep[..., :, None], -2)
        return self.new.from_factor(self.part, factor).clone()

    def first(self, moment: Tensor) -> tuple[Tensor | None, ...]:
        """Of a first moment."""
        return (self(moment),)

    def second(self, moment: Tensor, first: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of a second moment."""
        return (self(moment),)


def _heads(model: nn.Module) -> dict[str, LowRankLayer]:
    layers = adapted_layers(model)
    names = [f"{n}.heads.{i}" for n, layer in layers.items() for i in range(len(layer.heads))]
    heads = {name: _head(model, name) for name in names}
    return {name: head for name, head in heads.items() if head.diagonal}


def _head(model: nn.Module, name: str) -> LowRankLayer:
    head: Any = model.get_submodule(name)
    return head


def _distinct(heads: Mapping[str, LowRankLayer]) -> dict[str, LowRankLayer]:
    first: dict[Parameter, str] = {}
    for name, head in heads.items():
        first.setdefault(_core(head), name)
    return {name: heads[name] for name in first.values()}


def _core(head: LowRankLayer) -> Parameter:
    return head.core.weight


def _blank(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight, dtype=linalg.working_dtype(weight.dtype))


def _wide(tensors: list[Any]) -> list[Tensor]:
    return [t.to(linalg.working_dtype(t.dtype)) for t in tensors]


def _by_block(values: Tensor, head: LowRankLayer) -> Tensor:
    """(B R,) as (R,), or (B, R) where B > 1."""
    return values.view(head.blocks, -1) if head.blocks > 1 else values


def _first(wanted: Tensor, head: LowRankLayer, rank: int) -> Tensor:
    """Places of the triplets to keep: all that are wanted, then the first others; ascending."""
    order = _by_block(wanted, head).sort(dim=-1, descending=True, stable=True).indices
    return order[..., :rank].sort(dim=-1).values
