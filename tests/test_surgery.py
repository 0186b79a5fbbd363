"""Exchanging layers keeps names, ties, hooks, flags and functions; structure travels as data."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rankwise import surgery
from rankwise.closing import to_dense
from rankwise.errors import FactorizeError, OptionError, PlanError, SelectionError
from rankwise.followers import give_structure, inside
from rankwise.layers import LowRankConv2d, LowRankLinear
from rankwise.method import Change
from rankwise.ranks import Ratio, factorize, plan, present
from rankwise.selection import select, survey
from rankwise.structure import impose_plan, read_plan


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: Any, seed: int = 0) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            scale = max(1, parameter[0].numel()) ** 0.5
            parameter.copy_(noise(*parameter.shape, seed=seed + i) / scale)
    return module


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def stored(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def chain(*widths: int) -> Any:
    return filled(nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))))


class Convolutional(nn.Module):
    """Every kind of convolution, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.body = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.stem(x).relu())
        x = self.up(self.norm(self.body(x)).relu())
        return self.fc(self.last(x).relu().mean((2, 3)))


class Tied(nn.Module):
    """Two Linears with one weight and a bias each; `alias` is `first` under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(12, 12) for _ in range(3))
        self.second.weight = self.first.weight
        self.alias = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.third(self.second(self.first(x).relu()).relu()).relu())


class Language(nn.Module):
    """A head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.body = nn.Linear(12, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)))


class Own(nn.Linear):
    """A Linear whose forward is another."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


# Functions, parameters, ties


def test_full_rank_keeps_the_function_of_a_whole_network() -> None:
    model, x = filled(Convolutional()), noise(2, 3, 8, 8)
    reference = copy.deepcopy(model)
    ranks = {"stem": 8, "body": 16, "last": 8, "fc": 10}
    factorize(model, ranks)
    assert {n: type(model.get_submodule(n)) for n in ranks} == {
        "stem": LowRankConv2d,
        "body": LowRankConv2d,
        "last": LowRankConv2d,
        "fc": LowRankLinear,
    }
    same(model(x), reference(x))
    for way in (model, reference):
        way(x).square().sum().backward()
    same(model.grouped.weight.grad, reference.grouped.weight.grad, 1e-4)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_parameters_are_as_predicted_and_every_layer_is_smaller_or_left_with_a_reason(
    ratio: float, norm: bool
) -> None:
    model, x = Convolutional(), noise(1, 3, 8, 8)
    decided = plan(model, Ratio(ratio, multiple=1), x, keep_first=0, keep_last=0, norm=norm)
    dense = stored(model)
    for line in decided.layers:
        assert (line.rank is None) == bool(line.reason)
        assert line.parameters[1] < line.parameters[0] or line.rank is None
    factorize(model, decided)
    assert decided.parameters == (dense, stored(model))


def test_a_norm_between_the_factors_is_counted() -> None:
    model = chain(32, 32, 32)
    decided = plan(model, 4, norm=True, keep_first=0, keep_last=0)
    assert decided.layers[0].parameters == (1024, 4 * 64 + 2 * 4)
    factorize(model, decided)
    assert stored(model) == decided.parameters[1]


def test_tied_linears_stay_tied_with_a_bias_each() -> None:
    model = filled(Tied())
    reference, x = copy.deepcopy(model), noise(5, 12)
    change = factorize(model, {"first": 12, "second": 12})
    assert model.first.u.weight is model.second.u.weight
    assert model.first.v is model.second.v
    assert model.first.u.bias is not model.second.u.bias
    assert model.alias is model.first
    assert set(change.modules) == {"first", "second"}
    same(model(x), reference(x))
    for way in (model, reference):
        way(x).square().sum().backward()
    u, v = model.first.factors()
    gradient = reference.first.weight.grad
    same(model.first.u.weight.grad, gradient @ v.T, 1e-4)
    same(model.first.v.weight.grad, u.T @ gradient, 1e-4)


def test_tied_weights_are_counted_once() -> None:
    model = filled(Tied())
    decided = plan(model, 3, layers="first,second")
    factorize(model, decided)
    assert decided.parameters[1] == stored(model)
    assert dict(decided.ranks) == {"first": 3, "second": 3}


def test_tied_layers_return_to_one_dense_weight() -> None:
    model = filled(Tied())
    factorize(model, {"first": 3, "second": 3})
    x, before = noise(5, 12), list(model.parameters())
    expected = model(x)
    change = to_dense(model)
    same(model(x), expected)
    assert model.first.weight is model.second.weight
    assert model.alias is model.first
    successors = [p for s in change.replaced.values() for p in s.parameters]
    assert [p for p in successors if p is model.first.weight] == [model.first.weight]
    assert_follows(before, change, model)


def assert_follows(before: list[nn.Parameter], change: Change, model: nn.Module) -> None:
    """Putting successors where their predecessors were gives the model's parameters."""
    after = {
        p: None
        for q in before
        for p in (change.replaced[q].parameters if q in change.replaced else (q,))
    }
    assert {id(p) for p in after} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_every_parameter_has_a_place_in_the_optimizer_there_and_back(
    bias: bool, norm: bool
) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=bias), nn.Linear(8, 8, bias=bias))
    before = list(model.parameters())
    there = factorize(model, {"0": 2, "1": 3}, norm=norm)
    assert_follows(before, there, model)
    between = list(model.parameters())
    assert_follows(between, to_dense(model), model)


