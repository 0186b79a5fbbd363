"""What can be low-rank, what `auto` takes, and what is said of the rest; nothing is changed."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from rankwise import accounting
from rankwise.errors import FactorizeError, OptionError, PlanError, SelectionError
from rankwise.layers import LowRankLinear
from rankwise.ranks import Ratio, factorize, plan
from rankwise.selection import select, survey
from rankwise.structure import read_plan


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chain(*widths: int) -> Any:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


# Selection


class Crossed(nn.Module):
    """Runs its layers in another order than it defines them; `spare` and `out` never run."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.middle, self.other, self.stem, self.spare = (
            nn.Linear(8, 8) for _ in range(5)
        )
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(self.middle(self.stem(x)))
        return self.classifier(self.attention(x, x, x, need_weights=False)[0])


def chosen(reasons: dict[str, str]) -> list[str]:
    return [name for name, reason in reasons.items() if not reason]


def test_first_and_last_are_those_of_the_execution() -> None:
    model = Crossed()
    trace = accounting.trace(model, noise(1, 3, 8))
    reasons = select(model, trace=trace)
    parts = [f"attention.{part}" for part in ("q", "k", "v", "out_proj")]
    assert chosen(reasons) == ["middle", "other", *parts, "spare"]
    assert reasons["stem"] == "among the first 1 (keep_first)"
    assert reasons["classifier"] == "among the last 1 (keep_last)"
    assert list(reasons) == ["stem", "middle", "other", *parts, "classifier", "spare"]
    kept = select(model, trace=trace, keep_first=2, keep_last=2)
    assert chosen(kept) == ["other", *parts[:3], "spare"]
    by_definition = chosen(select(model))
    assert "stem" in by_definition
    assert "classifier" not in by_definition


def test_keeping_more_layers_than_there_are_keeps_all() -> None:
    for first, last in ((0, 4), (9, 0), (2, 2)):
        with pytest.raises(SelectionError, match=r"lower keep_first / keep_last"):
            select(chain(8, 8, 8, 8), keep_first=first, keep_last=last)


@pytest.mark.parametrize("count", [-1, 1.5, True, "1", None])
def test_a_count_of_layers_is_a_whole_number(count: Any) -> None:
    with pytest.raises(OptionError, match=r"keep_first=.* is no number of layers"):
        select(chain(8, 8, 8), keep_first=count)


@pytest.mark.parametrize(
    ("layers", "exclude", "expected"),
    [
        ("*", (), ["0.0", "0.1", "1.0", "1.1"]),
        ("0.*", (), ["0.0", "0.1"]),
        ("0.0, 1.1", (), ["0.0", "1.1"]),
        (["0.0", "1.?"], (), ["0.0", "1.0", "1.1"]),
        ("*", "1.*", ["0.0", "0.1"]),
        ("*", ["*.0"], ["0.1", "1.1"]),
        (lambda name, module: module.out_features == 4, (), ["1.0"]),
        ("*", lambda name, module: name.endswith("0"), ["0.1", "1.1"]),
        ("auto", (), ["0.1", "1.0"]),
        ("auto", "1.0", ["0.1"]),
    ],
)
def test_layers_are_chosen_by_glob_list_or_predicate(
    layers: Any, exclude: Any, expected: list[str]
) -> None:
    model = nn.Sequential(chain(8, 8, 8), chain(8, 4, 8))
    assert chosen(select(model, layers, exclude)) == expected


def test_a_pattern_that_matches_nothing_names_the_closest_layers() -> None:
    model = nn.Sequential()
    model.add_module("query", nn.Linear(8, 8))
    model.add_module("value", nn.Linear(8, 8))
    with pytest.raises(SelectionError, match=r"layers='qery' matches none of the 2 .* 'query'"):
        select(model, "qery")
    with pytest.raises(SelectionError, match=r"exclude='\*\.val' .* 'value'"):
        select(model, "*", "*.val")
    with pytest.raises(SelectionError, match="there are none"):
        select(nn.ReLU(), "fc")
    with pytest.raises(SelectionError, match="no layer of Sequential was selected"):
        select(model, lambda name, module: False)
    with pytest.raises(SelectionError, match=r"query: excluded; value: excluded"):
        select(model, "*", "*")


