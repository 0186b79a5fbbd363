"""What methods may ask of the optimizer, and how parameters of theirs get into it by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

import rankwise
import rankwise.optim.groups
from rankwise.errors import LifeCycleError
from rankwise.method import NO_CHANGE, Change, Method, Successors


class Undecayed(Method):
    """Gives the factors that others make a role of their own, and looks at its options."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, float, bool]] = []

    def roles(self) -> Mapping[str, Mapping[str, Any]]:
        return {"factors": {"weight_decay": 0.0}}

    def amend(self, model: nn.Module, change: Change) -> Change:
        replaced = {p: replace(s, role="factors") for p, s in change.replaced.items()}
        return replace(change, replaced=replaced)

    def lr_scale(self, step: int) -> float:
        return 0.5

    def _look(self, model: nn.Module, when: str) -> None:
        weight: Any = model.get_submodule("1")
        weight = weight.u.weight if hasattr(weight, "u") else weight.weight
        options = self.context.options
        assert options is not None
        self.seen.append(
            (
                when,
                self.context.learning_rate(weight),
                self.context.weight_decay(weight),
                options.decoupled_decay(weight),
            )
        )

    def before_step(self, model: nn.Module, step: int) -> None:
        self._look(model, "before")

    def after_step(self, model: nn.Module, step: int) -> Change:
        self._look(model, "after")
        return NO_CHANGE


class Shadowed(Method):
    """Puts a proxy in the optimizer where the second layer's weight was, as projections do."""

    provides: ClassVar[frozenset[str]] = frozenset({"shadows"})

    def _shadow(self, model: nn.Module) -> Change:
        self.weight: Parameter = model.get_submodule("1").weight  # pyright: ignore
        self.proxy = Parameter(torch.zeros(3))
        return Change(replaced={self.weight: Successors((self.proxy,))})

    def prepare(self, model: nn.Module) -> Change:
        return self._shadow(model)

    def resume(self, model: nn.Module) -> Change:
        return self._shadow(model)

    def parameter_names(self, model: nn.Module) -> Mapping[Parameter, str]:
        return {self.proxy: "1.weight (proxy)"} if hasattr(self, "proxy") else {}

    def before_step(self, model: nn.Module, step: int) -> None:
        self.proxy.grad = torch.ones(3)

    def finalize(self, model: nn.Module) -> Change:
        return Change(replaced={self.proxy: Successors((self.weight,))})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)


def step(run: rankwise.Run) -> None:
    run.optimizer.zero_grad()
    run.model(torch.ones(2, 8)).square().sum().backward()
    run.optimizer.step()


@pytest.mark.parametrize("factory", [False, True])
@pytest.mark.parametrize("method", ["from scratch", "switch"])
def test_factors_of_another_method_move_to_the_role(factory: bool, method: str) -> None:
    model = network()
    low = (
        rankwise.Factorized(ranks=2, init="spectral")
        if method == "from scratch"
        else rankwise.Pufferfish(ranks=2, warmup_steps=1)
    )
    looking = Undecayed()
    run = rankwise.start(model, [low, looking], adamw if factory else adamw(model))
    step(run)
    step(run)
    layer: Any = model[1]
    options = rankwise.optim.groups.Options(run.optimizer)
    for weight in (layer.u.weight, layer.v.weight):
        group = options.group(weight)
        assert group is not None
        assert group["weight_decay"] == 0
        origin = options.origin(weight)
        assert origin is not None
        assert origin["weight_decay"] == 0.3
    bias = options.group(layer.u.bias)
    assert bias is not None
    assert bias["weight_decay"] == 0.3
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    assert [when for when, *_ in looking.seen] == ["before", "after"] * 2
    # The rate of the step under way, with the factor on it, and the decay the user asked for.
    for _, rate, decay, decoupled in looking.seen:
        assert rate == pytest.approx(0.05)
        assert decay == 0.3
        assert decoupled


def test_decay_is_coupled_where_the_optimizer_adds_it_to_the_gradient() -> None:
    weight = Parameter(torch.zeros(2))
    options = rankwise.optim.groups.Options
    assert not options(torch.optim.SGD([weight], lr=1.0)).decoupled_decay(weight)
    assert not options(torch.optim.Adam([weight], lr=1.0)).decoupled_decay(weight)
    nadam = torch.optim.NAdam([weight], lr=1.0, decoupled_weight_decay=True)
    assert options(nadam).decoupled_decay(weight)
    assert options(torch.optim.SGD([weight], lr=1.0)).group(Parameter(torch.zeros(2))) is None


def test_what_the_optimizer_does_not_hold_has_no_rate() -> None:
    model, looking = network(), Undecayed()
    run = rankwise.start(model, looking, torch.optim.SGD(list(model[0].parameters()), lr=0.1))
    assert looking.context.learning_rate(run.bare.get_parameter("2.weight")) == 0
    assert looking.context.weight_decay(run.bare.get_parameter("2.weight")) == 0


@pytest.mark.parametrize("make", [adamw, lambda m: adamw(m)])
def test_a_proxy_is_saved_and_restored_by_name(
    make: Callable[[nn.Module], Optimizer], tmp_path: Path
) -> None:
    model = network()
    run = rankwise.start(model, Shadowed(), make(model))
    step(run)
    names = run.state_dict()["parameter_names"][0]
    assert names == ["0.weight", "0.bias", "1.weight (proxy)", "1.bias", "2.weight", "2.bias"]
    rankwise.save(tmp_path, run)
    again = network()
    method = Shadowed()
    resumed = rankwise.start(again, method, make(again), resume=tmp_path)
    assert resumed.optimizer.param_groups[0]["params"][2] is method.proxy
    assert int(resumed.optimizer.state[method.proxy]["step"]) == 1
    resumed.finish()
    held = resumed.optimizer.param_groups[0]["params"]
    assert all(a is b for a, b in zip(held, again.parameters(), strict=True))


def test_a_proxy_that_this_run_does_not_have_is_an_error(tmp_path: Path) -> None:
    model = network()
    run = rankwise.start(model, Shadowed(), adamw(model))
    step(run)
    rankwise.save(tmp_path, run)

    class Without(Shadowed):
        def resume(self, model: nn.Module) -> Change:
            return NO_CHANGE

    Without.__name__ = "Shadowed"
    again = network()
    with pytest.raises(LifeCycleError, match=r"held 1\.weight \(proxy\), which neither the model"):
        rankwise.start(again, Without(), adamw(again), resume=tmp_path)
