"""The structure of a model as data: read it, and give it to another copy of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rankwise.candidates import Candidate, survey
from rankwise.errors import FactorizeError, PlanError, nearest, unknown
from rankwise.layers import (
    KINDS,
    RECURRENT,
    AdaptedLayer,
    Form,
    LowRankLayer,
    OpenAttention,
    OpenRecurrent,
    adapted_layers,
    low_rank_class,
    low_rank_layers,
    recurrent_class,
)
from rankwise.method import Change
from rankwise.surgery import change_ranks, factorize_layers, open_homes, whole_or_not

Spec = dict[str, Any]
HOMES = (OpenAttention.kind, *RECURRENT)
_FORMS = (Form(), Form(separable=True))


def read_plan(model: nn.Module) -> dict[str, Spec]:
    """The structure of a model: name -> spec of its low-rank layer or opened home; JSON-able.

    An attention or recurrent layer that is opened comes before the layers in it.
    """
    adapted, low_rank = adapted_layers(model), low_rank_layers(model)
    homes = (OpenAttention, OpenRecurrent)
    plan = {}
    for name, module in model.named_modules():
        if name in adapted or name in low_rank or isinstance(module, homes):
            ours: Any = module
            plan[name] = ours.spec()
    return plan


@torch.no_grad()
def impose_plan(model: nn.Module, plan: Mapping[str, Mapping[str, Any]]) -> Change:
    """Give a freshly built dense model the structure that `read_plan` returned, values aside.

    Layers that already have the structure are left, those of another rank get that of the plan;
    low-rank layers that the plan does not name are an error, because their weights would not load.

    Raises:
        PlanError: the plan is malformed or of another model: names, kinds or shapes differ.
    """
    if not isinstance(plan, Mapping):
        raise PlanError(f"a plan maps layer names to specs, this is a {type(plan).__name__}")
    present = read_plan(model)
    wanted = {name: _read_spec(name, spec) for name, spec in plan.items()}
    resized = {}
    for name in (name for name in wanted if name in present):
        if differs_in_rank(present[name], wanted[name]):
            resized[name] = int(wanted[name]["rank"])
        elif present[name] != wanted[name]:
            raise PlanError(f"{name} is {present[name]} in the model, {wanted[name]} in the plan")
    extra = sorted(present.keys() - plan.keys())
    if extra:
        raise PlanError(
            f"{extra[0]} is low-rank in the model but dense in the plan; build it dense"
        )
    missing = {name: spec for name, spec in wanted.items() if name not in present}
    shut = {n: spec.get("fused", False) for n, spec in missing.items() if spec["kind"] in HOMES}
    for name in shut:
        spec = missing.pop(name)
        check = _check_recurrent if spec["kind"] in RECURRENT else _check_attention
        check(model, name, spec)
    opened = open_homes(model, shut)
    with whole_or_not(model, opened):
        made = opened | _factorize(model, missing)
    with whole_or_not(model, made):
        return made | change_ranks(model, resized)


def differs_in_rank(one: Spec, other: Spec) -> bool:
    """Whether two specs are of low-rank layers that differ in their rank and in nothing else."""
    ranks = one.get("rank"), other.get("rank")
    return None not in ranks and ranks[0] != ranks[1] and {**one, "rank": ranks[1]} == other


def _factorize(model: nn.Module, specs: Mapping[str, Spec]) -> Change:
    candidates = survey(model)
    for name, spec in specs.items():
        _check_spec(name, spec, candidates)
        for other in candidates[name].tied:
            _check_twins(name, spec, other, specs.get(other, spec))

    def make(
        name: str, dense: nn.Module, stand_in: type[LowRankLayer], rank: int
    ) -> LowRankLayer | AdaptedLayer:
        chosen = KINDS[_kind_of_product(specs[name])]
        if chosen not in [low_rank_class(dense, form) for form in _FORMS]:
            raise PlanError(f"the plan asks for {specs[name]}; this builds {stand_in.kind!r}")
        if specs[name]["kind"] == AdaptedLayer.kind:
            layer = AdaptedLayer.from_spec(dense, specs[name], chosen)
        else:
            layer = chosen.from_spec(dense, specs[name])
        if layer.spec() != specs[name]:
            raise PlanError(f"the plan asks for {specs[name]}; this builds {layer.spec()}")
        return layer

    try:
        return factorize_layers(model, {n: int(s["rank"]) for n, s in specs.items()}, make)
    except FactorizeError as error:
        raise PlanError(f"the plan is of another model: {error}") from error


def _kind_of_product(spec: Mapping[str, Any]) -> str:
    """The kind of the low-rank layer, or of an update's heads."""
    return spec["of"] if spec["kind"] == AdaptedLayer.kind else spec["kind"]


