"""Averaged copies of a model (EMA, SWA) that follow its structural changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from rankwise import closing, structure, surgery
from rankwise.errors import PlanError
from rankwise.layers import KINDS, AdaptedLayer, LowRankLayer
from rankwise.method import Carry


def inside(copy: nn.Module, model: nn.Module) -> nn.Module:
    """The copy of the model inside AveragedModel, DDP or torch.compile; the copy itself if bare.

    Raises:
        PlanError: it is no copy of this model.
    """
    if not isinstance(copy, nn.Module):
        raise PlanError(
            f"{type(copy).__name__} is no module, so it cannot take on low-rank layers; keep the "
            "average in a copy of the model, e.g. torch.optim.swa_utils.AveragedModel"
        )
    lowered = tuple(f"{name}." for name in structure.read_plan(model))
    layers = {n for n, _ in model.named_modules() if not n.startswith(lowered)}
    candidate: nn.Module | None = copy
    while candidate is not None:
        missing = layers - {n for n, _ in candidate.named_modules()}
        if not missing:
            return candidate
        held = candidate._modules
        candidate = held.get("module", held.get("_orig_mod"))
    raise PlanError(
        f"the copy that is to follow has no layer {min(missing)!r}; follow a copy of the same "
        "model (a wrapper must expose it as .module)"
    )


@torch.no_grad()
def give_structure(model: nn.Module, copy: nn.Module, changed: Iterable[str] | None = None) -> None:
    """Give the copy the low-rank layers that the model has, keeping the copy's own weights.

    The copy's W' becomes U' V with the model's own V and U' = W' V^+, the best fit in that row
    space: averaging U' with the model's U then averages products, which it would not if the
    two had bases of their own. The same where the rank of a layer has changed; the product that W'
    is then is not formed.

    Args:
        model: the trained model.
        copy: the averaged one, with modules of the same names.
        changed: names to bring up to date; without it all whose structure differs.

    Raises:
        PlanError: the copy has another low-rank form of a layer.
    """
    plan, present = structure.read_plan(model), structure.read_plan(copy)
    if changed is None:
        changed = [name for name, spec in plan.items() if present.get(name) != spec]
    # The heads of an update go by names of their own where their ranks have changed.
    owners = (name if name in plan else name.rpartition(".heads.")[0] for name in changed)
    names = [name for name in dict.fromkeys(owners) if name in plan]
    resized = {}
    for name in names:
        if name in present and structure.differs_in_rank(present[name], plan[name]):
            resized[name] = int(plan[name]["rank"])
        elif name in present and present[name] != plan[name]:
            raise PlanError(f"{name} is {present[name]} in the copy, {plan[name]} in the model")

    def make(
        name: str, dense: nn.Module, stand_in: type[LowRankLayer], rank: int
    ) -> LowRankLayer | AdaptedLayer:
        if plan[name]["kind"] == AdaptedLayer.kind:
            return _with_update(dense, plan[name], model.get_submodule(name))
        layer = KINDS[plan[name]["kind"]].from_spec(dense, plan[name])
        theirs: Any = model.get_submodule(name)
        if layer.norm is not None:
            layer.norm.load_state_dict(theirs.norm.state_dict())
        _fit(layer, theirs, dense)
        return layer

    homes = [name for name in names if plan[name]["kind"] in structure.HOMES]
    layers = [name for name in names if name not in homes]
    shut = {name: plan[name].get("fused", False) for name in homes if name not in present}
    surgery.open_homes(copy, shut)
    fresh = {n: int(plan[n]["rank"]) for n in layers if n not in present}
    surgery.factorize_layers(copy, fresh, make)
    _follow_ranks(model, copy, resized)
    for name in layers:
        adapted = plan[name]["kind"] == AdaptedLayer.kind
        if name in present and name not in resized and not adapted:
            layer: Any = copy.get_submodule(name)
            _fit(layer, model.get_submodule(name), layer)
    gone = [name for name in present if name not in plan]
    if gone:
        closing.to_dense(copy)
        give_structure(model, copy)


def _with_update(dense: Any, spec: Mapping[str, Any], theirs: Any) -> AdaptedLayer:
    """The copy's own dense layer, with the update that the model has opened."""
    layer = AdaptedLayer.from_spec(dense, spec, KINDS[spec["of"]])
    layer.heads.load_state_dict(theirs.heads.state_dict())
    layer.evaluates_open = theirs.evaluates_open
    layer.anchor_()
    return layer


def _follow_ranks(model: nn.Module, copy: nn.Module, ranks: Mapping[str, int]) -> None:
    def fill(name: str, old: LowRankLayer, new: LowRankLayer) -> Mapping[str, Carry]:
        like: Any = model.get_submodule(name)
        if new.norm is not None:
            new.norm.load_state_dict(like.norm.state_dict())
        _fit(new, like, old)
        return {}

    surgery.change_ranks(copy, ranks, fill)


def _fit(layer: LowRankLayer, like: Any, source: Any) -> None:
    # With a core, U' C V with the model's own C: what is fitted stands to the left of the rest.
    _, *core, v = like.factors()
    u = torch.linalg.pinv(core[0] @ v if core else v)
    if isinstance(source, LowRankLayer):
        for factor in reversed(source.factors()):
            u = factor.to(u) @ u
    else:
        u = layer.as_matrix(source.weight.detach(), layer.blocks).to(v) @ u
    layer.set_factors(u, *core, v)
