"""Attentions are opened where a projection becomes low-rank, and closed again; all else follows."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import rankwise
from rankwise import accounting, surgery
from rankwise.candidates import survey
from rankwise.closing import to_dense
from rankwise.errors import FactorizeError, PlanError, SelectionError
from rankwise.followers import give_structure, inside
from rankwise.layers import LowRankLinear, OpenAttention
from rankwise.optim.rebind import rebind
from rankwise.ranks import factorize, plan
from rankwise.selection import select
from rankwise.structure import impose_plan, read_plan

E, H = 16, 4


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: Any, seed: int = 0) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            scale = max(1, parameter[0].numel()) ** 0.5
            parameter.copy_(noise(*parameter.shape, seed=seed + i) / scale)
    return module


def same(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Block(nn.Module):
    """Self-attention, cross-attention of other widths, and a linear layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(E, H, batch_first=True, **options)
        self.cross = nn.MultiheadAttention(E, H, kdim=6, vdim=10, batch_first=True)
        self.out = nn.Linear(E, E)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = x + self.own(x, x, x, need_weights=False)[0]
        return self.out(x + self.cross(x, k, v)[0])


INPUTS = (noise(2, 5, E), noise(2, 7, 6, seed=1), noise(2, 7, 10, seed=2))
FULL = {
    **{f"own.{part}": E for part in ("q", "k", "v", "out_proj")},
    **{"cross.q": E, "cross.k": 6, "cross.v": 10, "cross.out_proj": E},
}


def stored(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Listed without being touched


def test_projections_are_listed_in_order_and_the_model_is_not_touched() -> None:
    model = filled(Block())
    before = {name: p for name, p in model.named_parameters()}
    values = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    candidates = survey(model)
    assert list(candidates) == [*FULL, "out"]
    assert candidates["cross.v"].shape == (E, 10)
    assert candidates["own.k"].home == "own"
    weight: Any = candidates["own.k"].module.weight
    assert weight.data_ptr() == model.own.in_proj_weight[E:].data_ptr()
    decided = plan(model, 3, INPUTS, keep_first=0, keep_last=0)
    assert [line.name for line in decided.layers] == [*FULL, "out"]
    assert all(line.flops is not None and line.flops[0] > 0 for line in decided.layers)
    assert dict(model.named_parameters()) == before
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(values[n], t) for n, t in model.state_dict().items())


def test_flops_are_counted_as_they_will_be() -> None:
    model = filled(Block())
    decided = plan(model, 3, INPUTS, keep_first=0, keep_last=0)
    assert decided.flops is not None
    factorize(model, decided)
    assert accounting.flops(model, INPUTS) == decided.flops[1]


def test_the_input_projections_may_be_one_matrix() -> None:
    model, reference = filled(Block()), filled(Block())
    assert list(survey(model, layers="own.in_proj")) == ["own.in_proj", *list(FULL)[3:], "out"]
    decided = plan(model, 5, layers="*.in_proj, out")
    assert dict(decided.ranks) == {"own.in_proj": 5, "out": 5}
    dense = stored(model)
    factorize(copy_of := copy.deepcopy(model), decided)
    assert decided.parameters == (dense, stored(copy_of))
    factorize(model, {"own.in_proj": E})
    assert isinstance(model.own, OpenAttention)
    assert model.own.fused
    same(model(*INPUTS), reference(*INPUTS))
    fresh = Block()
    impose_plan(fresh, json.loads(json.dumps(read_plan(model))))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(*INPUTS), model(*INPUTS))
    to_dense(model)
    same(model.state_dict(), reference.state_dict())
    with pytest.raises(SelectionError, match=r"'cross.in_proj' matches none"):
        select(model, "cross.in_proj")
    with pytest.raises(SelectionError, match=r"unknown layer 'own\.q'"):
        factorize(model, {"own.in_proj": 4, "own.q": 4})