def test_one_side_of_a_tie_is_not_factorised_alone() -> None:
    model = filled(Tied())
    reasons = select(model, "second,third")
    assert reasons["second"] == "its weight is tied to first, which stays dense"
    assert reasons["third"] == ""
    with pytest.raises(FactorizeError, match=r"tied to first; factorise all of them or none"):
        factorize(model, {"second": 3})
    with pytest.raises(PlanError, match="shares its weight but not its rank"):
        factorize(model, {"first": 3, "second": 4})
    assert read_plan(model) == {}


def test_a_head_stays_tied_to_its_low_rank_embedding() -> None:
    for order in (("embedding", "head"), ("head", "embedding")):
        model = filled(Language())
        with torch.no_grad():
            model.embedding.padding_idx = 3
            model.embedding.weight[3] = 0
        reference, ids = copy.deepcopy(model), torch.arange(20).reshape(4, 5)
        change = factorize(model, dict.fromkeys(order, 12))
        assert model.head.u.weight is model.embedding.u.weight
        assert model.head.v is model.embedding.v
        assert model.embedding(torch.tensor([3])).tolist() == [[0.0] * 12]
        same(model(ids), reference(ids))
        for way in (model, reference):
            way(ids).square().sum().backward()
        u, v = model.embedding.factors()
        # The head's part of the gradient reaches the padding row, as it does in the dense model.
        gradient = reference.embedding.weight.grad
        same(model.embedding.u.weight.grad, gradient @ v.T, 1e-4)
        same(model.embedding.v.weight.grad, u.T @ gradient, 1e-4)
        assert_follows(list(reference.parameters()), Change(), reference)
        before = list(model.parameters())
        assert set(change.modules) == {"embedding", "head"}
        back = to_dense(model)
        assert model.head.weight is model.embedding.weight
        assert_follows(before, back, model)
        same(model(ids), reference(ids))


def test_an_embedding_and_its_head_are_factorised_together_or_not_at_all() -> None:
    model = filled(Language())
    decided = plan(model, 3, layers="embedding,head")
    assert dict(decided.ranks) == {"embedding": 3, "head": 3}
    dense = stored(model)
    alone = plan(model, 3, keep_first=0, keep_last=0)
    lines = {line.name: line for line in alone.layers}
    assert "an embedding" in lines["embedding"].reason
    assert lines["head"].reason == "its weight is tied to embedding, which stays dense"
    assert lines["body"].rank == 3
    for names in (["head"], ["embedding"]):
        with pytest.raises(FactorizeError, match="factorise all of them or none"):
            factorize(model, dict.fromkeys(names, 3))
    with pytest.raises(PlanError, match=r"head shares its weight but not its rank .*\(4, 3\)"):
        factorize(model, {"embedding": 3, "head": 4})
    limited = filled(Language())
    limited.embedding.max_norm = 1.0
    assert "tied to embedding (Embedding)" in survey(limited)["head"].obstacle
    factorize(model, decided)
    assert decided.parameters == (dense, stored(model))
    fresh = Language()
    impose_plan(fresh, read_plan(model))
    assert fresh.head.v is fresh.embedding.v
    fresh.load_state_dict(model.state_dict())
    ids = torch.arange(20).reshape(4, 5)
    assert torch.equal(fresh(ids), model(ids))


