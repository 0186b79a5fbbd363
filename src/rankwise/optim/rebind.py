"""Make an existing optimizer follow a change of the model's parameters.

Successors take their predecessor's place in its group, so the group's own learning rate and decay
hold, schedulers go on driving it, and the order stays that of `model.parameters()`. Moments are
carried over by the table below; same shape does not mean moment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adagrad, Optimizer

from rankwise.method import Change, Successors
from rankwise.optim.groups import ROLE, twin_of

# What torch's optimizers (and Lion, Muon, schedule-free ones) keep, by the name of the state:
# "first": linear in the gradients; "second": of squared gradients; "counter": numbers of steps
# and decay products; "weight": an average of the weights. Anything else is unknown.
STATE_KINDS: dict[str, str] = {
    "exp_avg": "first",
    "momentum_buffer": "first",
    "grad_avg": "first",
    "exp_avg_sq": "second",
    "max_exp_avg_sq": "second",
    "square_avg": "second",
    "sum": "second",
    "step": "counter",
    "mu_product": "counter",
    "mu": "counter",
    "eta": "counter",
    "ax": "weight",
    "z": "weight",
}


@dataclass(frozen=True)
class Rebound:
    """What became of the optimizer's state: for the record.

    Attributes:
        carried: new parameters that got the moments of their predecessor.
        fresh: new parameters that start without.
        unknown: names of states that no rule carries over; their parameters start fresh.
        outside: replaced parameters that learn and that the optimizer did not hold; nor does it
            hold their successors.
        reset: entries of moments set to zero in parameters that were rewritten in place.
    """

    carried: int = 0
    fresh: int = 0
    unknown: tuple[str, ...] = ()
    outside: int = 0
    reset: int = 0


def rebind(
    optimizer: Optimizer, change: Change, names: Mapping[Parameter, str] | None = None
) -> Rebound:
    """Replace, add, remove and reset parameters in every group, keeping order and other state.

    Args:
        optimizer: the one that holds the replaced parameters.
        change: what a method or `factorize` returned.
        names: parameter names, for optimizers built from `named_parameters()`.

    Returns:
        What was carried over and what was not.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU())
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> import rankwise
        >>> change = rankwise.factorize(model, 8, layers="0")
        >>> rebind(optimizer, change).fresh
        2
    """
    places = _Places(optimizer, names or {})
    between = _between(change)
    reports = [
        _replace(optimizer, places, old, new, between) for old, new in change.replaced.items()
    ]
    for anchor, new in change.added.items():
        places.insert(anchor, new, keep=True)
        reports.append(Rebound(fresh=len(new.parameters)))
    for parameter in change.frozen:
        places.remove(parameter)
        optimizer.state.pop(parameter, None)
        if not parameter.requires_grad:
            # The optimizer's zero_grad does not reach it any more, but clipping would count it.
            parameter.grad = None
    places.rename()
    _begin_eager_states(optimizer, change)
    reset = sum(
        forget_moments_(optimizer.state.get(p, {}), keep) for p, keep in change.rewritten.items()
    )
    unknown = sorted({name for report in reports for name in report.unknown})
    return Rebound(
        carried=sum(r.carried for r in reports),
        fresh=sum(r.fresh for r in reports),
        unknown=tuple(unknown),
        outside=sum(r.outside for r in reports),
        reset=reset,
    )


def _begin_eager_states(optimizer: Optimizer, change: Change) -> None:
    # Adagrad makes state when it is built; not every version does for a parameter that came later.
    if not isinstance(optimizer, Adagrad):
        return
    joined = {p for s in (*change.replaced.values(), *change.added.values()) for p in s.parameters}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in joined and not optimizer.state.get(parameter):
                total = torch.full_like(parameter, group["initial_accumulator_value"])
                steps = torch.zeros((), device=parameter.device if group.get("fused") else "cpu")
                optimizer.state[parameter] = {"step": steps, "sum": total.detach()}


class _Places:
    """Where each parameter sits in the optimizer's groups."""

    def __init__(self, optimizer: Optimizer, names: Mapping[Parameter, str]) -> None:
        self.groups = optimizer.param_groups
        self.names = {p: n for g in self.groups for p, n in _named(g)} | dict(names)
        self.group_of = {p: g for g in self.groups for p in g["params"]}

    def insert(self, anchor: Parameter, new: Successors, *, keep: bool) -> bool:
        """Put `new` at (or, keeping it, behind) the anchor; False where the anchor is not held."""
        group = self.group_of.get(anchor)
        if group is None and new.anywhere:
            group = next(g for g in self.groups if ROLE not in g)
        if group is None:
            return False
        inherits = new.role is None or ROLE in group
        target = group if inherits else twin_of(self.groups, group, str(new.role))
        # A frozen parameter that the optimizer holds may be thawed later; so may its successors.
        frozen = not keep and not anchor.requires_grad
        fresh = [
            p for p in new.parameters if p not in self.group_of and (p.requires_grad or frozen)
        ]
        at = len(target["params"])
        if target is group and anchor in self.group_of:
            at = _index(group, anchor) + 1
        target["params"][at:at] = fresh
        self.group_of |= dict.fromkeys(fresh, target)
        if not keep:
            self.remove(anchor)
        return True

    def remove(self, parameter: Parameter) -> None:
        group = self.group_of.pop(parameter, None)
        if group is not None:
            del group["params"][_index(group, parameter)]

    def rename(self) -> None:
        """Bring `param_names` up to date; a bias that stayed has moved to another name too."""
        for group in self.groups:
            if "param_names" in group:
                group["param_names"] = [self.names.get(p, "") for p in group["params"]]