def test_only_attentions_with_a_low_rank_layer_are_opened() -> None:
    model = filled(Block())
    factorize(model, {"own.k": 4, "out": 4})
    assert isinstance(model.own, OpenAttention)
    assert isinstance(model.own.k, LowRankLinear)
    assert type(model.own.q) is nn.Linear
    assert type(model.cross) is nn.MultiheadAttention
    # What stayed dense in the opened one is a candidate still, and opens nothing.
    assert "own.q" in survey(model)
    assert survey(model)["own.q"].home == ""
    change = factorize(model, {"own.q": 4})
    assert set(change.modules) == {"own.q"}


def test_a_predicate_sees_the_projections_as_layers() -> None:
    reasons = select(Block(), lambda name, module: getattr(module, "in_features", 0) == 6)
    assert [name for name, reason in reasons.items() if not reason] == ["cross.k"]


# The function


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_keeps_the_function_and_the_gradients(training: bool, bias: bool) -> None:
    model = filled(Block(bias=bias)).train(training)
    reference = copy.deepcopy(model)
    factorize(model, FULL)
    for way in (model, reference):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                y = way(*INPUTS)
                same(y, reference(*INPUTS))
        way(*INPUTS).square().sum().backward()
    parts = reference.own.in_proj_weight.grad.chunk(3)
    for name, gradient in zip("qkv", parts, strict=True):
        layer: Any = model.own.get_submodule(name)
        u, v = layer.factors()
        same(layer.u.weight.grad, gradient @ v.T, 1e-4)
        same(layer.v.weight.grad, u.T @ gradient, 1e-4)


PADDING = torch.arange(5)[None] >= torch.tensor([5, 3, 2])[:, None]
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)


@pytest.mark.parametrize("masked", ["none", "padding", "causal", "both"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
# The dense reference warns of its own mask types and of not taking its fast path.
@pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_whole_encoders_and_decoders_keep_their_function(
    batch_first: bool, norm_first: bool, masked: str
) -> None:
    options: Any = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    model = filled(nn.Transformer(E, H, 2, 2, 24, **options))
    reference = copy.deepcopy(model)
    ranks = dict.fromkeys([n for n in survey(model) if "attn" in n], E)
    assert len(ranks) == 4 * 6
    factorize(model, ranks)
    source, target = noise(3, 5, E), noise(3, 4, E, seed=1)
    masks: dict[str, Any] = {}
    if masked in ("padding", "both"):
        masks |= {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    if masked in ("causal", "both"):
        masks |= {"src_mask": CAUSAL, "tgt_mask": CAUSAL[:4, :4], "tgt_is_causal": True}
    given = (source, target) if batch_first else (source.transpose(0, 1), target.transpose(0, 1))
    for training in (True, False):
        for grad in (True, False):
            model.train(training)
            reference.train(training)
            with torch.set_grad_enabled(grad):
                same(model(*given, **masks), reference(*given, **masks), 5e-5)


def test_factors_of_an_opened_attention_are_used_in_evaluation() -> None:
    layer = nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True)
    model = filled(nn.TransformerEncoder(layer, 2)).eval()
    factorize(model, {"layers.0.self_attn.v": 4})
    x = noise(2, 5, E)
    with torch.no_grad():
        before = model(x, src_key_padding_mask=PADDING[:2])
        model.layers[0].self_attn.v.v.weight.mul_(1.5)
        after = model(x, src_key_padding_mask=PADDING[:2])
    assert float((after - before).abs().max()) > 1e-3


# The way back, and structure as data


@pytest.mark.parametrize("rank", [3, 6])
def test_dense_again_it_is_a_plain_attention_of_the_same_function(rank: int) -> None:
    model = filled(Block())
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    factorize(model, dict.fromkeys(FULL, rank))
    expected, before = model(*INPUTS), list(model.parameters())
    change = to_dense(model)
    same(model(*INPUTS), expected)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds
    assert read_plan(model) == {}
    optimizer = torch.optim.SGD(before, 0.1)
    rebind(optimizer, change)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))