def test_a_weight_that_a_parent_uses_too_stays_dense() -> None:
    model = chain(8, 8, 8)
    model.register_parameter("projection", model[1].weight)
    assert "also projection" in select(model, keep_first=0, keep_last=0)["1"]
    with pytest.raises(FactorizeError, match="also projection"):
        factorize(model, {"1": 2})


def test_a_module_under_two_names_is_exchanged_once_under_both() -> None:
    shared = nn.Linear(8, 8)
    model = filled(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(8, 8))}))
    factorize(model, 2, layers="b.0")  # its second name
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], LowRankLinear)
    assert list(read_plan(model)) == ["a"]


# What survives


def test_dtype_device_flags_and_mode_survive() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = chain(8, 8, 8).to(dtype).eval()
        model[1].weight.requires_grad_(False)
        factorize(model, {"0": 2, "1": 2})
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not any(m.training for m in model.modules())
        assert [p.requires_grad for p in model[0].parameters()] == [True] * 3
        assert [p.requires_grad for p in model[1].parameters()] == [False, False, True]


def test_all_hooks_fire_once_and_their_handles_still_remove_them() -> None:
    model, fired = chain(8, 8, 8), []
    layer = model[1]
    handles = [
        layer.register_forward_hook(lambda *a: fired.append("forward")),
        layer.register_forward_pre_hook(lambda *a: fired.append("pre")),
        layer.register_forward_hook(
            lambda m, args, kwargs, y: fired.append("kwargs"), with_kwargs=True
        ),
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: fired.append("pre kwargs"), with_kwargs=True
        ),
        layer.register_forward_hook(lambda *a: fired.append("always"), always_call=True),
        layer.register_full_backward_hook(lambda *a: fired.append("backward")),
        layer.register_full_backward_pre_hook(lambda *a: fired.append("backward pre")),
    ]

    def step() -> list[str]:
        fired.clear()
        model(noise(2, 8)).sum().backward()
        return sorted(fired)

    expected = step()
    assert len(expected) == len(handles)
    factorize(model, {"1": 2})
    assert step() == expected
    to_dense(model)
    assert step() == expected
    factorize(model, {"1": 2})
    for handle in handles:
        handle.remove()
    assert step() == []


def test_a_hook_that_is_always_called_hears_of_a_failure() -> None:
    model, fired = chain(8, 8), []
    model[0].register_forward_hook(lambda *a: fired.append(1), always_call=True)
    factorize(model, {"0": 2})
    with pytest.raises(RuntimeError):
        model(noise(2, 7))
    assert fired == [1]


def test_nothing_changes_when_one_layer_fails() -> None:
    model = chain(8, 8, 8, 8)
    with torch.no_grad():
        model[2].weight[3, 4] = float("nan")
    before = list(model.parameters())
    with pytest.raises(FactorizeError, match=r"^2 \(8, 8\): 1 of 64 weights are not finite"):
        factorize(model, 2, keep_first=0, keep_last=0)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


def test_undone_shows_the_former_model_for_a_moment() -> None:
    model, x = filled(Tied()), noise(3, 12)
    before = model(x)
    change = factorize(model, {"first": 2, "second": 2})
    after = model(x)
    with surgery.undone(model, change):
        assert torch.equal(model(x), before)
        assert model.alias is model.first
    assert torch.equal(model(x), after)


# Structure as data