def _named(group: Mapping[str, Any]) -> Iterable[tuple[Parameter, str]]:
    return zip(group["params"], group["param_names"], strict=True) if "param_names" in group else ()


def _index(group: Mapping[str, Any], parameter: Parameter) -> int:
    return next(i for i, p in enumerate(group["params"]) if p is parameter)


def _between(change: Change) -> set[Parameter]:
    """Successors that are replaced in their turn: parts of an opened attention, then factorised."""
    successors = {p for new in change.replaced.values() for p in new.parameters}
    return successors & change.replaced.keys()


def _replace(
    optimizer: Optimizer, places: _Places, old: Parameter, new: Successors, between: set[Parameter]
) -> Rebound:
    if not places.insert(old, new, keep=False):
        return Rebound(outside=int(old.requires_grad and old not in between))
    state = optimizer.state.pop(old, {})
    old.grad = None  # loops that kept a list of parameters must not clip by a gradient of the past
    stepped = [p for p in new.parameters if p in places.group_of and p not in between]
    if not state or new.carry is None:
        return Rebound(fresh=len(stepped))
    unknown = tuple(key for key, value in state.items() if not _carriable(key, value, old))
    if unknown:
        return Rebound(fresh=len(stepped), unknown=unknown)
    carried = carry_state(state, new, old)
    for parameter, successor_state in carried.items():
        if parameter in places.group_of:
            optimizer.state[parameter] = successor_state
    with_moments = sum(p in carried for p in stepped)
    return Rebound(carried=with_moments, fresh=len(stepped) - with_moments)


def _carriable(key: str, value: Any, old: Parameter) -> bool:
    kind = STATE_KINDS.get(key)
    if kind is None:
        return False
    if kind == "counter" or value is None:
        return True
    # Quantised and sharded states are tensor subclasses: their numbers mean something else.
    return type(value) in (Tensor, Parameter) and value.shape == old.shape


@torch.no_grad()
def carry_state(
    state: Mapping[str, Any], new: Successors, old: Parameter
) -> dict[Parameter, dict[str, Any]]:
    """Optimizer state of the successors from that of the parameter they replace.

    Args:
        state: the predecessor's, with known kinds only.
        new: the successors with their rule of carrying.
        old: the predecessor.

    Returns:
        successor -> its state; successors without counterpart are left out.
    """
    assert new.carry is not None
    gradient_mean = state.get("exp_avg", state.get("grad_avg"))
    normalised = any(STATE_KINDS[key] == "second" for key in state)
    columns: dict[str, tuple[Tensor | None, ...]] = {}
    for key, value in state.items():
        kind = STATE_KINDS[key]
        if kind == "counter" or value is None:
            continue
        if key == "momentum_buffer" and normalised:
            # RMSprop's buffer holds updates already divided by sqrt(v): not linear in G.
            columns[key] = tuple(torch.zeros_like(p) for p in new.parameters)
        elif kind == "first":
            columns[key] = new.carry.first(value)
        elif kind == "second":
            columns[key] = new.carry.second(value, gradient_mean)
        else:
            columns[key] = tuple(p.detach().clone() for p in new.parameters)
    result: dict[Parameter, dict[str, Any]] = {}
    for position, parameter in enumerate(new.parameters):
        moments = {k: m for k, column in columns.items() if (m := column[position]) is not None}
        if len(moments) < len(columns):
            continue
        own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        for key, moment in moments.items():
            # Into the parameter's own memory format, which fused optimizers expect.
            own[key] = torch.empty_like(parameter, dtype=state[key].dtype).copy_(moment)
        result[parameter] = own
    return result


@torch.no_grad()
def forget_moments_(state: Mapping[str, Any], keep: float | Tensor) -> int:
    """Zero all but a part of a parameter's moments.

    One mask serves every moment: pruning each by its own magnitude leaves entries with m != 0 and
    v == 0, which Adam turns into a step of m / eps.

    Args:
        state: one parameter's optimizer state, edited in place.
        keep: fraction of entries, 0 ... 1, the largest first moments surviving; or a mask of the
            parameter's shape, True where they survive.

    Returns:
        The number of entries set to zero, over all moments.
    """
    moments = [
        value
        for key, value in state.items()
        if STATE_KINDS.get(key) in ("first", "second") and isinstance(value, Tensor)
    ]
    if not moments or (not isinstance(keep, Tensor) and keep >= 1):
        return 0
    mask = keep if isinstance(keep, Tensor) else _largest(moments[0], keep)
    mask = mask.to(moments[0].device).view_as(moments[0])
    for moment in moments:
        moment.mul_(mask)
    return int((~mask).sum()) * len(moments)


def _largest(moment: Tensor, fraction: float) -> Tensor:
    size = moment.abs().flatten()
    mask = torch.zeros_like(size, dtype=torch.bool)
    mask[size.topk(math.floor(fraction * size.numel())).indices] = True
    return mask