def test_a_plan_opens_the_attentions_of_a_fresh_model() -> None:
    model = filled(Block())
    factorize(model, {"own.q": 3, "cross.k": 2}, norm=True)
    factorize(model, {"own.out_proj": 4})
    model(*INPUTS)
    saved = json.loads(json.dumps(read_plan(model)))
    assert list(saved) == ["own", "own.q", "own.out_proj", "cross", "cross.k"]
    fresh = Block()
    change = impose_plan(fresh, saved)
    assert set(change.modules) == set(saved)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(*INPUTS), model.eval()(*INPUTS))
    assert read_plan(fresh) == read_plan(model)
    assert not impose_plan(fresh, saved)


SPEC = {"kind": "attention", "shape": [E, E, E], "heads": H, "fused": False}
LAYER = {"kind": "linear", "shape": [E, E], "rank": 2, "norm": False}


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        ({"own": SPEC | {"shape": [8, 8, 8]}}, r"another model: own is .*16.* here, .*8.* there"),
        ({"own": SPEC | {"heads": 2}}, "another model: own is"),
        ({"own": SPEC | {"fused": 1}}, "the spec's fused is 1"),
        ({"own": SPEC | {"heads": "4"}}, "the spec's heads is '4'; .*'kind': 'attention'"),
        ({"owm": SPEC}, "unknown attention 'owm'; did you mean 'own'"),
        ({"out": SPEC}, "unknown attention 'out'"),
        ({"cross": SPEC | {"shape": [E, 6, 10], "fused": True}}, "cannot be fused"),
        ({"own": SPEC, "own.p": LAYER}, "unknown layer 'own.p'"),
        ({"own": SPEC, "own.q": LAYER | {"rank": 99}}, "rank 99"),
        ({"own": SPEC, "own.in_proj": LAYER}, "unknown layer 'own.in_proj'"),
    ],
)
def test_a_foreign_plan_leaves_attentions_shut(foreign: Any, message: str) -> None:
    model = filled(Block())
    before = dict(model.named_parameters())
    with pytest.raises(PlanError, match=message):
        impose_plan(model, foreign)
    assert type(model.own) is nn.MultiheadAttention
    assert dict(model.named_parameters()) == before


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nothing_is_opened_when_a_layer_fails() -> None:
    layer = nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True)
    model = filled(nn.TransformerEncoder(layer, 2))
    fired = []
    handle = model.layers[0].self_attn.register_forward_hook(lambda *a: fired.append(1))
    with torch.no_grad():
        model.layers[1].self_attn.in_proj_weight[2 * E + 1, 3] = float("inf")
    before = dict(model.named_parameters())
    name = "layers.1.self_attn.v"
    with pytest.raises(FactorizeError, match=rf"^{name} \(16, 16\): 1 of 256 weights are not"):
        factorize(model, {"layers.0.self_attn.q": 2, name: 2})
    assert dict(model.named_parameters()) == before
    assert model.use_nested_tensor
    assert model.layers[0].activation_relu_or_gelu == 1
    model.train()(noise(2, 5, E))
    assert fired == [1]
    factorize(model, {"layers.0.self_attn.q": 2})
    model(noise(2, 5, E))
    assert fired == [1, 1]
    handle.remove()
    model(noise(2, 5, E))
    assert fired == [1, 1]


def test_undone_shuts_and_opens_again() -> None:
    model = filled(Block())
    dense = model(*INPUTS)
    change = factorize(model, {"own.q": 3, "out": 3})
    opened, expected = model.own, model(*INPUTS)
    with surgery.undone(model, change):
        assert type(model.own) is nn.MultiheadAttention
        assert not hasattr(model.own, "q")
        assert torch.equal(model(*INPUTS), dense)
    assert model.own is opened
    assert isinstance(model.own.q, LowRankLinear)
    assert torch.equal(model(*INPUTS), expected)
    change = to_dense(model)
    after = model(*INPUTS)
    with surgery.undone(model, change):
        assert torch.equal(model(*INPUTS), expected)
    assert torch.equal(model(*INPUTS), after)


def test_an_attention_under_two_names_is_opened_once_under_both() -> None:
    shared = filled(nn.MultiheadAttention(E, H))
    model: Any = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    factorize(model, 2, layers="b.c.k")
    assert model["a"] is model["b"]["c"]
    assert list(read_plan(model)) == ["a", "a.k"]


