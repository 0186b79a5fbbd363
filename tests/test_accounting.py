"""Counts agree with counts by hand, a trace says what ran, and neither leaves anything behind."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from rankwise.accounting import Call, Trace, flops, parameters, running_statistics, trace, watch
from rankwise.errors import LifeCycleError
from rankwise.models import build


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Crossed(nn.Module):
    """Runs its layers against the order of their definition, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.twice = nn.Linear(4, 4, bias=False)
        self.first = nn.Linear(6, 4)
        self.alias = self.first
        self.idle = nn.Linear(3, 3)
        self.fail = False

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.first(x)
        if self.fail:
            raise ArithmeticError("on purpose")
        return self.last(self.twice(self.twice(x))) * scale


CROSSED = Trace(
    order=("first", "twice", "last"),
    calls={
        "first": (Call((5, 6), (5, 4)),),
        "twice": (Call((5, 4), (5, 4)), Call((5, 4), (5, 4))),
        "last": (Call((5, 4), (5, 2)),),
    },
)


# Parameters


def test_shared_parameters_count_once_and_frozen_ones_are_not_trainable() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3).bfloat16())
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    count = parameters(model)
    assert count.stored == 16 + 4 + 12 + 3
    assert count.trainable == 16 + 4 + 3
    assert count.bytes == 4 * (16 + 4) + 2 * (12 + 3)


# Traces


def test_a_trace_is_in_order_of_execution_and_keeps_every_call() -> None:
    assert trace(Crossed(), noise(5, 6)) == CROSSED


@pytest.mark.parametrize("sample", [(noise(5, 6), 2.0), {"x": noise(5, 6), "scale": 2.0}])
def test_a_sample_may_be_arguments_or_keywords(sample: Any) -> None:
    assert trace(Crossed(), sample) == CROSSED


def test_a_trace_reads_nested_results_and_keyword_inputs() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(3)
            self.lookup = nn.Embedding(7, 3)

        def forward(self, ids: Tensor) -> dict[str, list[Tensor]]:
            return {"out": [self.norm(input=self.lookup(ids))]}

    traced = trace(Recurrent(), torch.zeros(2, 5, dtype=torch.long))
    assert traced.order == ("lookup", "norm")
    assert traced.calls["lookup"] == (Call((2, 5), (2, 5, 3)),)
    assert traced.calls["norm"] == (Call((2, 5, 3), (2, 5, 3)),)


def test_a_parametrised_layer_is_traced_under_its_own_name() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    assert trace(model, noise(4, 3)).order == ("0",)


@pytest.mark.parametrize("fails", [False, True])
def test_a_trace_leaves_the_model_and_the_random_state_as_they_were(fails: bool) -> None:
    class Restless(Crossed):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            self.calls += 1
            return super().forward(self.norm(x) + torch.rand(()), scale)

    model = Restless()
    model.fail = fails
    model.last.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    if fails:
        with pytest.raises(ArithmeticError, match="on purpose"):
            trace(model, noise(5, 6))
    else:
        trace(model, noise(5, 6))
        flops(model, noise(5, 6))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert hooks(model) == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_a_trace_sees_the_layers_that_the_fused_encoder_kernel_would_skip() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    inside = tuple(f"self_attn.{part}" for part in ("q", "in_proj", "k", "v", "out_proj"))
    names = (*inside, "norm1", "linear1", "linear2", "norm2")
    assert trace(layer, noise(2, 3, 8)).order == names


def test_an_attention_counts_as_calls_of_its_projections() -> None:
    model = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    q, k, v = noise(5, 3, 8), noise(7, 3, 6), noise(7, 3, 4)
    found = trace(model, {"query": q, "value": v, "key": k})
    assert dict(found.calls) == {
        "q": (Call((5, 3, 8), (5, 3, 8)),),
        "in_proj": (Call((5, 3, 8), (5, 3, 24)),),
        "k": (Call((7, 3, 6), (7, 3, 8)),),
        "v": (Call((7, 3, 4), (7, 3, 8)),),
        "out_proj": (Call((5, 3, 8), (5, 3, 8)),),
    }