def test_a_plan_is_json_and_rebuilds_the_structure_on_a_fresh_model() -> None:
    model, x = filled(Convolutional()), noise(2, 3, 8, 8)
    factorize(model, {"body": 3, "fc": 2}, norm=True)
    factorize(model, {"last": 4})
    model(x)
    saved = json.loads(json.dumps(read_plan(model)))
    fresh = Convolutional()
    impose_plan(fresh, saved)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert read_plan(fresh) == read_plan(model)
    assert not impose_plan(fresh, saved)  # already so: nothing to do


def test_a_tied_structure_is_rebuilt_tied() -> None:
    model, x = filled(Tied()), noise(2, 12)
    factorize(model, {"first": 3, "second": 3})
    fresh = Tied()
    impose_plan(fresh, read_plan(model))
    fresh.load_state_dict(model.state_dict())
    assert fresh.first.v is fresh.second.v
    assert torch.equal(fresh(x), model(x))


def test_everything_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, fresh = Convolutional(), Convolutional()
    decided = plan(model, 0.5, noise(1, 3, 8, 8))
    factorize(model, decided)
    impose_plan(fresh, read_plan(model))
    assert stored(fresh) == decided.parameters[1]
    assert {t.device.type for t in fresh.state_dict().values()} == {"meta"}
    real = filled(Convolutional())
    factorize(real, decided)
    fresh.load_state_dict(real.state_dict(), assign=True)
    x = noise(1, 3, 8, 8)
    assert torch.equal(fresh.eval()(x), real.eval()(x))


SPEC = {"kind": "linear", "shape": [8, 8], "rank": 2, "norm": False}


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        ({"7": SPEC}, "another model: unknown layer '7'"),
        ({"1": SPEC | {"shape": [8, 4]}}, r"1 is \[8, 8\] here, \[8, 4\] there"),
        ({"1": SPEC | {"kind": "linaer"}}, "did you mean 'linear'"),
        ({"1": SPEC | {"kind": "conv2d"}}, "asks for .*conv2d.* builds .*linear"),
        ({"1": SPEC | {"kind": None}}, "1: the spec's kind is None"),
        ({"1": SPEC | {"rank": "x"}}, "the spec's rank is 'x'"),
        ({"1": SPEC | {"rank": 2.5}}, "the spec's rank is 2.5"),
        ({"1": SPEC | {"rank": True}}, "the spec's rank is True"),
        ({"1": SPEC | {"rank": 0}}, r"1 \(8, 8\): rank 0 .* choose 1 to 8"),
        ({"1": SPEC | {"rank": 9}}, r"rank 9 .* full rank is 8"),
        ({"1": SPEC | {"norm": "yes"}}, "the spec's norm is 'yes'"),
        ({"1": SPEC | {"shape": 8}}, "the spec's shape is 8"),
        ({"1": SPEC | {"shape": ["8", None]}}, "another model"),
        ({"1": SPEC | {"form": "separable"}}, "separable"),
        ({"1": {"kind": "linear"}}, "the spec's shape is 'missing'"),
        ({"1": {}}, "the spec's kind is 'missing'"),
        ({"1": None}, "maps kind, shape, rank, norm to values; this is None"),
        ({"1": [2]}, r"this is \[2\]"),
        ([SPEC], "this is a list"),
        (None, "this is a NoneType"),
    ],
)
def test_a_foreign_plan_is_refused_and_leaves_the_model_alone(foreign: Any, message: str) -> None:
    model = chain(8, 8, 8, 8)
    with pytest.raises(PlanError, match=message):
        impose_plan(model, foreign)
    assert read_plan(model) == {}


def test_a_plan_that_differs_from_a_low_rank_model_is_refused() -> None:
    model = chain(8, 8, 8, 8)
    factorize(model, {"1": 2})
    with pytest.raises(PlanError, match=r"1 is low-rank in the model but dense in the plan"):
        impose_plan(model, {"0": SPEC})
    with pytest.raises(
        PlanError, match=r"'norm': False.* in the model, .*'norm': True.* in the plan"
    ):
        impose_plan(model, {"1": SPEC | {"rank": 3, "norm": True}})