@pytest.mark.parametrize("layers", [None, 3, [1], True])
def test_a_choice_that_is_no_choice_is_refused(layers: Any) -> None:
    with pytest.raises(SelectionError, match="is no glob over layer names"):
        select(chain(8, 8, 8), layers)


def test_each_unsupported_layer_says_why() -> None:
    model = nn.ModuleDict(
        {
            "depthwise": nn.Conv2d(4, 4, 3, groups=4),
            "embedding": nn.Embedding(9, 4, max_norm=1.0),
            "bag": nn.EmbeddingBag(9, 4),
            "norm": nn.LayerNorm([4, 4]),
            "bilinear": nn.Bilinear(4, 4, 4),
            "own": Own(4, 4),
            "complex": nn.Linear(4, 4, dtype=torch.complex64),
            "normed": parametrizations.weight_norm(nn.Linear(4, 4)),
            "spectral": parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
            "pruned": prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
        }
    )
    before = copy.deepcopy(model.state_dict())
    words = {
        "depthwise": "depthwise",
        "embedding": "max_norm rescales",
        "bag": "EmbeddingBag has no low-rank form",
        "norm": "LayerNorm has no low-rank form",
        "bilinear": "Bilinear has no low-rank form",
        "own": "Own has a forward of its own",
        "complex": "torch.complex64",
        "normed": "computed from other parameters",
        "spectral": "computed from other parameters",
        "pruned": "computed from other parameters",
    }
    candidates = survey(model)
    assert list(candidates) == list(words)
    for name, reason in words.items():
        assert reason in candidates[name].obstacle
        with pytest.raises(SelectionError, match=name):
            select(model, name)
        with pytest.raises(FactorizeError, match=f"{name} cannot be low-rank"):
            factorize(model, {name: 2})
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_matrices_that_no_line_of_the_plan_covers_are_named() -> None:
    model = nn.ModuleDict({"rnn": nn.RNN(8, 8), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    decided = plan(model, 2, keep_first=0, keep_last=0)
    assert set(decided.ranks) == {"a", "b"}
    assert any("rnn (RNN)" in note for note in decided.notes)
    with pytest.raises(SelectionError, match=r"rnn \(RNN\) has no low-rank form here"):
        select(model, "rnn")


def test_a_layer_is_not_factorised_twice() -> None:
    model = chain(8, 8, 8)
    factorize(model, {"0": 4})
    assert list(survey(model)) == ["1"]
    with pytest.raises(SelectionError, match="0 is low-rank already"):
        select(model, "0")
    with pytest.raises(SelectionError, match=r"unknown layer '0'"):
        factorize(model, {"0": 2})


def test_a_lazy_layer_is_asked_to_see_its_input_first() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyLinear(8))
    with pytest.raises(SelectionError, match=r"0 \(LazyLinear\) has no shape yet"):
        survey(model)


class Own(nn.Linear):
    """A Linear whose forward is another."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


# What auto leaves alone


class Text(nn.Module):
    """As BERT and GPT-2: embeddings, attention, a head that may be tied and may be no module."""

    def __init__(self, head: str = "module") -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30, 16), nn.Embedding(8, 16)
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.up, self.down = (nn.Linear(16, 16) for _ in range(4))
        self.how = head
        if head != "function":
            self.head = nn.Linear(16, 30, bias=False)
        if head == "tied":
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        x = self.down(self.up(self.q(x) * self.k(x)).relu())
        return F.linear(x, self.words.weight) if self.how == "function" else self.head(x)


TOKENS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("head", ["module", "tied"])
def test_embeddings_are_the_first_layer_and_the_head_the_last(head: str, traced: bool) -> None:
    model = Text(head)
    trace = accounting.trace(model, TOKENS) if traced else None
    reasons = select(model, trace=trace)
    assert chosen(reasons) == ["q", "k", "up", "down"]
    assert reasons["words"] == reasons["places"] == "an embedding; name it to make it low-rank"
    assert reasons["head"] == "among the last 1 (keep_last)"
    assert chosen(select(model, trace=trace, keep_first=2, keep_last=2)) == ["k", "up"]
    everything = chosen(select(model, trace=trace, keep_first=0, keep_last=0))
    assert everything == ["q", "k", "up", "down"] + (["head"] if head == "module" else [])


def test_a_head_that_reads_the_embedding_is_the_last_layer() -> None:
    model = Text("function")
    trace = accounting.trace(model, TOKENS)
    assert chosen(select(model, trace=trace)) == ["q", "k", "up", "down"]
    assert chosen(select(model, trace=trace, keep_last=2)) == ["q", "k", "up"]
    # Without a trace nobody knows of that head.
    assert chosen(select(model)) == ["q", "k", "up"]


def test_a_tied_head_is_low_rank_with_its_embedding_when_both_are_named() -> None:
    reasons = select(Text("tied"), "words, head")
    assert chosen(reasons) == ["words", "head"]
    assert select(Text("tied"), "*", "words")["head"] == (
        "its weight is tied to words, which stays dense"
    )


class Towers(nn.Module):
    """As CLIP: a tower over tokens and one over patches."""

    def __init__(self, text_first: bool) -> None:
        super().__init__()
        self.text_first = text_first
        self.words, self.write = nn.Embedding(30, 16), nn.Linear(16, 16)
        self.patches, self.look = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 16)
        self.again = nn.Conv2d(16, 16, 1)
        self.join = nn.Linear(16, 16)

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        def text() -> Tensor:
            return self.write(self.words(ids).mean(1))

        def image() -> Tensor:
            return self.look(self.again(self.patches(pixels)).mean((2, 3)))

        parts = [f() for f in ((text, image) if self.text_first else (image, text))]
        return self.join(parts[0] * parts[1])


@pytest.mark.parametrize("text_first", [True, False])
def test_every_tower_keeps_its_stem(text_first: bool) -> None:
    model = Towers(text_first)
    trace = accounting.trace(model, (TOKENS, noise(2, 3, 8, 8)))
    reasons = select(model, trace=trace)
    assert sorted(chosen(reasons)) == ["again", "look", "write"]
    assert "keep_first" in reasons["patches"]
    assert "patches" in chosen(select(model, trace=trace, keep_first=0))


class Branches(nn.Module):
    """A convolutional network whose input meets two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.skip, self.body = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.body(self.stem(x)) + self.skip(x)).mean((2, 3)))


