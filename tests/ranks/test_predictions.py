"""What the plan predicts is what a count of the built model finds, for every kind and form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise import accounting
from rankwise.errors import PlanError
from rankwise.ranks import Budget, Fixed, Plan, Ratio, factorize, plan, present


class Convolutions(nn.Module):
    """Every kind of convolution, in one to three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 24, (3, 5), stride=(2, 1), padding=(1, 2), dilation=1)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=3)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.up = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.line = nn.Conv1d(16, 20, 3, padding=1)
        self.fc = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.grouped(self.wide(self.down(x).relu()).relu()))
        return self.fc(self.line(self.up(x).flatten(2)).mean(2))


class Language(nn.Module):
    """Embedding tied to the head, fused projection, a layer used twice and one never used."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(60, 24)
        self.qkv = nn.Linear(24, 72)
        self.out = nn.Linear(24, 24, bias=False)
        self.mix = nn.Linear(24, 24)
        self.again = self.mix
        self.unused = nn.Linear(24, 40)
        self.head = nn.Linear(24, 60, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return self.head(self.again(self.mix(x)))


class Attention(nn.Module):
    """nn.MultiheadAttention between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).mean(1))


def frozen_in_part() -> nn.Module:
    model = Convolutions()
    for layer in (model.wide, model.up, model.fc):
        layer.requires_grad_(False)
    return model


IMAGE, TOKENS = torch.zeros(2, 3, 8, 8), torch.zeros(2, 7, dtype=torch.long)
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "convolutions": (Convolutions, IMAGE),
    "language": (Language, TOKENS),
    "attention": (Attention, torch.zeros(2, 7, 24)),
    "frozen in part": (frozen_in_part, IMAGE),
    "bfloat16": (lambda: Language().bfloat16(), TOKENS),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"norm": True},
    "core": {"core": True},
    "separable": {"separable": True},
    "split": {"split": {"qkv": 3}},
    "all": {"norm": True, "core": True, "separable": True, "split": True},
}


def both(model: str, form: str) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    build, sample = MODELS[model]
    options = dict(FORMS[form])
    if model == "attention" and form == "split":
        options = {"split": True}
    if model in ("convolutions", "frozen in part") and form == "split":
        options = {"split": False}
    return build(), sample, options