def test_a_plan_that_differs_in_ranks_alone_changes_them() -> None:
    model = chain(8, 8, 8, 8)
    factorize(model, {"1": 5, "2": 3})
    bias = model[1].u.bias
    change = impose_plan(model, {"1": SPEC | {"rank": 2}, "2": SPEC | {"rank": 4}})
    assert dict(present(model).ranks) == {"1": 2, "2": 4}
    assert model[1].u.bias is bias
    assert list(change.modules) == ["1", "2"]


def test_a_plan_for_a_layer_that_cannot_be_low_rank_is_of_another_model() -> None:
    spec = {"kind": "linear", "shape": [4, 4], "rank": 2, "norm": False}
    model = nn.Sequential(Own(4, 4), nn.Linear(4, 4))
    with pytest.raises(PlanError, match=r"another model: 0 .*forward of its own"):
        impose_plan(model, {"1": spec, "0": spec})
    assert type(model[1]) is nn.Linear
    one_side = {"second": SPEC | {"shape": [12, 12]}}
    with pytest.raises(PlanError, match=r"another model: second.* tied to first"):
        impose_plan(Tied(), one_side)


# The way back


@pytest.mark.parametrize("norm", [False, True])
def test_to_dense_keeps_the_function_and_leaves_plain_layers(norm: bool) -> None:
    model, x = filled(Convolutional()), noise(4, 3, 8, 8)
    kinds = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    factorize(model, {"body": 3, "last": 4, "fc": 2}, norm=norm)
    model(x)
    model.eval()
    expected = model(x)
    to_dense(model)
    same(model(x), expected)
    assert [type(m) for m in model.modules()] == kinds
    assert set(keys) <= set(model.state_dict())
    assert read_plan(model) == {}
    assert not to_dense(model)


def test_a_model_that_is_one_layer_is_wrapped_first() -> None:
    with pytest.raises(SelectionError, match=r"wrap it, e\.g\. nn\.Sequential"):
        plan(nn.Linear(8, 8), 2)
    with pytest.raises(SelectionError, match=r"call its to_dense\(\)"):
        to_dense(LowRankLinear(8, 8, 2))
    with pytest.raises(SelectionError, match="wrap it"):
        surgery.replace(nn.Linear(8, 8), "", nn.Linear(8, 8))


def test_a_follower_gets_the_structure_its_own_weights_and_the_models_basis() -> None:
    model, x = filled(Tied()), noise(4, 12)
    average = copy.deepcopy(model).requires_grad_(False)
    factorize(model, {"first": 3, "second": 3})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * noise(*p.shape, seed=9))
    target = average.first.weight.clone()
    give_structure(model, average)
    assert read_plan(average) == read_plan(model)
    assert average.first.u.weight is average.second.u.weight
    assert not any(p.requires_grad for p in average.parameters())
    assert torch.equal(average.first.v.weight, model.first.v.weight)
    # The best fit in the model's row space leaves an error orthogonal to it.
    missed = target - average.first.weight
    same(missed @ model.first.v.weight.T, torch.zeros(12, 3), 1e-4)
    to_dense(model)
    expected = average(x)
    give_structure(model, average)
    assert read_plan(average) == {}
    same(average(x), expected)


def test_a_follower_of_another_model_is_refused() -> None:
    model = chain(8, 8, 8)
    factorize(model, {"1": 2})
    with pytest.raises(PlanError, match=r"has no layer '1'"):
        inside(chain(8, 8), model)
    other = chain(8, 8, 8)
    factorize(other, {"1": 3}, norm=True)
    with pytest.raises(PlanError, match="in the copy"):
        give_structure(model, other)


def test_a_mapping_or_plan_beside_a_choice_of_layers_is_refused() -> None:
    model = chain(32, 32, 32)
    with pytest.raises(OptionError, match="layers: the dict given has chosen"):
        factorize(model, {"0": 2}, layers="1")
    with pytest.raises(OptionError, match="norm=True: the plan was made with norm=False"):
        factorize(model, plan(model, 2, layers="0"), norm=True)
    assert read_plan(model) == {}


# Parents that read weights


def encoder(layers: int = 2, **options: Any) -> Any:
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, **options)
    return filled(nn.TransformerEncoder(layer, layers))