# What follows: optimizers, averages, runs


def stepped(model: Any, kind: Any, **options: Any) -> Any:
    optimizer = kind(model.parameters(), **options)
    for _ in range(3):
        optimizer.zero_grad()
        model(*INPUTS).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("named", [False, True])
def test_moments_are_cut_with_the_weight_and_carried_to_the_factors(named: bool) -> None:
    model = filled(Block())
    parameters = model.named_parameters() if named else model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(*INPUTS).square().mean().backward()
        optimizer.step()
    packed, bias = model.own.in_proj_weight, model.own.in_proj_bias
    state, of_bias = dict(optimizer.state[packed]), dict(optimizer.state[bias])
    change = factorize(model, {"own.v": 4})
    report = rebind(optimizer, change, {p: n for n, p in model.named_parameters()})
    own: Any = model.own
    assert torch.equal(optimizer.state[own.k.weight]["exp_avg_sq"], state["exp_avg_sq"][E : 2 * E])
    assert torch.equal(optimizer.state[own.q.weight]["exp_avg"], state["exp_avg"][:E])
    assert torch.equal(optimizer.state[own.v.u.bias]["exp_avg"], of_bias["exp_avg"][2 * E :])
    assert optimizer.state[own.v.u.bias]["step"] == 3
    u, v = own.v.factors()
    gradient = state["exp_avg"][2 * E :]
    same(optimizer.state[own.v.u.weight]["exp_avg"], gradient @ v.T)
    same(optimizer.state[own.v.v.weight]["exp_avg"], u.T @ gradient)
    # Two dense weights, two factors and three biases; the cut part between them counts nowhere.
    assert (report.carried, report.fresh, report.outside) == (7, 0, 0)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    assert set(optimizer.state) == set(held)
    if named:
        names = {n for g in optimizer.param_groups for n in g["param_names"]}
        assert names == {n for n, _ in model.named_parameters()}


def test_counts_of_a_change_leave_out_what_is_replaced_in_between() -> None:
    model = filled(Block())
    dense = stored(model)
    change = factorize(model, {"own.q": 3, "own.v": 3})
    assert change.growth() == stored(model) - dense
    assert set(change.joined()) <= set(model.parameters())
    other = torch.optim.SGD(Block().out.parameters(), 0.1)
    # The packed weight and bias are outside; their parts were never asked for.
    assert rebind(other, change).outside == 2