class Reader(nn.Module):
    """Uses some weights without calling their modules, and looks at the dtype of another."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.only_read, self.both, self.called, self.data = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x @ self.only_read.weight.t()
        x = self.both(x).to(self.called.weight.dtype) @ self.both.weight
        assert self.called.weight.shape == (4, 4)
        x = self.called(x) + self.data.weight.data.sum()
        return nn.functional.linear(x, self.embedding.weight)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_that_are_read_and_not_called_are_found(device: str) -> None:
    model = Reader().to(device)
    found = trace(model, torch.zeros(2, 3, dtype=torch.int64))
    assert found.order == ("embedding", "both", "called")
    # Before the last use of each: one call, two, three, three.
    assert found.reads == {"only_read": 1, "both": 2, "data": 3, "embedding": 3}
    assert hooks(model) == 0


class Towers(nn.Module):
    """Two inputs, one of them reshaped, met by two layers each."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.patch, self.again, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, ids: Tensor, *, pixels: Tensor) -> Tensor:
        x = self.text(ids)
        return self.head(x + self.patch(pixels.flatten(1)) + self.again(pixels.flatten(1)))


def test_the_first_layer_to_meet_each_input_is_its_stem() -> None:
    sample = {"ids": noise(3, 4), "pixels": noise(3, 2, 2, seed=1)}
    assert trace(Towers(), sample).stems == ("text", "patch")
    model = Towers()
    watcher = watch(model)
    model(sample["ids"], pixels=sample["pixels"])
    assert watcher.trace is not None
    assert watcher.trace.stems == ("text", "patch")
    assert watcher._given == []


def test_a_trace_of_a_compiled_model_compiles_nothing() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Crossed()
    model.compile(backend=backend)
    assert trace(model, noise(5, 6)) == CROSSED
    assert graphs == []


def test_a_class_that_calls_no_hooks_is_refused() -> None:
    class Direct(Crossed):
        def __call__(self, *args: Any) -> Tensor:
            return self.forward(*args)

    with pytest.raises(LifeCycleError, match="calling Direct runs none of its forward hooks"):
        trace(Direct(), noise(5, 6))


# Watching


@pytest.mark.parametrize("training", [True, False])
def test_a_watch_records_one_real_forward_and_goes_away(training: bool) -> None:
    model = Crossed().train(training)
    watcher = watch(model)
    assert watcher.trace is None
    model.first(noise(3, 6))  # outside a forward of the root
    assert watcher.trace is None
    model(noise(5, 6)).sum().backward()
    assert hooks(model) == 0
    assert watcher.trace == CROSSED
    model(noise(2, 6))
    assert watcher.trace == CROSSED
    assert model.last.weight.grad is not None


def test_a_watch_ends_without_a_trace_when_the_forward_raises() -> None:
    model = Crossed()
    model.fail = True
    watcher = watch(model)
    with pytest.raises(ArithmeticError, match="on purpose"):
        model(noise(5, 6))
    assert watcher.trace is None
    assert hooks(model) == 0


def test_a_watch_can_be_taken_away_before_it_has_seen_anything() -> None:
    model = Crossed()
    watcher = watch(model)
    watcher.remove()
    model(noise(5, 6))
    assert hooks(model) == 0
    assert watcher.trace is None


def test_a_model_that_calls_itself_is_recorded_up_to_the_outer_return() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            return self.layer(self(x, again=False)) if again else self.layer(x)

    model = Twice()
    watcher = watch(model)
    model(noise(2, 3))
    assert watcher.trace is not None
    assert watcher.trace.calls["layer"] == (Call((2, 3), (2, 3)),) * 2


def test_a_watch_works_under_functional_call() -> None:
    model = Crossed()
    watcher = watch(model)
    weights = {name: 2 * p.detach() for name, p in model.named_parameters()}
    functional_call(model, weights, (noise(5, 6),))
    assert watcher.trace == CROSSED
    assert hooks(model) == 0


