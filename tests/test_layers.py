"""A low-rank layer is the dense layer of its product: values, gradients, dtypes, compilers.

Each law is stated against torch's own dense layer, so that no formula is written twice.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from rankwise.errors import FactorizeError, LifeCycleError, OptionError, PlanError
from rankwise.layers import KINDS, LowRankConv2d, LowRankLayer, LowRankLinear, low_rank_class

ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}
DTYPES = list(ROUNDING)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def filled(module: Any, seed: int = 0) -> Any:
    """The module with parameters drawn from a generator of its own."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            drawn = noise(*parameter.shape, seed=seed + i, dtype=parameter.dtype)
            parameter.copy_(drawn / max(1, parameter[0].numel()) ** 0.5)
    return module


def stand_in(dense: Any, rank: int, **options: Any) -> Any:
    kind = low_rank_class(dense)
    assert isinstance(kind, type)
    return kind.from_dense(dense, rank, **options)


def full_rank(dense: Any) -> int:
    return min(dense.weight.flatten(1).shape)


def assert_near(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert actual is not None
    assert expected is not None
    assert actual.dtype == expected.dtype
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    assert_close(actual, expected, rtol=0, atol=tolerance * (1 + size))


def outputs_and_gradients(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.backward(noise(*y.shape, seed=7, dtype=y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def assert_same_function(low: Any, dense: Any, x: Tensor, tolerance: float) -> None:
    """Same outputs, same input gradients, and the factors' gradients by the chain rule."""
    y, dx = outputs_and_gradients(dense, x)
    y_low, dx_low = outputs_and_gradients(low, x)
    assert_near(y_low, y, tolerance)
    assert_near(dx_low, dx, tolerance)
    gradient = dense.weight.grad.flatten(1).double()
    u, v = low.u.weight.flatten(1).double(), low.v.weight.flatten(1).double()
    dtype = low.u.weight.dtype
    assert_near(low.u.weight.grad.flatten(1), (gradient @ v.T).to(dtype), 4 * tolerance)
    assert_near(low.v.weight.grad.flatten(1), (u.T @ gradient).to(dtype), 4 * tolerance)
    if dense.bias is not None and dense.bias is not low.u.bias:
        assert_near(low.u.bias.grad, dense.bias.grad, tolerance)


LINEAR = [(16, 16), (4, 16), (16, 4), (7, 5), (1, 3), (3, 1)]
INPUTS = {
    "1-D": (),
    "2-D": (3,),
    "3-D": (2, 3),
    "4-D": (2, 1, 3),
    "empty": (0,),
    "empty 3-D": (2, 0),
}


@pytest.mark.parametrize("shape", LINEAR)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", INPUTS.values(), ids=INPUTS)
def test_a_linear_layer_at_full_rank_is_the_dense_one(
    shape: tuple[int, int], bias: bool, leading: tuple[int, ...]
) -> None:
    dense = filled(nn.Linear(*shape, bias=bias, dtype=torch.float64))
    low = stand_in(copy.deepcopy(dense), full_rank(dense))
    x = noise(*leading, shape[0], seed=1, dtype=torch.float64)
    assert_same_function(low, dense, x, 1e-11)


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "1x1": {"kernel_size": 1},
    "1x1 stride": {"kernel_size": 1, "stride": 2},
    "non-square": {"kernel_size": (1, 3), "padding": (0, 2)},
    "stride": {"stride": (2, 1)},
    "dilation": {"dilation": (1, 2), "padding": 2},
    "all": {"stride": 2, "dilation": 2, "padding": (2, 1), "bias": False},
    "same": {"padding": "same", "dilation": 2},
    "same even": {"padding": "same", "kernel_size": (2, 4)},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": (1, 2), "padding_mode": "replicate", "stride": 2},
    "circular same": {"padding": "same", "padding_mode": "circular"},
    "wide": {"in_channels": 2, "out_channels": 30},
    "narrow": {"in_channels": 9, "out_channels": 2},
}


def conv(dtype: torch.dtype = torch.float64, **options: Any) -> nn.Conv2d:
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "dtype": dtype} | options
    return filled(nn.Conv2d(**options))


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("layout", ["plain", "channels_last", "unbatched", "empty"])
# torch itself warns that an even kernel with "same" copies the input.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_convolution_at_full_rank_is_the_dense_one(options: dict[str, Any], layout: str) -> None:
    dense: Any = conv(**options)
    batch = {"unbatched": (), "empty": (0,)}.get(layout, (2,))
    x = noise(*batch, dense.in_channels, 8, 9, seed=1, dtype=torch.float64)
    if layout == "channels_last":
        dense = dense.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    low = stand_in(copy.deepcopy(dense), full_rank(dense))
    if layout == "empty" and dense.padding_mode != "zeros":
        pytest.skip("torch pads no empty batch in this mode")
    assert_same_function(low, dense, x, 1e-11)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_output_has_the_memory_format_of_the_dense_one(
    channels: int, kernel: int, layout: torch.memory_format
) -> None:
    dense: Any = conv(torch.float32, in_channels=channels, kernel_size=kernel)
    dense = dense.to(memory_format=layout)
    low = stand_in(dense, 1)
    for x in (noise(2, channels, 8, 9), noise(2, 8, 9, channels).movedim(-1, 1)):
        assert low(x).stride() == dense(x).stride()
    assert low.to_dense().weight.stride() == dense.weight.stride()


@st.composite
def drawn_layers(draw: st.DrawFn) -> tuple[Any, int, Tensor]:
    """A dense layer, a rank that fits it and an input, all drawn."""
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 999))
    if draw(st.booleans()):
        inputs, outputs = draw(st.integers(1, 24)), draw(st.integers(1, 24))
        dense: Any = nn.Linear(inputs, outputs, bias=draw(st.booleans()), dtype=dtype)
        leading = draw(st.lists(st.integers(0, 4), max_size=3))
        x = noise(*leading, inputs, seed=seed, dtype=dtype)
    else:
        inputs, outputs = draw(st.integers(1, 6)), draw(st.integers(1, 8))
        pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
        dense = nn.Conv2d(
            inputs,
            outputs,
            draw(pair),
            draw(pair),
            draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
            draw(pair),
            bias=draw(st.booleans()),
            dtype=dtype,
        )
        size = (draw(st.integers(7, 9)), draw(st.integers(7, 9)))
        x = noise(draw(st.integers(1, 2)), inputs, *size, seed=seed, dtype=dtype)
        if draw(st.booleans()):
            dense = dense.to(memory_format=torch.channels_last)
        if draw(st.booleans()):
            x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    dense = filled(dense, seed)
    return dense, draw(st.integers(1, full_rank(dense))), x