def test_opening_alone_changes_no_step_of_the_optimizer() -> None:
    model, reference = filled(Block()), filled(Block())
    pair = []
    for way in (model, reference):
        # Not Adam: it blows up the rounding errors in the gradient of a key's bias, which is zero.
        optimizer = stepped(way, torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
        if way is model:
            rebind(optimizer, surgery.open_homes(model, {"own": False, "cross": False}))
        pair.append(optimizer)
    for way, optimizer in zip((model, reference), pair, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            way(*INPUTS).square().mean().backward()
            optimizer.step()
    to_dense(model)
    same(model.state_dict(), reference.state_dict())


def test_an_average_follows_an_opened_attention_there_and_back() -> None:
    model = filled(Block())
    average = copy.deepcopy(model).requires_grad_(False)
    change = factorize(model, {"own.q": E, "own.out_proj": 4})
    expected = average(*INPUTS)
    give_structure(model, average, change.modules)
    assert inside(average, model) is average
    assert read_plan(average) == read_plan(model)
    assert torch.equal(average.own.q.v.weight, model.own.q.v.weight)
    assert not any(p.requires_grad for p in average.parameters())
    to_dense(model)
    kept = average(*INPUTS)
    give_structure(model, average)
    assert type(average.own) is nn.MultiheadAttention
    same(average(*INPUTS), kept)
    twin = copy.deepcopy(model)
    factorize(model, {"own.k": E})
    give_structure(model, twin)
    same(twin(*INPUTS), model(*INPUTS))
    assert expected.shape == kept.shape
    surgery.open_homes(model, {"cross": False})  # nothing in it is low-rank
    give_structure(model, twin)
    assert read_plan(twin) == read_plan(model)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_run_opens_attentions_at_its_switch_and_resumes(kind: Any, tmp_path: Any) -> None:
    def begin(**options: Any) -> tuple[Any, Any, Any]:
        model = filled(Block())
        optimizer = kind(model.parameters(), lr=0.01)
        method = rankwise.Pufferfish(ranks=4, warmup_steps=3, layers="own.*,cross.k")
        average = copy.deepcopy(model)
        run = rankwise.start(
            model,
            method,
            optimizer,
            sample=INPUTS,
            probe=lambda m: m(*INPUTS).detach().mean(),
            **options,
        )
        run.follow(average)
        return run, optimizer, average

    def steps(run: Any, optimizer: Any, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            run.model(*INPUTS).square().mean().backward()
            optimizer.step()

    run, optimizer, average = begin()
    steps(run, optimizer, 5)
    event = next(e for e in run.events if e["event"] == "switch")
    before, after = event["parameters"]
    assert after == stored(run.bare) < before == stored(Block())
    assert read_plan(average) == read_plan(run.bare)
    rankwise.save(tmp_path, run)
    steps(run, optimizer, 2)
    again, second, _ = begin(resume=tmp_path)
    steps(again, second, 2)
    for name, value in run.bare.state_dict().items():
        assert torch.equal(value, again.bare.state_dict()[name])
    run.finish()
    again.finish()


# What stays shut


class Own(nn.MultiheadAttention):
    """An attention with a forward of its own."""

    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **options)


def test_attentions_that_stay_shut_say_why() -> None:
    model = filled(
        nn.ModuleDict({n: nn.MultiheadAttention(E, H) for n in ("tied", "twin", "patched", "int")})
    )
    model["twin"].in_proj_weight = model["tied"].in_proj_weight
    model["patched"].forward = model["patched"].forward
    model["int"].in_proj_weight = nn.Parameter(
        torch.ones(3 * E, E, dtype=torch.int8), requires_grad=False
    )
    words = {
        "tied": "the in_proj_weight of its attention is tied to twin.in_proj_weight",
        "twin": "tied to tied.in_proj_weight",
        "patched": "forward of its attention was replaced",
        "int": "torch.int8",
    }
    candidates = survey(model)
    for name, reason in words.items():
        for part in ("q", "k", "v"):
            assert reason in candidates[f"{name}.{part}"].obstacle
            with pytest.raises(FactorizeError, match=f"{name}.{part} cannot be low-rank"):
                factorize(model, {f"{name}.{part}": 2})
        # Its output is a layer that the shut attention reads: right, but slower than dense.
        assert candidates[f"{name}.out_proj"].obstacle == ""
    with pytest.raises(SelectionError, match="parent reads the weight"):
        select(model, keep_first=0, keep_last=0)
    assert {type(m) for m in model.values()} == {nn.MultiheadAttention}


def test_a_subclass_and_a_model_that_is_an_attention() -> None:
    model: Any = filled(nn.ModuleDict({"own": Own(E, H), "fc": nn.Linear(E, E)}))
    assert list(survey(model)) == ["own.out_proj", "fc"]
    decided = plan(model, 2, keep_first=0, keep_last=0)
    assert dict(decided.ranks) == {"fc": 2}
    assert any("own (Own)" in note for note in decided.notes)
    root = filled(nn.MultiheadAttention(E, H, batch_first=True))
    assert "the model is this attention itself" in survey(root)["q"].obstacle
    with pytest.raises(FactorizeError, match="put it into a module that calls it"):
        factorize(root, {"q": 2})
    with pytest.raises(SelectionError, match=r"call its close\(\)"):
        to_dense(OpenAttention(E, H))


def test_everything_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, fresh = Block(), Block()
    decided = plan(model, 0.5, INPUTS, layers="own.*,cross.*")
    factorize(model, decided)
    impose_plan(fresh, read_plan(model))
    assert stored(fresh) == decided.parameters[1]
    assert {t.device.type for t in fresh.state_dict().values()} == {"meta"}
    to_dense(fresh)
    assert list(fresh.state_dict()) == list(Block().state_dict())