def replicate(module: nn.Module) -> nn.Module:
    """What nn.DataParallel makes for each device: a shallow copy with plain tensors for weights."""
    replica = module._replicate_for_data_parallel()
    replica._modules = {name: replicate(child) for name, child in module.named_children()}
    for name, parameter in module._parameters.items():
        replica.__dict__[name] = None if parameter is None else parameter.detach()
    return replica


def test_among_parallel_replicas_one_forward_is_recorded() -> None:
    model = Crossed()
    watcher = watch(model)
    inside, results = threading.Barrier(4), []

    def wait(module: nn.Module, args: Any) -> None:
        inside.wait(10)

    # Replicas share the dict of hooks, so this holds each until all are in their forward.
    gate = model.register_forward_pre_hook(wait)
    replicas = [replicate(model) for _ in range(4)]

    def work(replica: nn.Module) -> None:
        results.append(replica(noise(5, 6)))

    threads = [threading.Thread(target=work, args=(replica,)) for replica in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gate.remove()
    assert len(results) == len(replicas)
    assert watcher.trace == CROSSED
    assert hooks(model) == 0


def test_a_copy_of_a_watched_model_is_independent() -> None:
    model = Crossed()
    watcher = watch(model)
    twin = copy.deepcopy(model)
    twin(noise(2, 6))
    assert hooks(twin) == 0
    assert watcher.trace is None
    model(noise(5, 6))
    assert watcher.trace == CROSSED


# Dynamo reads `.grad` of what a hook was given, and cannot silence its warning under "error".
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("compiled_part", ["wrapper", "in place", "whole step"])
def test_a_watch_under_compile_records_once_and_costs_one_compilation(
    fullgraph: bool, compiled_part: str
) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = Crossed()
    expected = model(noise(5, 6))
    watcher = watch(model)
    compiled: Callable[..., Tensor] = model
    if compiled_part == "in place":
        model.compile(backend=backend, fullgraph=fullgraph)
    else:
        target = model if compiled_part == "wrapper" else lambda x: model(x)
        compiled = torch.compile(target, backend=backend, fullgraph=fullgraph)
    torch.testing.assert_close(compiled(noise(5, 6)), expected, rtol=1e-6, atol=1e-6)
    assert watcher.trace == CROSSED
    assert hooks(model) == 0
    for _ in range(3):
        torch.testing.assert_close(compiled(noise(5, 6)), expected, rtol=1e-6, atol=1e-6)
    assert len(graphs) == 2
    assert watcher.trace == CROSSED


# FLOPs


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.integers(1, 9), st.booleans())
def test_a_chain_of_linear_layers_costs_two_flops_a_weight_and_input(
    widths: list[int], batch: int, bias: bool
) -> None:
    pairs = list(pairwise(widths))
    model = nn.Sequential(*[nn.Linear(i, o, bias=bias) for i, o in pairs])
    assert flops(model, noise(batch, widths[0])) == sum(2 * batch * i * o for i, o in pairs)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 3),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 4),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
)
def test_a_convolution_costs_its_outputs_times_its_window(
    groups: int, inputs: int, outputs: int, kernel: int, stride: int, dilation: int
) -> None:
    conv = nn.Conv2d(
        groups * inputs,
        groups * outputs,
        kernel,
        stride=stride,
        dilation=dilation,
        groups=groups,
        padding=1,
    )
    x = noise(2, groups * inputs, 9, 7)
    assert flops(conv, x) == 2 * conv(x).numel() * inputs * kernel * kernel