def test_of_one_input_only_the_first_layer_is_a_stem() -> None:
    model = Branches()
    trace = accounting.trace(model, noise(1, 3, 4, 4))
    assert chosen(select(model, trace=trace)) == ["body", "skip"]
    assert chosen(select(model, trace=trace, keep_first=2)) == ["skip"]


def test_a_head_of_a_class_of_its_own_is_the_last_layer() -> None:
    model = nn.Sequential(Own(8, 8), *chain(8, 8, 8, 8), Own(8, 8))
    reasons = select(model)
    assert chosen(reasons) == ["1", "2", "3"]
    assert reasons["4"] == "Own has a forward of its own"
    assert chosen(select(model, keep_first=2, keep_last=2)) == ["2"]
    depthwise = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    )
    # A depthwise convolution, which has no rank to choose, does not count.
    assert chosen(select(depthwise, keep_first=1)) == ["2"]
    assert chosen(select(depthwise, keep_first=2, keep_last=0)) == ["3"]


class Reader(nn.Module):
    """As Mamba's fused path: weights that are used without calling their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.step, self.data, self.both, self.dtype, self.last = (
            nn.Linear(12, 12) for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).to(self.dtype.weight.dtype)
        x = (self.step.weight @ x.mT).mT + self.step.bias
        x = x @ self.data.weight.data + self.both(x) @ self.both.weight
        return self.last(self.dtype(x))


def test_weights_that_a_parent_reads_stay_dense_under_auto() -> None:
    model, x = Reader(), noise(3, 12)
    decided = plan(model, 4, x)
    reasons = {line.name: line.reason for line in decided.layers}
    read = "its parent reads the weight as a matrix"
    assert [n for n, reason in reasons.items() if reason == read] == ["both", "step", "data"]
    assert list(decided.ranks) == ["dtype"]


def test_weights_that_a_parent_reads_are_right_when_they_are_named() -> None:
    model: Any = Reader()
    x = noise(3, 12)
    reference = copy.deepcopy(model)
    factorize(model, dict.fromkeys(["step", "data", "both", "dtype"], 12))
    assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)
    for way in (model, reference):
        way(x).square().sum().backward()
    _, v = model.step.factors()
    gradient = reference.step.weight.grad
    assert gradient is not None
    assert_close(model.step.u.weight.grad, gradient @ v.T, rtol=1e-3, atol=1e-4)

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.layer._parameters["weight"]
            assert weight is not None
            return x @ weight

    raw = Raw()
    factorize(raw, {"layer": 2})
    with pytest.raises(KeyError, match="weight"):
        raw(noise(2, 4))


def test_experts_that_one_forward_did_not_reach_are_taken_and_routers_left() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.router, self.head = (
                nn.Linear(64, 64),
                nn.Linear(64, 4),
                nn.Linear(64, 9),
            )
            self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.experts[int(self.router(x).sum(0).argmax())](x))

    decided = plan(Experts(), Ratio(0.25), noise(1, 64))
    assert list(decided.ranks) == [n for n in decided.ranks if n.startswith("experts.")]
    assert len(decided.ranks) == 4
    reasons = {line.name: line.reason for line in decided.layers}
    assert "would not make it smaller" in reasons["router"]


# What cannot be factorised


class Quantized(nn.Module):
    """As GPTQ's and AWQ's layers: packed integers, and the shape in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 4
        self.register_buffer("qweight", torch.zeros(2, 4, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(1, 4))


class Subclassed(Tensor):
    """As torchao's and DTensor's weights."""


class Int8Params(nn.Parameter):
    """As bitsandbytes' weights."""


class BaseTunerLayer:
    """As peft's adapters."""


BaseTunerLayer.__module__ = "peft.tuners.tuners_utils"


class Lora(nn.Module, BaseTunerLayer):
    """As peft's lora.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 8)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 4, bias=False)})


def unsupported() -> dict[str, nn.Module]:
    patched, subclassed, eight = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    patched.forward = patched.forward
    subclassed.weight = nn.Parameter(torch.randn(4, 4).as_subclass(Subclassed))
    eight.weight = Int8Params(torch.zeros(4, 4))
    sparse, fp8, integer = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    sparse.weight = nn.Parameter(torch.eye(4).to_sparse())
    fp8.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    integer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return {
        "patched": patched,
        "subclassed": subclassed,
        "eight": eight,
        "sparse": sparse,
        "fp8": fp8,
        "integer": integer,
        "gptq": Quantized(),
        "lora": Lora(),
        "spectral": nn.utils.spectral_norm(nn.Linear(4, 4)),
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("patched", "its forward was replaced on the instance"),
        ("subclassed", "its weight is a Subclassed, no plain tensor"),
        ("eight", "Int8Params, no plain tensor (quantised or sharded); load the model in float32"),
        ("sparse", "its weight is stored sparse (torch.sparse_coo)"),
        ("fp8", "its weight is torch.float8_e4m3fn"),
        ("integer", "torch.int8; only real floating point can be factorised or adapted: load the"),
        ("gptq", "Quantized holds its weight quantised; factorise or adapt before quantising"),
        ("lora.base_layer", "it belongs to the adapter lora; merge or unload the adapter first"),
        ("lora.lora_A.default", "it belongs to the adapter lora"),
        ("spectral", "computed from other parameters"),
    ],
)
def test_unusual_weights_and_owners_are_left_with_the_reason(name: str, reason: str) -> None:
    model = nn.ModuleDict({**unsupported(), "plain": nn.Linear(16, 16)})
    candidates = survey(model)
    assert reason in candidates[name].obstacle
    lines = {line.name: line for line in plan(model, 2, keep_first=0, keep_last=0).layers}
    assert reason in lines[name].reason
    assert lines["plain"].rank == 2
    with pytest.raises(FactorizeError, match=f"{name} cannot be low-rank"):
        factorize(model, {name: 2})
    assert read_plan(model) == {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_layers_that_torch_quantised_are_left_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    candidates = survey(quantised)
    assert {n: c.shape for n, c in candidates.items()} == {"0": (4, 8), "2": (4, 4)}
    assert "holds its weight quantised" in candidates["0"].obstacle
    with pytest.raises(SelectionError, match="factorise or adapt before quantising"):
        plan(quantised, 2, keep_first=0, keep_last=0)


# Bad input


def test_a_glob_over_modules_of_the_wrong_kind_says_what_they_are() -> None:
    model = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(8),
            "block": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
            "lstm": nn.LSTM(8, 8),
            "rnn": nn.RNN(8, 8),
            "low": LowRankLinear(8, 8, 2),
            "bag": nn.EmbeddingBag(9, 8),
        }
    )
    words = {
        "norm": r"norm \(LayerNorm\) has no weight matrix; the closest are",
        "block": r"block \(Sequential\) holds layers: name them, as in 'block\.\*'",
        "lstm": r"lstm \(LSTM\) holds layers: name them, as in 'lstm\.\*'",
        "rnn": r"rnn \(RNN\) has no low-rank form here",
        "low": r"low is low-rank already",
        "bag": r"bag: EmbeddingBag has no low-rank form here",
    }
    for pattern, message in words.items():
        with pytest.raises(SelectionError, match=message):
            plan(model, 2, layers=pattern)
    reasons = select(model, "b*")
    assert chosen(reasons) == ["block.0", "block.1"]
    assert "EmbeddingBag" in reasons["bag"]


def test_one_layer_under_two_names_has_one_rank() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(8, 8))})
    with pytest.raises(PlanError, match=r"a and b\.0 are one layer, .* ranks 2 and 3; give one"):
        factorize(model, {"a": 2, "b.0": 3})
    assert read_plan(model) == {}
    change = factorize(model, {"a": 2, "b.0": 2, "b.1": 3})
    assert set(change.modules) == {"a", "b.1"}
    assert model["a"].rank == 2


def test_modules_in_plain_lists_are_pointed_out() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.Linear(8, 8)
            self.blocks = [nn.Linear(8, 8)]
            self.by_name = {"one": nn.Linear(8, 8)}
            self.again = [self.seen]

    model = nn.ModuleDict({"inner": Hidden(), "other": nn.Linear(8, 8)})
    with pytest.raises(
        SelectionError, match=r"inner\.blocks holds modules in a plain list, .*Module"
    ):
        select(model, "inner.blocks.*")
    notes = " ".join(plan(model, 2, keep_first=0, keep_last=0).notes)
    assert "inner.blocks (modules in a plain list)" in notes
    assert "inner.by_name (modules in a plain dict)" in notes
    assert "again" not in notes


def test_weights_that_are_not_finite_name_the_layer() -> None:
    for value in (float("nan"), float("inf")):
        model = chain(8, 8, 8)
        with torch.no_grad():
            model[1].weight[0, 0] = value
        with pytest.raises(FactorizeError, match=r"^1 \(8, 8\): 1 of 64 weights are not finite"):
            factorize(model, 2, keep_first=0, keep_last=0)
        assert read_plan(model) == {}


@pytest.mark.parametrize("core", [False, True])
def test_a_zero_matrix_stays_zero_and_can_learn(core: bool) -> None:
    model = chain(8, 8)
    nn.init.zeros_(model[0].weight)
    reference, x = copy.deepcopy(model), noise(3, 8)
    factorize(model, {"0": 3}, core=core)
    assert torch.equal(model(x), reference(x))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    assert float(model[0].weight.detach().abs().max()) > 1e-3
    with pytest.raises(FactorizeError, match="variance 0"):
        factorize(reference, {"0": 3}, init="variance")


def test_weights_that_are_not_contiguous_or_repeat_one_row() -> None:
    model = chain(8, 8, 8)
    model[0].weight = nn.Parameter(noise(8, 8).t())
    model[1].weight = nn.Parameter(noise(1, 8).expand(8, 8))
    reference, x = copy.deepcopy(model), noise(3, 8)
    factorize(model, {"0": 8, "1": 1})
    assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)
    model(x).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p.sub_(0.1 * p.grad)
    assert torch.isfinite(model(x)).all()


def test_a_model_that_is_one_layer_and_a_model_without_any() -> None:
    for root in (nn.Linear(8, 8), nn.Embedding(8, 8), nn.Conv2d(8, 8, 3)):
        with pytest.raises(SelectionError, match=r"wrap it, e\.g\. nn\.Sequential"):
            plan(root, 2, keep_first=0, keep_last=0)
        with pytest.raises(FactorizeError, match="wrap it"):
            factorize(root, {"": 2})
    with pytest.raises(SelectionError, match="no layer of ReLU was selected"):
        plan(nn.ReLU(), 2)
