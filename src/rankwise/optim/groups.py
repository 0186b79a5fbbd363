"""Parameter groups of the user's optimizer: roles, what holds for a parameter, names, order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from rankwise.errors import LifeCycleError
from rankwise.method import Change

ROLE = "rankwise_role"


def open_roles(optimizer: Optimizer, roles: Mapping[str, Mapping[str, Any]]) -> None:
    """Add an empty twin of every parameter group for each role a method declared.

    Made at the start, so that a scheduler built afterwards drives them and the number of groups
    never changes. A twin has its group's options but for those the role overrides; one that an
    earlier run on this optimizer left is used again.
    """
    present = {group[ROLE]: group for group in optimizer.param_groups if ROLE in group}
    originals = [(i, g) for i, g in enumerate(optimizer.param_groups) if ROLE not in g]
    for role, options in roles.items():
        for index, group in originals:
            if f"{index}:{role}" in present:
                present[f"{index}:{role}"].update(_overrides(group, options))
                continue
            twin = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            # A learning rate kept as a tensor is stepped in place: twins must not share it.
            twin = {k: v.clone() if isinstance(v, Tensor) else v for k, v in twin.items()}
            names = {"param_names": []} if "param_names" in group else {}
            label = {ROLE: f"{index}:{role}"}
            own = _overrides(group, options)
            optimizer.add_param_group({**twin, **own, **names, **label, "params": []})


def _overrides(group: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a role says of its twin of a group; a function is asked with the group's own value."""
    own = {k: v(group[k]) if callable(v) else v for k, v in options.items()}
    if callable(options.get("lr")) and "initial_lr" in group:  # of a scheduler that is gone
        own["initial_lr"] = options["lr"](group["initial_lr"])
    return own


def held_by(optimizer: Optimizer, parameters: Iterable[Parameter]) -> int:
    """How many of the parameters the optimizer steps."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    return sum(p in held for p in parameters)


def group_names(optimizer: Optimizer, names: Mapping[Parameter, str]) -> list[list[str | None]]:
    """Names of the parameters in every group; None for one that has no name."""
    return [[names.get(p) for p in group["params"]] for group in optimizer.param_groups]


def regroup(
    optimizer: Optimizer, names: Mapping[Parameter, str], saved: Sequence[Sequence[str | None]]
) -> None:
    """Give every group the parameters that `group_names` listed, so that saved state fits by name.

    Raises:
        LifeCycleError: another number of groups, of parameters without a name, or other names.
    """
    groups = optimizer.param_groups
    if len(groups) != len(saved):
        raise LifeCycleError(
            f"the saved optimizer had {len(saved)} parameter groups, this one has {len(groups)}; "
            "build it as in the saved run"
        )
    known = {name: p for p, name in names.items()}
    missing = [n for wanted in saved for n in wanted if n is not None and n not in known]
    if missing:
        raise LifeCycleError(
            f"the saved optimizer held {missing[0]}, which neither the model nor a method of this "
            "run has; resume with the methods and options of the saved run"
        )
    for index, (group, wanted) in enumerate(zip(groups, saved, strict=True)):
        strangers = [p for p in group["params"] if p not in names]
        if len(strangers) != wanted.count(None):
            raise LifeCycleError(
                f"group {index} of the saved optimizer held {wanted.count(None)} parameters from "
                f"outside the model, this one holds {len(strangers)}; build it as in the saved run"
            )
        outside = iter(strangers)
        group["params"] = [next(outside) if name is None else known[name] for name in wanted]
        if "param_names" in group:
            group["param_names"] = [name or "" for name in wanted]


def twin_of(groups: Sequence[dict[str, Any]], group: dict[str, Any], role: str) -> dict[str, Any]:
    """The group that a role's parameters stemming from `group` belong to.

    Raises:
        LifeCycleError: the role was not declared before training.
    """
    label = f"{next(i for i, g in enumerate(groups) if g is group)}:{role}"
    for candidate in groups:
        if candidate.get(ROLE) == label:
            return candidate
    raise LifeCycleError(
        f"the optimizer has no parameter group for the role {role!r}; rankwise.start makes it "
        "from Method.roles() before training"
    )


def settle(optimizer: Optimizer, change: Change) -> None:
    """Move successors that the optimizer holds already into the group of their role.

    An optimizer that a factory built around the prepared model knows nothing of roles.
    """
    home = {p: group for group in optimizer.param_groups for p in group["params"]}
    for new in (*change.replaced.values(), *change.added.values()):
        for parameter in new.parameters:
            group = home.get(parameter)
            if new.role is None or group is None or ROLE in group:
                continue
            target = twin_of(optimizer.param_groups, group, new.role)
            at = next(i for i, p in enumerate(group["params"]) if p is parameter)
            target["params"].append(group["params"].pop(at))
            home[parameter] = target  # another method may name it once more
            if "param_names" in group:
                target["param_names"].append(group["param_names"].pop(at))


class Options:
    """What the optimizer's groups say of a parameter, looked up in a table that follows changes."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups: list[dict[str, Any]] = []
        self._decoupled = _always_decoupled(optimizer)
        self._home: dict[Parameter, dict[str, Any]] = {}
        self._count = -1

    def group(self, parameter: Parameter) -> dict[str, Any] | None:
        """The parameter's own group; None if the optimizer does not hold it."""
        groups = self._optimizer.param_groups  # load_state_dict makes new ones
        count = sum(len(group["params"]) for group in groups)
        if groups is not self._groups or count != self._count or parameter not in self._home:
            self._home = {p: group for group in groups for p in group["params"]}
            self._groups, self._count = groups, count
        return self._home.get(parameter)

    def origin(self, parameter: Parameter) -> dict[str, Any] | None:
        """The group that a parameter's role group is a twin of; its own group without a role."""
        group = self.group(parameter)
        if group is None or ROLE not in group:
            return group
        return self._groups[int(group[ROLE].partition(":")[0])]

    def state(self, parameter: Parameter) -> dict[str, Any]:
        """The optimizer's live state of a parameter: moments, to be edited in place."""
        return self._optimizer.state.get(parameter, {})

    def decoupled_decay(self, parameter: Parameter) -> bool:
        """Whether weight decay acts on the weight itself, as in AdamW (1711.05101)."""
        group = self.group(parameter) or {}
        return bool(group.get("decoupled_weight_decay", self._decoupled))


def _always_decoupled(optimizer: Optimizer) -> bool:
    name = type(optimizer).__name__.lower()
    return any(part in name for part in ("adamw", "lion", "muon", "adan", "sophia")) or bool(
        getattr(optimizer, "is_adamw", False)
    )