@pytest.mark.parametrize("causal", [False, True])
def test_attention_costs_its_two_batched_products(causal: bool) -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    batch, heads, queries, keys, width, values = 2, 3, 5, 7, 4, 6
    q, k = noise(batch, heads, queries, width), noise(batch, heads, keys, width)
    v = noise(batch, heads, keys, values)
    by_hand = 2 * batch * heads * queries * keys * (width + values)
    assert flops(Attention(), (q, k, v)) == by_hand


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_encoder_layer_is_counted_in_full_in_both_modes(wrap: bool, training: bool) -> None:
    batch, tokens, width, inner = 2, 5, 16, 32
    layer: nn.Module = nn.TransformerEncoderLayer(width, 4, inner, batch_first=True)
    if wrap:
        layer = nn.TransformerEncoder(layer, 1)
    layer.train(training)
    projections = 2 * batch * tokens * width * (3 * width + width + 2 * inner)
    attention = 2 * 2 * batch * tokens * tokens * width
    assert flops(layer, noise(batch, tokens, width)) == projections + attention
    assert layer.training is training


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_are_counted_and_still_work(kind: type[nn.Module], gates: int) -> None:
    model, x = kind(8, 16), noise(3, 2, 8)
    before = model(x)[0]
    assert flops(model, x) == 2 * 3 * 2 * (8 + 16) * gates * 16
    torch.testing.assert_close(model(x)[0], before, rtol=0, atol=0)


def test_a_bilinear_layer_is_counted() -> None:
    assert flops(nn.Bilinear(3, 4, 5), (noise(6, 3), noise(6, 4))) == 2 * 6 * 5 * 3 * 4


def test_shared_modules_and_tied_weights_are_counted_per_use_and_come_back() -> None:
    model = Crossed()
    model.twice.weight = nn.Parameter(noise(4, 4))
    model.idle.weight = model.twice.weight  # tied, and `alias` is a shared module
    before = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    assert flops(model, noise(5, 6)) == 2 * 5 * (6 * 4 + 2 * 4 * 4 + 4 * 2)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is p for name, p in before.items())
    assert len(after) == len(before)


def test_a_model_that_needs_values_is_counted_by_a_real_run() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.memory = nn.LSTM(8, 4, batch_first=True)
            self.meta_calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.meta_calls += int(x.is_meta)
            if x.sum().item() > 1e9:
                return x
            return self.memory(self.attend(x))[0]

    model = Branching()
    batch, tokens = 2, 3
    encoder = 2 * batch * tokens * 8 * (4 * 8 + 2 * 16) + 2 * 2 * batch * tokens * tokens * 8
    lstm = 2 * batch * tokens * (8 + 4) * 4 * 4
    assert flops(model, noise(batch, tokens, 8)) == encoder + lstm
    assert model.meta_calls == 1
    assert torch.backends.mkldnn.enabled


def test_a_layer_that_is_called_on_a_view_of_a_weight_is_counted_in_a_real_run() -> None:
    # As relative positions are in DeBERTa.
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(6, 4)
            self.map = nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            assert x.sum().item() < 1e9  # needs values
            return x @ self.map(self.rows.weight[1:5].unsqueeze(0)).squeeze(0)

    model = Table()
    storage = model.rows.weight.data_ptr()
    assert flops(model, noise(2, 4)) == 2 * 4 * 4 * 3 + 2 * 2 * 4 * 3
    assert model.rows.weight.data_ptr() == storage
    assert model.rows.weight.requires_grad


def test_a_count_on_meta_allocates_no_copy_of_the_model() -> None:
    seen: list[Any] = []
    model = build("resnet-18", input_shape=(3, 32, 32))
    model.get_submodule("layer4.1.conv2").register_forward_pre_hook(
        lambda module, args: seen.extend([args[0].device, module.weight.device])
    )
    counted = flops(model, noise(1, 3, 32, 32))
    assert seen == [torch.device("meta")] * 2
    assert counted == 2 * 555_422_720
    assert next(model.parameters()).device == torch.device("cpu")


def test_the_error_of_a_wrong_sample_is_the_one_of_the_real_forward() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        flops(nn.Linear(3, 2), noise(4, 5))


def test_running_statistics_are_those_of_normalisation_in_eval_mode() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(2))
    assert running_statistics(model) == 1
    assert running_statistics(nn.BatchNorm1d(3, track_running_stats=False)) == 0
