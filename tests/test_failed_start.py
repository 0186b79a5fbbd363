"""A start that fails leaves model and optimizer as they were, and its methods free."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise
from rankwise import (
    LTE,
    AdaLoRA,
    Cuttlefish,
    Dense,
    Factorized,
    GaLore,
    LoRA,
    Method,
    MultiHeadGaLore,
    ReLoRA,
)
from rankwise.errors import RankwiseError
from rankwise.method import NO_CHANGE, Change


class Net(nn.Module):
    """A layer in two places, a weight in two layers, an encoder with a fast path, a hook."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.sparse = nn.Embedding(20, 16), nn.Embedding(20, 16, sparse=True)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 1, enable_nested_tensor=False
        )
        self.first, self.norm = nn.Linear(16, 24), nn.LayerNorm(24)
        self.norm.weight.requires_grad_(False)
        self.again, self.back, self.last = self.first, nn.Linear(24, 16), nn.Linear(16, 20)
        self.last.weight = self.embed.weight
        self.seen = 0
        self.back.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.seen += 1

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.back(self.norm(self.first(self.encoder(self.embed(tokens) + self.sparse(tokens)))))
        return self.last(self.back(self.again(x)))


class Fails(Method):
    """Behind all others: in its preparation, or where the optimizer is made to follow."""

    def __init__(self, where: str = "prepare") -> None:
        self.where = where

    def prepare(self, model: nn.Module) -> Change:
        if self.where == "prepare":
            raise RankwiseError("nothing fits")
        stranger = nn.Parameter(torch.zeros(1))
        return Change(added={stranger: None}) if self.where == "rebind" else NO_CHANGE  # type: ignore

    def attach(self, context: Any) -> None:
        super().attach(context)
        if self.where == "attach":
            raise RankwiseError("too short")


TOKENS = torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(1))
BLOCK = "first,back,encoder.layers.0.linear*,encoder.layers.0.self_attn*"
FAILING: dict[str, Callable[[], list[Method]]] = {
    "AdaLoRA, sparse gradients": lambda: [AdaLoRA(initial_rank=3, target_rank=2, layers="sparse")],
    "updates, then no selection": lambda: [LoRA(rank=2, layers=BLOCK), GaLore(layers="nothing*")],
    "gradients, then": lambda: [GaLore(rank=2, layers="first"), Fails()],
    "heads, then": lambda: [LTE(rank=2, heads=2, layers=BLOCK), Fails()],
    "heads of gradients, then": lambda: [MultiHeadGaLore(rank=2, layers=BLOCK), Fails()],
    "factors, then": lambda: [Factorized(0.3, layers=BLOCK), Fails()],
    "a detector, then": lambda: [Cuttlefish(layers=BLOCK), Fails()],
    "a warm-start, then": lambda: [ReLoRA(rank=2, warmup_steps=2, layers=BLOCK), Fails("rebind")],
    "an optimizer that cannot follow": lambda: [LoRA(rank=2, layers=BLOCK), Fails("rebind")],
    "options that do not fit": lambda: [LTE(rank=2, heads=2, layers=BLOCK), Fails("attach")],
}


def content(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """All that a start may change, tensors by identity."""
    modules = [
        (name, id(module), module.training, sorted(vars(module)))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    values = [
        (name, id(p), p.requires_grad, bool(p._backward_hooks), bool(p._post_accumulate_grad_hooks))
        for name, p in model.named_parameters(remove_duplicate=False)
    ]
    hooks = [
        (name, {key: dict(held) for key, held in vars(module).items() if "hooks" in key})
        for name, module in model.named_modules()
    ]
    switches = [getattr(m, "activation_relu_or_gelu", None) for m in model.modules()]
    groups = [{**g, "params": [id(p) for p in g["params"]]} for g in optimizer.param_groups]
    state = {id(p): dict(values) for p, values in optimizer.state.items()}
    step_hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return [modules, values, hooks, switches, groups, state, *map(dict, step_hooks)]


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with moments."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() == 2]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("name", FAILING)
def test_nothing_is_left_behind(name: str) -> None:
    model = Net()
    optimizer = trained(model)
    before, function = content(model, optimizer), model.eval()(TOKENS)
    model.train()
    methods = FAILING[name]()
    for _ in range(2):  # the same instances can be tried again
        with pytest.raises((RankwiseError, AttributeError)) as raised:
            rankwise.start(model, methods, optimizer, total_steps=9)
        assert "another run" not in str(raised.value)
        if name.startswith("AdaLoRA"):
            assert "sparse gradients" in str(raised.value)
    assert content(model, optimizer) == before
    torch.testing.assert_close(model.eval()(TOKENS), function, rtol=0, atol=0)
    run = rankwise.start(model.train(), Dense(), optimizer)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    assert run.step == 1


def test_a_method_of_another_run_stays_there() -> None:
    model, other = Net(), Net()
    lora = LoRA(rank=2, layers=BLOCK)
    run = rankwise.start(model, lora, trained(model))
    with pytest.raises(RankwiseError, match="already takes part in another run"):
        rankwise.start(other, [Dense(), lora], trained(other))
    model(TOKENS).square().mean().backward()
    run.optimizer.step()
    assert set(vars(run.finish().first)) == set(vars(other.first))


def test_a_resume_that_fails_leaves_the_structure_and_the_optimizer(tmp_path: Path) -> None:
    model = Net()
    run = rankwise.start(model, LoRA(rank=2, layers="first"), trained(model))
    saved = rankwise.save(tmp_path, run)
    fresh = Net()
    optimizer = trained(fresh)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    before = content(fresh, optimizer)
    with pytest.raises(RankwiseError):
        rankwise.start(fresh, LoRA(rank=2, layers="first"), optimizer, resume=saved)
    assert content(fresh, optimizer) == before