def count_calls(layer: Any) -> list[int]:
    """Counts without a hook: a hook would by itself keep torch off the fast path."""
    calls, forward = [], layer.forward

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        return forward(x)

    layer.forward = counted
    return calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("attention", [True, False])
# The dense reference takes torch's own path through nested tensors.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_uses_the_factors_in_every_mode(
    training: bool, grad: bool, masked: bool, attention: bool
) -> None:
    model = encoder().train(training)
    reference, x = copy.deepcopy(model), noise(3, 5, 16)
    padding = torch.arange(5)[None] >= torch.tensor([5, 3, 2])[:, None]
    mask = padding if masked else None
    names = ["linear1", "linear2", *(["self_attn.out_proj"] if attention else [])]
    factorize(model, {f"layers.{i}.{name}": 16 for i in range(2) for name in names})
    calls = count_calls(model.layers[1].linear1)
    real = ~padding if masked else torch.ones(3, 5, dtype=torch.bool)
    with torch.set_grad_enabled(grad):
        y = model(x, src_key_padding_mask=mask)
        # On padded places torch's fast path returns zeros, its plain path numbers.
        same(y[real], reference(x, src_key_padding_mask=mask)[real], 2e-5)
        assert calls == [1]
        for name in names:
            factor = model.layers[0].get_submodule(name).v.weight
            factor.data.mul_(1.5)
            changed = model(x, src_key_padding_mask=mask)
            assert float((changed - y)[real].detach().abs().max()) > 1e-3
            factor.data.div_(1.5)


def test_an_encoder_layer_alone_and_a_decoder_layer_use_the_factors() -> None:
    x, memory = noise(2, 5, 16), noise(2, 4, 16, seed=1)
    for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        inputs = (x,) if kind is nn.TransformerEncoderLayer else (x, memory)
        for training in (True, False):
            model = filled(kind(16, 4, 24, dropout=0.0, batch_first=True)).train(training)
            reference = copy.deepcopy(model)
            out = [n for n, _ in model.named_modules() if n.endswith("out_proj")]
            factorize(model, dict.fromkeys(["linear1", "linear2", *out], 16))
            calls = count_calls(model.linear2)
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    same(model(*inputs), reference(*inputs), 2e-5)
            assert calls == [1, 1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_attention_with_a_low_rank_output_is_the_dense_one(training: bool, weights: bool) -> None:
    model = filled(nn.MultiheadAttention(16, 4, batch_first=True)).train(training)
    reference, x = copy.deepcopy(model), noise(2, 5, 16)
    factorize(model, {"out_proj": 16})
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = model(x, x, x, need_weights=weights)[0]
            same(y, reference(x, x, x, need_weights=weights)[0])
    model(x, x, x)[0].square().sum().backward()
    reference(x, x, x)[0].square().sum().backward()
    u, _ = model.out_proj.factors()
    same(model.out_proj.v.weight.grad, u.T @ reference.out_proj.weight.grad, 1e-4)


def test_auto_takes_the_projections_of_attention() -> None:
    model = encoder()
    decided = plan(model, 4, noise(1, 5, 16))
    reasons = {line.name: line.reason for line in decided.layers if line.reason}
    assert reasons == {
        "layers.0.self_attn.q": "among the first 1 (keep_first)",
        "layers.1.linear2": "among the last 1 (keep_last)",
    }
    dense = stored(model)
    factorize(model, decided)
    assert decided.parameters == (dense, stored(model))


def test_dense_again_an_encoder_is_back_on_its_fast_path() -> None:
    model = encoder(1).eval()
    switches = ("enable_nested_tensor", "use_nested_tensor")
    before = [getattr(model, s) for s in switches]
    factorize(model, {"layers.0.linear1": 4})
    assert not model.use_nested_tensor
    copied = copy.deepcopy(model)
    for each in (model, copied):
        to_dense(each)
        assert [getattr(each, s) for s in switches] == before
        assert each.layers[0].activation_relu_or_gelu == 1
    assert not any(name.startswith("_rankwise") for m in model.modules() for name in vars(m))