_LAYER = {"kind": str, "shape": (list, tuple), "rank": int, "norm": bool}
_ATTENTION = {"kind": str, "shape": (list, tuple), "heads": int, "fused": bool}
_RECURRENT = {"kind": str, "shape": (list, tuple), "layers": int, "bidirectional": bool}
_UPDATE = {
    "of": str,
    "heads": int,
    "scale": (int, float),
    "anchored": bool,
    "dropout": (int, float),
    "dtype": str,
}
_EXAMPLES: dict[str, Spec] = {
    "layer": {"kind": "linear", "shape": [64, 32], "rank": 8, "norm": False},
    "attention": {"kind": "attention", "shape": [64, 64, 64], "heads": 4, "fused": False},
    "recurrent": {"kind": "lstm", "shape": [32, 64, 0], "layers": 2, "bidirectional": False},
}


def _read_spec(name: str, spec: Any) -> Spec:
    kind = spec.get("kind") if isinstance(spec, Mapping) else None
    form = "attention" if kind == OpenAttention.kind else "layer"
    form = "recurrent" if kind in list(RECURRENT) else form
    fields: dict[str, Any] = {"attention": _ATTENTION, "recurrent": _RECURRENT, "layer": _LAYER}[
        form
    ]
    if not isinstance(spec, Mapping):
        raise PlanError(f"{name}: a spec maps {', '.join(fields)} to values; this is {spec!r}")
    for field, kinds in fields.items():
        if not isinstance(spec.get(field), kinds) or (kinds is int and spec[field] is True):
            raise PlanError(
                f"{name}: the spec's {field} is {spec.get(field, 'missing')!r}; a spec looks like "
                f"{_EXAMPLES[form]}"
            )
    if form != "layer":
        return {**spec, "shape": list(spec["shape"])}
    if spec["kind"] == AdaptedLayer.kind:
        for field, kinds in _UPDATE.items():
            if not isinstance(spec.get(field), kinds):
                raise PlanError(f"{name}: the update's {field} is {spec.get(field, 'missing')!r}")
    # Structures saved before there were cores and blocks name neither.
    spec = {"core": False, "blocks": 1, **spec, "shape": list(spec["shape"])}
    diagonal = spec["core"] == "diagonal" and spec["kind"] == AdaptedLayer.kind
    if not (isinstance(spec["core"], bool) or diagonal) or type(spec["blocks"]) is not int:
        raise PlanError(
            f"{name}: core={spec['core']!r} is no bool or blocks={spec['blocks']!r} no int"
        )
    return spec


def _check_attention(model: nn.Module, name: str, spec: Spec) -> None:
    modules = dict(model.named_modules())
    module: Any = modules.get(name)
    if type(module) is not nn.MultiheadAttention or not name:
        known = [n for n, m in modules.items() if type(m) is nn.MultiheadAttention]
        wrong = unknown("attention", name, nearest(name, known) or known)
        raise PlanError(f"the plan is of another model: {wrong}")
    own = {**OpenAttention.like(module).spec(), "fused": spec["fused"]}
    if own != spec:
        raise PlanError(f"the plan is of another model: {name} is {own} here, {spec} there")
    if spec["fused"] and module.in_proj_weight is None:
        raise PlanError(f"{name}: its projections have different widths; they cannot be fused")


def _check_recurrent(model: nn.Module, name: str, spec: Spec) -> None:
    modules = {n: m for n, m in model.named_modules() if n}
    kind = None if name not in modules else recurrent_class(modules[name])
    if kind is None:
        known = [n for n, m in modules.items() if recurrent_class(m) is not None]
        wrong = unknown("recurrent layer", name, nearest(name, known) or known)
        raise PlanError(f"the plan is of another model: {wrong}")
    own = kind.like(modules[name]).spec()
    if own != spec:
        raise PlanError(f"the plan is of another model: {name} is {own} here, {spec} there")


def _check_twins(name: str, spec: Spec, other: str, theirs: Spec) -> None:
    for field in ("rank", "norm", "core", "blocks"):
        if spec[field] != theirs[field]:
            raise PlanError(
                f"{name} shares its weight but not its {field} with {other} "
                f"({spec[field]}, {theirs[field]})"
            )


def _check_spec(name: str, spec: Mapping[str, Any], candidates: Mapping[str, Candidate]) -> None:
    kind = _kind_of_product(spec)
    if kind not in KINDS:
        raise PlanError(f"{name}: {unknown('kind of layer', kind, KINDS)}")
    if name not in candidates:
        known = nearest(name, candidates) or candidates
        raise PlanError(f"the plan is of another model: {unknown('layer', name, known)}")
    shape = list(candidates[name].shape)
    if shape != spec["shape"]:
        raise PlanError(
            f"the plan is of another model: {name} is {shape} here, {spec['shape']} there"
        )
