"""From a model and a rule to a plan, and from a plan to low-rank layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from rankwise import accounting, selection, surgery
from rankwise.errors import OptionError, PlanError
from rankwise.layers import Form, LowRankLayer, low_rank_class
from rankwise.method import NO_CHANGE, Change, Context
from rankwise.ranks.budget import Budget
from rankwise.ranks.costs import Meter, forward_flops, saved_bytes
from rankwise.ranks.plan import LayerPlan, Others, Plan
from rankwise.ranks.registry import as_rule
from rankwise.ranks.rules import Costs, Later, Rule
from rankwise.ranks.shape import Cost, MatrixShape
from rankwise.ranks.spectral import Spectra

if TYPE_CHECKING:
    from rankwise.accounting import Trace


def plan(
    model: nn.Module,
    rule: Rule | int | float | str,
    sample: Any = None,
    *,
    layers: selection.Layers = "auto",
    exclude: selection.Layers = (),
    keep_first: int = 1,
    keep_last: int = 1,
    norm: bool = False,
    core: bool = False,
    separable: bool = False,
    split: bool | Mapping[str, int] = False,
    trace: Trace | None = None,
) -> Plan:
    """Decide, without touching the model, which layers become low-rank and at which rank.

    Args:
        model: any model, also on the meta device.
        rule: ranks.Ratio(0.25), ranks.Budget(0.3), ranks.ScaledStableRank(), ...; or 32 (a rank),
            0.25 (a ratio), or a text such as "energy=0.9".
        sample: example input (tensor, tuple of arguments, or dict of keywords): gives the execution
            order and FLOPs. One forward in evaluation mode is run on it.
        layers: "auto", glob(s) over layer names, or a predicate of (name, module).
        exclude: glob(s) or a predicate; these stay dense.
        keep_first: with layers="auto", layers at the beginning that stay dense (the papers' K).
        keep_last: with layers="auto", layers at the end that stay dense.
        norm: a BatchNorm between the factors; changes the function.
        core: three factors U C V.
        separable: 2-D convolutions as 1 x k and k x 1.
        split: fused projections in several parts, each with its own factors (`layers.Form`).
        trace: an execution already recorded, instead of `sample`.

    Returns:
        The plan; `print` it.

    Raises:
        SelectionError: nothing selected.
        PlanError: a rank out of range, a budget out of reach, a budget of FLOPs without a sample,
            or weights that a rule cannot read.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
        >>> dict(plan(model, 16).ranks)
        {'1': 16}
    """
    rule, form = as_rule(rule), Form(norm=norm, core=core, separable=separable, split=split)
    if trace is None and sample is not None:
        trace = accounting.trace(model, sample)
    named = () if callable(layers) else layers
    candidates = selection.survey(model, trace, form=form, layers=named)
    reasons = selection.select(
        model,
        layers,
        exclude,
        keep_first=keep_first,
        keep_last=keep_last,
        trace=trace,
        form=form,
    )
    form.check_names(candidates)
    found = _Layers(model, candidates, reasons, form, sample, trace)
    decided = rule.assign(
        found.chosen(),
        found.outside(),
        spectra=Spectra(found.matrix, rule),
        costs=lambda of: found.costs(of, cast(Budget, rule)),
    )
    lines = []
    for name in candidates:
        decision = decided.get(found.leader[name])
        rank = decision.rank if decision and not reasons[name] else None
        reason = reasons[name] or (decision.reason if decision else "")
        lines.append(found.line(name, rank, reason))
    later = rule.reason if isinstance(rule, Later) else ""
    ranks = {name: decision.rank for name, decision in decided.items()}
    return Plan(tuple(lines), found.others, form, found.notes(rule, ranks), later)


@dataclass(frozen=True)
class _Kind:
    """How one layer is factorised: its class, what that takes beside the rank, and the matrix."""

    stand_in: type[LowRankLayer] | None
    keywords: Mapping[str, Any]
    shape: MatrixShape


class _Layers:
    """A model's layers as rules and plans see them: matrices, spectra and costs by name."""

    def __init__(
        self,
        model: nn.Module,
        candidates: Mapping[str, selection.Candidate],
        reasons: Mapping[str, str],
        form: Form,
        sample: Any,
        trace: Trace | None,
    ) -> None:
        self.model, self.candidates, self.reasons = model, candidates, reasons
        self.form, self.sample, self.trace = form, sample, trace
        order = {name: position for position, name in enumerate(candidates)}
        # Layers tied to each other hold one weight: it is counted and decided once.
        self.leader = {n: min((n, *c.tied), key=order.__getitem__) for n, c in candidates.items()}
        self.kinds = {name: self._kind(name) for name in candidates}
        self._meters = {"flops": Meter(forward_flops), "memory": Meter(saved_bytes)}

    def chosen(self) -> dict[str, MatrixShape]:
        """The layers to decide."""
        return {n: self.kinds[n].shape for n, why in self.reasons.items() if self._leads(n, why)}

    def _leads(self, name: str, reason: str) -> bool:
        return not reason and self.leader[name] == name

    @cached_property
    def others(self) -> Others:
        """What no rank changes."""
        total = accounting.parameters(self.model)
        own = {n: self.kinds[n].shape.dense for n, first in self.leader.items() if n == first}
        learning = sum(count for name, count in own.items() if _trainable(self.candidates[name]))
        return Others(
            stored=total.stored - sum(own.values()),
            trainable=total.trainable - learning,
            flops=self._other_flops(),
        )

    def _other_flops(self) -> int | None:
        if self.trace is None:
            return None
        if self.sample is None:
            return 0
        listed = [self._work("flops", name) for name in self.candidates]
        return accounting.flops(self.model, self.sample) - sum(c.dense for c in listed if c)

    def outside(self) -> int:
        """Parameters of the model outside the layers to decide."""
        own = sum(shape.dense for shape in self.chosen().values())
        return accounting.parameters(self.model).stored - own

    def matrix(self, name: str) -> Tensor:
        """A layer's weight as what is factorised: (M, N) or (B, M, N)."""
        kind, module = self.kinds[name], self.candidates[name].module
        assert kind.stand_in is not None
        weight: Any = module.weight
        return kind.stand_in.as_matrix(weight.detach(), kind.shape.blocks)

    def costs(self, of: str, rule: Budget) -> Costs:
        """The model's costs for a budget of FLOPs or memory."""
        chosen = self.chosen()
        if of == "flops":
            if self.trace is None:
                raise PlanError(
                    f"{rule!r} counts FLOPs, and these depend on the input; give sample=, an "
                    "example batch (rankwise.start(..., sample=...) for a method)"
                )
            costs = {n: self._together(n, lambda m: self._work("flops", m)) for n in chosen}
            flops = [self._work("flops", name) for name in self.candidates]
            total = (self.others.flops or 0) + sum(c.dense for c in flops if c)
            return Costs(costs, total - sum(c.dense for c in costs.values()), "FLOPs")
        moments = rule.moments
        held = {n: self._held(n, moments) for n in chosen}
        saved = {n: self._together(n, lambda m: self._work("memory", m)) for n in chosen}
        # What dense layers save is saved by low-rank ones too: the input. It counts for neither.
        more = {n: Cost(0, c.linear, c.quadratic) for n, c in saved.items()}
        total = sum(
            p.numel() * p.element_size() * _copies(p, moments) for p in self.model.parameters()
        )
        others = total - sum(cost.dense for cost in held.values())
        return Costs({n: held[n] + more[n] for n in chosen}, others, "bytes")

    def _together(self, name: str, cost: Any) -> Cost:
        """Of a layer and those tied to it."""
        group = [n for n, first in self.leader.items() if first == name]
        return sum((cost(n) or Cost(0, 0) for n in group), Cost(0, 0))

    def _held(self, name: str, moments: int) -> Cost:
        weight: Any = self.candidates[name].module.weight
        return self.kinds[name].shape.stored * (weight.element_size() * _copies(weight, moments))

    def _work(self, of: str, name: str) -> Cost | None:
        calls = () if self.trace is None else self.trace.calls.get(name, ())
        kind, module = self.kinds[name], self.candidates[name].module
        return self._meters[of].cost(
            module, (c.input for c in calls), kind.stand_in, kind.keywords, kind.shape.full_rank
        )

    def line(self, name: str, rank: int | None, reason: str) -> LayerPlan:
        """One layer's line of the plan."""
        candidate, first = self.candidates[name], self.leader[name]
        return LayerPlan(
            name=name,
            kind=type(candidate.module).__name__,
            shape=self.kinds[name].shape,
            rank=rank,
            reason=reason,
            trainable=_trainable(candidate),
            tied="" if first == name else first,
            work=self._work("flops", name),
        )

    def _kind(self, name: str) -> _Kind:
        candidate = self.candidates[name]
        stand_in = low_rank_class(candidate.module, self.form)
        if candidate.obstacle or isinstance(stand_in, str):
            rows, columns = candidate.shape[0], math.prod(candidate.shape[1:])
            return _Kind(None, {}, MatrixShape(rows, columns))
        keywords = {}
        if not self.reasons[name]:
            try:
                keywords = self.form.keywords(name, candidate.module, stand_in)
            except PlanError as error:
                raise PlanError(f"{name} {candidate.shape}: {error}") from error
        blocks = keywords.get("blocks", stand_in.blocks_of(candidate.module))
        rows, columns = stand_in.matrix_shape(candidate.module, blocks)
        shape = MatrixShape(rows, columns, self.form.norm, self.form.core, blocks)
        return _Kind(stand_in, keywords, shape)

    def notes(self, rule: Rule, ranks: Mapping[str, int | None]) -> tuple[str, ...]:
        """What the reader should know."""
        notes = []
        if self.trace is None:
            notes.append("layers in order of definition; with sample=, in order of execution")
        elif self.sample is None:
            notes.append(
                "FLOPs are those of the layers above alone, without attention and the like"
            )
        if isinstance(rule, Budget) and rule.of == "memory":
            notes.append(self._memory(rule, ranks))
        others = selection.unlisted(self.model, self.candidates)
        if others:
            named = [f"{name} ({kind})" for name, kind in others.items()]
            more = f" and {len(named) - 4} more" if len(named) > 4 else ""
            notes.append(f"matrices with no low-rank form here: {', '.join(named[:4])}{more}")
        return tuple(notes)

    def _memory(self, rule: Budget, ranks: Mapping[str, int | None]) -> str:
        costs = self.costs(rule.of, rule)
        after = costs.others + sum(costs.layers[name].of(rank) for name, rank in ranks.items())
        codes = " and the codes saved for backward" if self.trace is not None else ""
        return (
            f"memory {costs.dense:,} -> {after:,} bytes ({after / costs.dense:.1%}): parameters, "
            f"gradients, {rule.moments} moment(s) each{codes}"
        )


def _trainable(candidate: selection.Candidate) -> bool:
    weight = candidate.module._parameters.get("weight")
    if weight is None:  # computed from other parameters
        return any(p.requires_grad for p in candidate.module.parameters())
    return weight.requires_grad


def _copies(parameter: Tensor, moments: int) -> int:
    """How many numbers training holds for each of a parameter: value, gradient, moments."""
    return 2 + moments if parameter.requires_grad else 1


def factorize(
    model: nn.Module,
    rule: Rule | Plan | Mapping[str, int] | int | float | str,
    sample: Any = None,
    *,
    init: str = "spectral",
    norm: bool = False,
    core: bool = False,
    separable: bool = False,
    split: bool | Mapping[str, int] = False,
    context: Context | None = None,
    **choice: Any,
) -> Change:
    """Make a model's layers low-rank, in place.

    Args:
        model: any model.
        rule: a rank rule (see `plan`), a plan, or a mapping of layer name -> rank.
        sample: as in `plan`.
        init: "spectral" (best approximation of the present weights), or one of `layers.INITS`
            that draw fresh factors.
        norm: BatchNorm between the factors; changes the function.
        core: three factors U C V.
        separable: 2-D convolutions as 1 x k and k x 1.
        split: fused projections in several parts (`layers.Form`).
        context: source of random numbers for random `init`; seed 0 without it.
        **choice: `layers`, `exclude`, `keep_first`, `keep_last`, `trace` as in `plan`.

    Returns:
        What changed; an optimizer that already exists follows it with `rankwise.rebind`.

    Raises:
        SelectionError: nothing selected.
        PlanError: a rank out of range, or a plan whose ranks are yet to be decided.
        FactorizeError: weights that are not finite.
        OptionError: unknown `init`, or a choice beside a plan that has made it.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
        >>> change = factorize(model, 16)
        >>> model[1]
        LowRankLinear(
          in_features=64, out_features=64, rank=16
          (v): Linear(in_features=64, out_features=16, bias=False)
          (u): Linear(in_features=16, out_features=64, bias=True)
        )
    """
    form = Form(norm=norm, core=core, separable=separable, split=split)
    if isinstance(rule, (Plan, Mapping)) and choice:
        raise OptionError(
            f"{', '.join(choice)}: the {type(rule).__name__} given has chosen the layers already; "
            "leave it out, or give a rank rule"
        )
    if isinstance(rule, Plan):
        form, ranks = _form_of(rule, form), rule.ranks
    elif isinstance(rule, Mapping):
        ranks = rule
    else:
        asked = {"norm": norm, "core": core, "separable": separable, "split": split}
        ranks = plan(model, rule, sample, **asked, **choice).ranks
    if not ranks:
        surgery.logger.warning(
            "no layer gains from low rank under this plan, so the model stays dense; rankwise.plan "
            "prints why, allow_growth=True on the rule builds it all the same"
        )
        return NO_CHANGE
    source = context or Context()

    def make(name: str, dense: nn.Module, stand_in: type[Any], rank: int) -> Any:
        keywords = form.keywords(name, dense, stand_in)
        return stand_in.from_dense(
            dense, rank, init=init, generator=source.generator(0, name), **keywords
        )

    return surgery.factorize_layers(model, ranks, make, form)


def _form_of(plan: Plan, asked: Form) -> Form:
    if plan.provisional:
        raise PlanError(f"this plan has no ranks yet: {plan.provisional}")
    for option in ("norm", "core", "separable", "split"):
        if getattr(asked, option) not in (False, getattr(plan.form, option)):
            raise OptionError(
                f"{option}={getattr(asked, option)!r}: the plan was made with "
                f"{option}={getattr(plan.form, option)!r}; make it with the one you want"
            )
    return plan.form