def counted(model: nn.Module, x: Tensor, decided: Plan) -> None:
    found = accounting.parameters(model)
    assert decided.parameters[1] == found.stored
    assert decided.trainable[1] == found.trainable
    assert decided.flops is not None
    assert decided.flops[1] == accounting.flops(model, x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", [Ratio(0.3, multiple=1), Fixed(2, allow_growth=True)], ids=repr)
def test_parameters_and_flops_after_are_as_predicted(name: str, form: str, rule: Any) -> None:
    model, x, options = both(name, form)
    decided = plan(model, rule, x, layers="*", **options)
    before = accounting.parameters(model)
    assert decided.parameters[0] == before.stored
    assert decided.trainable[0] == before.trainable
    assert decided.flops is not None
    assert decided.flops[0] == accounting.flops(model, x)
    assert len(decided.ranks) >= 2
    factorize(model, decided)
    counted(model, x, decided)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_on_the_meta_device_is_that_of_the_real_model(name: str) -> None:
    model, x, options = both(name, "all")
    hollow = copy.deepcopy(model).to("meta")
    if name in ("language", "bfloat16"):
        hollow.get_submodule("head").weight = hollow.get_submodule("token").weight
    for rule in (Ratio(0.3, multiple=1), Budget(0.95, multiple=1), Budget(0.95, of="flops")):
        asked = {"layers": "*", **options}
        assert plan(hollow, rule, x, **asked) == plan(model, rule, x, **asked)
    factorize(hollow, plan(hollow, 2, layers="*", **options))
    assert all(p.is_meta for p in hollow.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_the_plan_of_a_low_rank_model_is_read_from_it(name: str, form: str) -> None:
    model, x, options = both(name, form)
    decided = plan(model, Ratio(0.3, multiple=1), x, layers="*", **options)
    factorize(model, decided)
    found = present(model)
    assert found.ranks == decided.ranks
    assert found.parameters == decided.parameters
    assert found.trainable == decided.trainable
    lines = {layer.name: layer for layer in decided.layers}
    for layer in found.layers:
        if layer.rank is not None:
            assert layer.shape == lines[layer.name].shape
            assert layer.break_even == lines[layer.name].break_even


def test_a_fused_projection_in_parts_has_ranks_and_break_even_of_a_part() -> None:
    lines = {n.name: n for n in plan(Language(), 4, layers="qkv", split=True).layers}
    assert (lines["qkv"].rows, lines["qkv"].columns, lines["qkv"].shape.blocks) == (24, 24, 3)
    assert lines["qkv"].parameters == (72 * 24, 3 * 4 * 48)
    assert str(lines["qkv"].shape) == "3 of 24×24"
    whole = {n.name: n for n in plan(Language(), 4, layers="qkv").layers}["qkv"]
    assert (whole.rows, whole.columns, whole.parameters[1]) == (72, 24, 4 * 96)


def test_parts_that_do_not_divide_a_layer_name_it() -> None:
    with pytest.raises(PlanError, match=r"^qkv \(72, 24\): blocks=5 does not divide"):
        plan(Language(), 4, layers="qkv", split={"qkv": 5})


def test_a_tied_weight_counts_once_and_its_layers_get_one_rank() -> None:
    decided = plan(Language(), 4, TOKENS, layers="token,head")
    token, head = (next(n for n in decided.layers if n.name == name) for name in ("token", "head"))
    assert (token.tied, head.tied) == ("", "token")
    assert token.parameters == head.parameters == (60 * 24, 4 * 84)
    before, after = decided.parameters
    assert before - after == 60 * 24 - 4 * 84
    assert token.flops == (0, 2 * 14 * 4 * 24)
    assert head.flops == (2 * 14 * 60 * 24, 2 * 14 * 4 * 84)


def test_a_layer_called_twice_works_twice_and_is_stored_once() -> None:
    decided = plan(Language(), 4, TOKENS, layers="mix")
    mix = next(layer for layer in decided.layers if layer.name == "mix")
    assert mix.flops == (2 * 2 * 14 * 24 * 24, 2 * 2 * 14 * 4 * 48)
    assert "again" not in {layer.name for layer in decided.layers}
    assert decided.parameters[0] - decided.parameters[1] == 24 * 24 - 4 * 48


def test_trainable_parameters_are_shown_where_they_differ() -> None:
    model = frozen_in_part()
    decided = plan(model, Ratio(0.3, multiple=1), IMAGE, layers="wide,grouped")
    assert decided.trainable[0] < decided.parameters[0]
    saved = decided.parameters[0] - decided.parameters[1]
    grouped = next(n for n in decided.layers if n.name == "grouped").parameters
    assert decided.trainable[0] - decided.trainable[1] == grouped[0] - grouped[1] < saved
    assert ", trainable " in decided.summary()
    assert ", trainable " not in plan(Convolutions(), 2, layers="wide").summary()


# Budgets, recounted on the model that comes out


def training_bytes(model: nn.Module, x: Tensor, moments: int) -> int:
    """Of parameters with gradients and moments, and everything saved for the backward pass."""
    held = sum(
        p.numel() * p.element_size() * (2 + moments if p.requires_grad else 1)
        for p in model.parameters()
    )
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = model.train()(x)
        assert result.requires_grad
    return held + sum(t.untyped_storage().nbytes() for t in kept.values())


class Plain(nn.Module):
    """Layers whose codes alone are saved beyond what the dense model saves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 24, 3, padding=1)
        self.deep = nn.Conv2d(24, 24, 3, padding=1)
        self.fc = nn.Linear(24, 40)
        self.last = nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.conv(x).tanh()).tanh().flatten(2).mT
        return self.last(self.fc(x).tanh()).sum()


SMALL = torch.zeros(2, 4, 6, 6)


@pytest.mark.parametrize("fraction", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("form", ["plain", "core", "separable", "norm"])
def test_a_budget_of_memory_holds_for_the_model_that_comes_out(fraction: float, form: str) -> None:
    rule = Budget(fraction, of="memory", multiple=1, moments=1)
    torch.manual_seed(0)
    model = Plain()
    activations = training_bytes(copy.deepcopy(model), SMALL, 1) - 12 * parameters(model)
    dense = 12 * parameters(model)
    decided = plan(model, rule, SMALL, layers="*", **FORMS[form])
    spent = after(model, decided) - activations
    assert spent <= fraction * dense
    assert f"memory {dense:,} -> {spent:,} bytes" in "\n".join(decided.notes)
    steps = [
        after(model, decided.with_ranks({name: rank + 1})) - activations - spent
        for name, rank in decided.ranks.items()
        if rank + 1 < next(n for n in decided.layers if n.name == name).break_even
    ]
    assert steps
    assert int(fraction * dense) - spent < min(steps)


def parameters(model: nn.Module) -> int:
    return accounting.parameters(model).stored


def after(model: nn.Module, decided: Plan) -> int:
    low = copy.deepcopy(model)
    factorize(low, decided)
    return training_bytes(low, SMALL, 1)


def test_a_budget_of_memory_without_a_sample_leaves_activations_out() -> None:
    with_codes = plan(Plain(), Budget(0.5, of="memory", multiple=1), SMALL, layers="*")
    without = plan(Plain(), Budget(0.5, of="memory", multiple=1), layers="*")
    assert without.parameters[1] > with_codes.parameters[1]
    assert without.parameters[1] <= 0.5 * without.parameters[0]
    assert "codes" in "\n".join(with_codes.notes)
    assert "codes" not in "\n".join(without.notes)


def test_frozen_weights_have_neither_gradient_nor_moments_in_memory() -> None:
    model = Plain().requires_grad_(False)
    model.last.requires_grad_(True)
    decided = plan(model, Budget(0.9, of="memory", multiple=1), SMALL, layers="*")
    frozen = parameters(model) - parameters(model.last)
    assert f"memory {4 * (frozen + 4 * parameters(model.last)):,} ->" in "\n".join(decided.notes)


@pytest.mark.parametrize("fraction", [0.5, 0.75, 0.95])
@pytest.mark.parametrize("name", MODELS)
def test_a_budget_of_flops_holds_for_the_model_that_comes_out(name: str, fraction: float) -> None:
    model, x, options = both(name, "all")
    rule = Budget(fraction, of="flops", multiple=1)
    dense = accounting.flops(model, x)
    try:
        decided = plan(model, rule, x, layers="*", **options)
    except PlanError as error:
        assert "FLOPs is out of reach" in str(error)  # noqa: PT017
        return
    steps = [decided.with_ranks(step).flops for step in next_steps(decided)]
    factorize(model, decided)
    spent = accounting.flops(model, x)
    assert spent <= fraction * dense
    assert steps
    assert all(flops and int(fraction * dense) < flops[1] for flops in steps)


def next_steps(decided: Plan) -> list[dict[str, int | None]]:
    """The next allowed rank of every layer, or dense above the last that saves work and numbers."""
    steps: list[dict[str, int | None]] = []
    for line in decided.layers:
        if line.rank is not None and line.work is not None and not line.tied:
            raised = line.rank + 1
            saves = raised < line.break_even and line.work.at(raised) < line.work.dense
            steps.append({line.name: raised if saves else None})
    return steps


def test_attention_between_tokens_is_work_that_no_rank_changes() -> None:
    decided = plan(Attention(), Budget(0.9, of="flops", multiple=1), torch.zeros(2, 7, 24))
    products = 2 * 2 * 2 * 4 * 7 * 7 * 6  # scores and values: 2 sequences, 4 heads of 6
    assert decided.others.flops == products


def test_a_budget_of_flops_needs_to_know_the_input() -> None:
    with pytest.raises(PlanError, match=r"of='flops'.*give sample="):
        plan(Plain(), Budget(0.5, of="flops"), layers="*")


def test_a_trace_alone_gives_the_work_of_the_layers_listed() -> None:
    model = Attention()
    x = torch.zeros(2, 7, 24)
    decided = plan(model, Budget(0.6, of="flops"), trace=accounting.trace(model, x), layers="*")
    assert any("of the layers above alone" in note for note in decided.notes)
    assert decided.flops is not None
    assert decided.flops[1] <= 0.6 * decided.flops[0]
    assert decided.flops[0] < accounting.flops(model, x)


def test_dense_layers_that_were_not_chosen_count_in_every_budget() -> None:
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(4)))
    x = torch.zeros(3, 48)
    numbers = plan(model, Budget(0.6, multiple=1), x, layers="0,1").parameters
    work = plan(model, Budget(0.6, of="flops", multiple=1), x, layers="0,1").flops
    assert work is not None
    for before, now in (numbers, work):
        assert 0.6 - 1 / 96 < now / before <= 0.6