@given(drawn_layers())
@settings(max_examples=60)
def test_at_every_rank_the_layer_is_the_dense_one_of_its_product(drawn: Any) -> None:
    dense, rank, x = drawn
    low = stand_in(dense, rank)
    product = low.to_dense()
    product.bias = copy.deepcopy(product.bias)
    assert_same_function(low, product, x, ROUNDING[x.dtype])


@given(drawn_layers())
@settings(max_examples=40)
def test_the_product_is_the_best_approximation_of_the_dense_weight(drawn: Any) -> None:
    dense, rank, _ = drawn
    low = stand_in(dense, rank)
    weight = dense.weight.detach().flatten(1).double()
    tail = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()
    u, v = low.factors()
    error = (weight - u.double() @ v.double()).norm()
    slack = ROUNDING[dense.weight.dtype] * (1 + float(weight.norm()))
    assert_close(error, tail, rtol=0, atol=slack)
    assert_near((u.T @ u).double(), (v @ v.T).double(), 2 * slack)


@given(drawn_layers())
@settings(max_examples=40)
def test_a_layer_stores_rank_times_rows_plus_columns(drawn: Any) -> None:
    dense, rank, _ = drawn
    low, matrix = stand_in(dense, rank), dense.weight.flatten(1)
    bias = 0 if dense.bias is None else dense.bias.numel()
    assert sum(p.numel() for p in low.parameters()) == rank * sum(matrix.shape) + bias
    assert {p.dtype for p in low.parameters()} == {dense.weight.dtype}
    assert low.weight_shape == tuple(dense.weight.shape)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_the_weight_property_is_the_differentiable_product(kind: str) -> None:
    dense = filled(nn.Linear(5, 7)) if kind == "linear" else conv(torch.float32)
    low = stand_in(dense, 3)
    cotangent = noise(*dense.weight.shape, seed=3)
    assert low.weight.shape == dense.weight.shape
    low.weight.backward(cotangent)
    u, v = low.u.weight.flatten(1), low.v.weight.flatten(1)
    flat = cotangent.flatten(1)
    assert_near(low.weight.flatten(1), u @ v, 1e-6)
    assert_near(low.u.weight.grad.flatten(1), flat @ v.T, 1e-5)
    assert_near(low.v.weight.grad.flatten(1), u.T @ flat, 1e-5)
    assert low.bias is dense.bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_dtype_requires_grad_mode_and_bias_survive_there_and_back(
    dtype: torch.dtype, trainable: bool, training: bool
) -> None:
    dense = filled(nn.Linear(6, 4, dtype=dtype)).train(training)
    dense.weight.requires_grad_(trainable)
    low = stand_in(dense, 2, norm=True)
    assert {p.dtype for p in low.parameters()} == {dtype}
    assert {p.requires_grad for p in low.new_parameters()} == {trainable}
    assert {m.training for m in low.modules()} == {training}
    assert low.u.bias is dense.bias
    back = low.to_dense()
    assert (back.weight.dtype, back.weight.requires_grad) == (dtype, trainable)
    assert (back.training, type(back)) == (training, nn.Linear)
    assert [n for n, _ in back.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_layer_with_norm_is_frozen_after_the_way_back(bias: bool) -> None:
    low = stand_in(filled(nn.Linear(6, 4, bias=bias)).requires_grad_(False), 2, norm=True)
    assert not any(p.requires_grad for p in low.to_dense().parameters())


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_to_dense_keeps_the_function_of_a_convolution(options: dict[str, Any]) -> None:
    low = stand_in(conv(**options), 2)
    x = noise(2, low.in_channels, 8, 9, dtype=torch.float64)
    assert_near(low.to_dense()(x), low(x), 1e-11)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("bias", [True, False])
def test_to_dense_folds_the_norm_of_evaluation_mode(kind: str, bias: bool) -> None:
    dense = filled(nn.Linear(5, 7, bias=bias, dtype=torch.float64))
    x = noise(9, 5, seed=5, dtype=torch.float64)
    if kind == "conv2d":
        dense, x = conv(bias=bias), noise(3, 4, 8, 8, seed=5, dtype=torch.float64)
    low = stand_in(dense, 3, norm=True)
    low(x)  # moves the running statistics away from 0 and 1
    low.eval()
    before = copy.deepcopy(low.state_dict())
    product = low.to_dense()
    assert_near(product(x), low(x), 1e-11)
    assert_near(low.weight, product.weight, 1e-11)
    assert_near(low.bias, product.bias, 1e-11)
    after = low.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_norm_by_the_batch_has_no_single_weight() -> None:
    low = stand_in(nn.Linear(5, 7), 3, norm=True)
    for read in (lambda: low.weight, lambda: low.bias):
        with pytest.raises(LifeCycleError, match=r"3 codes.*call eval\(\) first"):
            read()


@pytest.mark.parametrize("rank", [1, 2, 16, 128])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_built_directly_the_product_has_a_dense_layers_variance_at_every_rank(
    rank: int, kind: str
) -> None:
    torch.manual_seed(rank)  # torch's initialisers draw from the global generator
    low = LowRankLinear(300, 400, rank) if kind == "linear" else LowRankConv2d(34, 300, 3, rank)
    fan_in = low.v.weight[0].numel()
    expected = torch.tensor(1 / (3 * fan_in))
    assert_close(low.weight.detach().var(), expected, rtol=0.3 / rank**0.5 + 0.02, atol=0)
    assert float(low.u.bias.detach().abs().max()) <= fan_in**-0.5


@pytest.mark.parametrize("rank", [1, 8, 64, 150])
def test_variance_init_keeps_the_dense_variance_and_spectral_that_of_the_values_kept(
    rank: int,
) -> None:
    dense = filled(nn.Linear(200, 150, dtype=torch.float64))
    variance = dense.weight.detach().var(correction=0)
    drawn = stand_in(dense, rank, init="variance", generator=generator(rank))
    spread = 0.5 if rank == 1 else 0.3 / rank**0.5 + 0.03
    assert_close(drawn.weight.detach().var(), variance, rtol=spread, atol=0)
    kept = torch.linalg.svdvals(dense.weight.detach())[:rank].square().sum()
    product = stand_in(dense, rank).weight.detach()
    assert_close(product.square().sum(), kept, rtol=1e-10, atol=0)


def test_variance_init_is_a_function_of_its_generator() -> None:
    dense = filled(nn.Linear(6, 5))
    state = torch.random.get_rng_state()
    first, second, other = (
        stand_in(dense, 3, init="variance", generator=generator(seed)).weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_spectral_init_draws_no_random_number() -> None:
    state = torch.random.get_rng_state()
    stand_in(filled(nn.utils.skip_init(nn.Linear, 6, 5)), 3)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("init", ["spectral", "variance"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_the_meta_device_gives_shapes_without_memory(kind: str, init: str, norm: bool) -> None:
    with torch.device("meta"):
        dense = nn.Linear(5, 7) if kind == "linear" else nn.Conv2d(4, 6, 3)
        x = torch.empty(2, 5) if kind == "linear" else torch.empty(2, 4, 8, 8)
    low = stand_in(dense, 3, init=init, norm=norm).eval()
    assert {t.device.type for t in low.state_dict().values()} == {"meta"}
    assert low(x).shape == dense(x).shape
    assert low.weight.shape == dense.weight.shape
    assert low.to_dense().weight.is_meta


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("norm", [False, True])
def test_spec_and_state_rebuild_the_layer(kind: str, norm: bool) -> None:
    dense, x = filled(nn.Linear(5, 7)), noise(4, 5)
    if kind == "conv2d":
        dense, x = conv(torch.float32, stride=2), noise(4, 4, 8, 8)
    low = stand_in(dense, 3, norm=norm)
    low(x)
    fresh = KINDS[kind].from_spec(copy.deepcopy(dense), low.spec())
    fresh.load_state_dict(low.state_dict())
    assert fresh.spec() == low.spec()
    assert torch.equal(fresh.eval()(x), low.eval()(x))


def test_parameters_come_in_the_dense_order_with_the_bias_last() -> None:
    names = [n for n, _ in stand_in(nn.Linear(4, 4), 2, norm=True).named_parameters()]
    assert names == ["v.weight", "norm.weight", "norm.bias", "u.weight", "u.bias"]


def test_deepcopy_and_functional_call_see_the_factors() -> None:
    low, x = stand_in(filled(nn.Linear(5, 7)), 3), noise(4, 5)
    twin = copy.deepcopy(low)
    assert torch.equal(twin(x), low(x))
    with torch.no_grad():
        twin.v.weight.mul_(2)
    assert not torch.equal(twin(x), low(x))
    state = {name: 2 * p for name, p in low.named_parameters()}
    bias = low.u.bias
    assert_near(functional_call(low, state, (x,)), 4 * (low(x) - bias) + 2 * bias, 1e-5)


class Net(nn.Module):
    """A convolution, a Linear on three dimensions and one on two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = stand_in(conv(torch.float32, stride=2, padding=1), 3, norm=True)
        self.tokens = stand_in(filled(nn.Linear(6, 8)), 4)
        self.out = stand_in(filled(nn.Linear(8, 3)), 2, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(self.conv(x).flatten(2).mT)
        return self.out(tokens.relu().mean(1)) + self.tokens.weight.sum()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
# Dynamo's own, about the interpreter's future.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compilers_take_the_layers_without_a_graph_break(backend: str, training: bool) -> None:
    torch._dynamo.reset()
    model, x = Net().train(training), noise(4, 4, 6, 6)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    y, dx = outputs_and_gradients(reference, x)
    y_compiled, dx_compiled = outputs_and_gradients(compiled, x)
    assert_near(y_compiled, y, 1e-5)
    assert_near(dx_compiled, dx, 1e-5)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert_near(p.grad, q.grad, 1e-5)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_type_and_grows_float32_gradients(autocast: torch.dtype) -> None:
    dense, x = filled(nn.Linear(12, 10)), noise(4, 12)
    low = stand_in(dense, 10)
    with torch.autocast("cpu", dtype=autocast):
        y, expected = low(x), dense(x)
    y.float().sum().backward()
    assert y.dtype == autocast
    assert_near(y, expected, ROUNDING[autocast])
    assert {p.grad.dtype for p in low.parameters()} == {torch.float32}


@pytest.mark.parametrize("rank", [0, -1, 5, 2.0, "3", True, None])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_rank_that_does_not_fit_is_refused_with_the_range(kind: str, rank: Any) -> None:
    dense = nn.Linear(9, 4) if kind == "linear" else nn.Conv2d(1, 4, 3)
    build = (
        (lambda: LowRankLinear(9, 4, rank))
        if kind == "linear"
        else (lambda: LowRankConv2d(1, 4, 3, rank))
    )
    for attempt in (build, lambda: stand_in(dense, rank)):
        with pytest.raises(PlanError, match=r"1 to 4"):
            attempt()


def test_an_unknown_initialisation_names_the_closest() -> None:
    with pytest.raises(OptionError, match="did you mean 'variance'"):
        stand_in(nn.Linear(4, 4), 2, init="varience")


@pytest.mark.parametrize("init", ["spectral", "variance"])
def test_weights_that_are_not_finite_are_refused(init: str) -> None:
    dense = filled(nn.Linear(4, 4))
    dense.weight.data[0, 0] = float("nan")
    with pytest.raises(FactorizeError, match=r"not finite|variance nan"):
        stand_in(dense, 2, init=init)


def test_a_zero_weight_splits_but_has_no_variance_to_keep() -> None:
    dense = filled(nn.Linear(4, 4))
    dense.weight.data.zero_()
    assert_close(stand_in(dense, 2).weight, torch.zeros(4, 4), rtol=0, atol=0)
    with pytest.raises(FactorizeError, match="variance 0"):
        stand_in(dense, 2, init="variance")


def test_the_factors_of_a_non_contiguous_weight_are_its_own() -> None:
    dense = nn.Linear(6, 4)
    dense.weight = nn.Parameter(noise(6, 4).T)
    wide = nn.Linear(6, 4)
    wide.weight = nn.Parameter(noise(4, 1).expand(4, 6))
    for layer, rank in ((dense, 4), (wide, 1)):
        assert_near(stand_in(layer, rank).weight, layer.weight, 1e-6)


def test_factors_of_another_shape_are_refused() -> None:
    low = LowRankLinear(6, 4, 3)
    u, v = low.factors()
    for wrong in ((u.T, v), (u, v.T), (u[:, :2], v[:2])):
        with pytest.raises(PlanError, match=r"factor of shape .* does not fit the map"):
            low.set_factors(*wrong)


def test_a_dense_weight_cannot_be_set_over_the_factors() -> None:
    low = stand_in(filled(nn.Linear(4, 4)), 2)
    with pytest.raises(KeyError, match="already exists"):
        low.weight = nn.Parameter(torch.zeros(4, 4))
    assert isinstance(low, LowRankLayer)
