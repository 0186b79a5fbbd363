"""Laws that hold for every low-rank class in every form, each against torch's own dense layer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from rankwise.errors import FactorizeError, LifeCycleError, PlanError
from rankwise.layers import KINDS, Form, LowRankLayer, low_rank_class

DOUBLE: Any = {"dtype": torch.float64}


@dataclass(frozen=True)
class Case:
    """A dense layer, the shape of a batch for it, and the form of its stand-in."""

    make: Callable[[], Any]
    batch: tuple[int, ...]
    separable: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def dense(self) -> Any:
        return filled(self.make())

    def stand_in(self, dense: Any) -> type[LowRankLayer]:
        kind = low_rank_class(dense, Form(separable=self.separable))
        assert isinstance(kind, type), kind
        return kind

    def full_rank(self, dense: Any) -> int:
        return min(self.stand_in(dense).matrix_shape(dense, self.options.get("blocks", 1)))

    def low(self, dense: Any, rank: int | None = None, **options: Any) -> Any:
        rank = self.full_rank(dense) if rank is None else rank
        return self.stand_in(dense).from_dense(dense, rank, **(self.options | options))

    def input(self, seed: int = 1) -> Tensor:
        return noise(*self.batch, seed=seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def filled(module: Any, seed: int = 0) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            drawn = noise(*parameter.shape, seed=seed + i)
            parameter.copy_(drawn / max(1, parameter[0].numel()) ** 0.5)
    return module


CORE = {"core": True}
CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(7, 12, **DOUBLE), (2, 3, 7)),
    "linear 1-D": Case(lambda: nn.Linear(12, 7, **DOUBLE), (12,)),
    "linear core": Case(lambda: nn.Linear(7, 12, **DOUBLE), (3, 7), options=CORE),
    "linear blocks": Case(lambda: nn.Linear(7, 12, **DOUBLE), (2, 3, 7), options={"blocks": 3}),
    "linear blocks 1-D": Case(
        lambda: nn.Linear(5, 12, bias=False, **DOUBLE), (5,), options={"blocks": 2, **CORE}
    ),
    "conv1d": Case(lambda: nn.Conv1d(4, 6, 3, 2, 1, **DOUBLE), (2, 4, 9)),
    "conv1d groups": Case(
        lambda: nn.Conv1d(6, 9, 3, padding="same", groups=3, **DOUBLE), (2, 6, 7), options=CORE
    ),
    "conv1d unbatched": Case(lambda: nn.Conv1d(4, 6, 1, bias=False, **DOUBLE), (4, 9)),
    "conv1d circular": Case(
        lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular", **DOUBLE), (2, 4, 9)
    ),
    "conv2d": Case(lambda: nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), **DOUBLE), (2, 4, 8, 7)),
    "conv2d core": Case(
        lambda: nn.Conv2d(4, 6, 3, dilation=(1, 2), padding=2, **DOUBLE), (2, 4, 8, 7), options=CORE
    ),
    "conv2d groups": Case(
        lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2, padding_mode="reflect", **DOUBLE), (2, 4, 8, 7)
    ),
    "conv2d groups wide": Case(
        lambda: nn.Conv2d(4, 24, 1, groups=2, bias=False, **DOUBLE), (4, 8, 7)
    ),
    "conv3d": Case(
        lambda: nn.Conv3d(2, 5, (1, 3, 2), (1, 2, 1), (0, 1, 1), **DOUBLE), (2, 2, 3, 5, 4)
    ),
    "conv3d groups": Case(
        lambda: nn.Conv3d(4, 6, (1, 3, 1), padding="same", groups=2, dilation=2, **DOUBLE),
        (2, 4, 3, 5, 4),
        options=CORE,
    ),
    "separable": Case(lambda: nn.Conv2d(3, 5, 3, padding=1, **DOUBLE), (2, 3, 8, 7), True),
    "separable asymmetric": Case(
        lambda: nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 0), (1, 2), bias=False, **DOUBLE),
        (2, 3, 8, 7),
        True,
    ),
    "separable asymmetric 2": Case(
        lambda: nn.Conv2d(3, 5, (2, 3), (1, 2), (0, 2), (3, 1), **DOUBLE), (3, 8, 7), True, CORE
    ),
    "separable same": Case(
        lambda: nn.Conv2d(3, 5, (5, 3), padding="same", dilation=2, **DOUBLE), (2, 3, 8, 7), True
    ),
    "separable valid": Case(
        lambda: nn.Conv2d(3, 5, (4, 3), padding="valid", **DOUBLE), (2, 3, 8, 7), True
    ),
    "separable 1x1": Case(lambda: nn.Conv2d(3, 5, 1, 2, **DOUBLE), (2, 3, 8, 7), True),
    **{
        f"separable {mode}": Case(
            lambda mode=mode: nn.Conv2d(3, 5, 3, 2, (1, 2), padding_mode=mode, **DOUBLE),
            (2, 3, 8, 7),
            True,
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "transposed 1d": Case(lambda: nn.ConvTranspose1d(6, 4, 3, 2, 1, 1, **DOUBLE), (2, 6, 5)),
    "transposed 2d": Case(
        lambda: nn.ConvTranspose2d(5, 3, (3, 2), (2, 1), (1, 0), (1, 0), **DOUBLE), (2, 5, 4, 3)
    ),
    "transposed 2d groups": Case(
        lambda: nn.ConvTranspose2d(6, 4, 2, 2, groups=2, dilation=2, bias=False, **DOUBLE),
        (2, 6, 4, 3),
        options=CORE,
    ),
    "transposed 3d": Case(lambda: nn.ConvTranspose3d(6, 2, 2, 2, **DOUBLE), (2, 6, 2, 3, 2)),
}
NORM = [n for n, c in CASES.items() if not c.separable and not n.startswith("transposed")]
BATCHED = [n for n, c in CASES.items() if len(c.batch) == c.dense().weight.dim()]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def gradients(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(noise(*y.shape, seed=9))
    assert x.grad is not None
    return y.detach(), x.grad


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_the_cases_cover_every_class() -> None:
    covered = {case.stand_in(case.dense()).kind for case in CASES.values()}
    assert covered >= {k for k in KINDS if "conv" in k} | {"linear"}


@every_case
@pytest.mark.parametrize("training", [True, False])
def test_at_full_rank_the_layer_is_the_dense_one(case: Case, training: bool) -> None:
    dense = case.dense().train(training)
    low = case.low(copy.deepcopy(dense))
    assert low.training is training
    close(gradients(low, case.input()), gradients(dense, case.input()))
    close(low.weight, dense.weight)
    if dense.bias is not None:
        close(low.u.bias.grad, dense.bias.grad)


@every_case
@pytest.mark.parametrize("rank", [1, 2])
def test_at_every_rank_it_is_the_dense_layer_of_its_product(case: Case, rank: int) -> None:
    """Outputs, input gradients, and the factors' gradients as autograd finds them in W = U V."""
    low = filled(case.low(case.dense(), min(rank, case.full_rank(case.dense()))), seed=20)
    dense = low.to_dense()
    assert type(dense) is type(case.dense())
    x = case.input()
    y, dx = gradients(low, x)
    own = {p: p.grad for p in low.parameters()}
    low.zero_grad()
    x = x.clone().requires_grad_()
    product = functional_call(dense, {"weight": low.weight, "bias": low.bias}, (x,))
    product.backward(noise(*y.shape, seed=9))
    close(y, product)
    close(dx, x.grad)
    for parameter, gradient in own.items():
        close(gradient, parameter.grad)
    close(dense(case.input()), y)


@every_case
def test_the_product_is_the_best_approximation_of_every_block(case: Case) -> None:
    dense = case.dense()
    rank = max(1, case.full_rank(dense) // 2)
    low = case.low(dense, rank)
    matrix = low.as_matrix(dense.weight.detach(), low.blocks)
    kept = low.as_matrix(low.weight.detach(), low.blocks)
    tail = torch.linalg.svdvals(matrix)[..., rank:].square().sum(-1).sqrt()
    close(torch.linalg.matrix_norm(matrix - kept), tail)
    spectra = [torch.linalg.svdvals(factor) for factor in low.factors()]
    for spectrum in spectra:  # balanced: the square root, or with a core the third power, in each
        close(spectrum ** len(spectra), torch.linalg.svdvals(matrix)[..., :rank])


@every_case
def test_weight_and_matrix_children_and_factors_are_views_of_each_other(case: Case) -> None:
    dense = case.dense()
    low = case.low(dense, 1)
    matrix = low.as_matrix(dense.weight, low.blocks)
    assert torch.equal(low.as_weight(matrix), dense.weight)
    assert tuple(matrix.shape[-2:]) == low.matrix_shape(dense, case.options.get("blocks", 1))
    assert matrix.dim() == (2 if low.blocks == 1 else 3)
    for part, factor in zip(low.parts, low.factors(), strict=True):
        weight = getattr(low, part).weight
        assert torch.equal(low.from_factor(part, low.to_factor(part, weight)), weight)
        assert torch.equal(low.to_factor(part, weight), factor)
    changed = [noise(*f.shape, seed=i) for i, f in enumerate(low.factors())]
    low.set_factors(*changed)
    close(list(low.factors()), changed)
    if case.separable:
        o, h, i, w = 1, 1, 2, 0
        columns, rows = dense.kernel_size[1], dense.kernel_size[0]
        if rows > 1:
            assert matrix[o * rows + h, i * columns + w] == dense.weight[o, i, h, w]


@every_case
def test_it_stores_rank_times_rows_plus_columns_for_every_block(case: Case) -> None:
    dense = case.dense()
    low = case.low(dense, 1)
    rows, columns = low.matrix_shape(dense, case.options.get("blocks", 1))
    bias = 0 if dense.bias is None else dense.bias.numel()
    expected = low.blocks * (rows + columns + (1 if "core" in case.options else 0)) + bias
    assert sum(p.numel() for p in low.parameters()) == expected
    assert low.blocks * rows * columns == dense.weight.numel()
    names = [name for name, _ in low.named_parameters()]
    order = ["v.weight", "core.weight", "u.weight", "u.bias"]
    assert names == [n for n in order if n in names]
    assert low.new_parameters()[-1] is low.u.weight


@every_case
def test_first_moments_are_carried_by_the_chain_rule(case: Case) -> None:
    """Carried, the gradient of the dense weight is that of the factors."""
    low = case.low(case.dense(), 1)
    dense = low.to_dense()
    gradients(dense, case.input())
    gradients(low, case.input())
    carried = low.moments().first(dense.weight.grad)
    for parameter, moment in zip(low.new_parameters(), carried, strict=True):
        close(moment, parameter.grad)


@pytest.mark.parametrize("name", ["linear blocks", "linear core", "separable", "transposed 2d"])
def test_second_moments_are_the_expectation_for_uncorrelated_gradients(name: str) -> None:
    low = CASES[name].low(CASES[name].dense(), 2)
    scale = noise(*low.weight_shape, seed=4).abs()
    carry = low.moments()
    drawn = [carry.first(scale * noise(*scale.shape, seed=i)) for i in range(100, 3100)]
    columns = [torch.stack(column).square().mean(0) for column in zip(*drawn, strict=True)]
    for mean, moment in zip(columns, carry.second(scale.square(), None), strict=True):
        assert_close(moment, mean, rtol=0.2, atol=0)
    # Where all gradients agree, the square of the first moment is the bound: no step above lr.
    steady = torch.ones_like(scale)
    for first, second in zip(carry.first(steady), carry.second(steady, steady), strict=True):
        assert bool((first.abs() <= second.sqrt() * (1 + 1e-12)).all())


@every_case
@pytest.mark.parametrize("norm", [False, True])
def test_spec_and_state_rebuild_the_layer(case: Case, norm: bool) -> None:
    dense = case.dense()
    if norm and next(n for n, c in CASES.items() if c is case) not in NORM:
        with pytest.raises(FactorizeError, match="takes no norm"):
            case.low(dense, 1, norm=True)
        return
    low = case.low(dense, 1, norm=norm)
    spec = json.loads(json.dumps(low.spec()))
    fresh = KINDS[low.kind].from_spec(case.dense(), spec)
    fresh.load_state_dict(low.state_dict())
    assert fresh.spec() == low.spec()
    assert torch.equal(fresh.eval()(case.input()), low.eval()(case.input()))
    twin = copy.deepcopy(low)
    assert torch.equal(twin(case.input()), low(case.input()))
    assert repr(low).startswith(type(low).__name__)


@every_case
def test_factors_of_another_number_or_shape_are_refused(case: Case) -> None:
    low = case.low(case.dense(), 1)
    factors = low.factors()
    with pytest.raises(PlanError, match=f"has {len(factors)} factors; {len(factors) + 1} were"):
        low.set_factors(*factors, factors[0])
    with pytest.raises(PlanError, match=r"does not fit the map of .* which is "):
        low.set_factors(factors[0][..., :-1, :], *factors[1:])


def test_a_spec_from_before_cores_and_blocks_is_of_a_plain_layer() -> None:
    low = CASES["linear"].low(CASES["linear"].dense(), 2)
    old = {"kind": "linear", "shape": [12, 7], "rank": 2, "norm": False}
    assert KINDS["linear"].from_spec(CASES["linear"].dense(), old).spec() == low.spec()


@pytest.mark.parametrize("name", NORM)
def test_to_dense_folds_the_norm_of_evaluation_mode(name: str) -> None:
    case = CASES[name]
    low = case.low(case.dense(), norm=True)
    with pytest.raises(LifeCycleError, match=f"its {low.rank * low.blocks} codes"):
        _ = low.weight
    with torch.no_grad():
        low.norm.running_mean.copy_(noise(low.rank * low.blocks))
        low.norm.running_var.copy_(noise(low.rank * low.blocks).square())
        low.norm.bias.copy_(noise(low.rank * low.blocks, seed=3))
        low.norm.weight.copy_(noise(low.rank * low.blocks, seed=4))
    low.eval()
    dense = low.to_dense()
    close(dense(case.input()), low(case.input()))
    close(low.weight, dense.weight)
    close(low.bias, dense.bias)


@every_case
def test_the_meta_device_gives_shapes_without_memory(case: Case) -> None:
    dense = case.dense().to("meta")
    low = case.low(dense, 1)
    assert {t.device.type for t in low.state_dict().values()} == {"meta"}
    x = torch.empty(case.batch, device="meta", dtype=torch.float64)
    assert low(x).shape == dense(x).shape
    assert low.weight.shape == dense.weight.shape
    assert low.to_dense().weight.is_meta
    assert low.moments().first(dense.weight)[0].is_meta


# torch pads no empty batch in the other modes.
@pytest.mark.parametrize(
    "name",
    [n for n in BATCHED if getattr(CASES[n].dense(), "padding_mode", "zeros") == "zeros"],
)
def test_an_empty_batch_passes_as_in_the_dense_layer(name: str) -> None:
    case = CASES[name]
    dense = case.dense()
    x = case.input()[:0]
    assert case.low(dense, 1)(x).shape == dense(x).shape


@every_case
def test_attributes_that_parents_read_are_the_dense_layers(case: Case) -> None:
    dense = case.dense()
    low = case.low(dense, 1)
    for name in type(low).settings:
        assert getattr(low, name) == getattr(dense, name)


def test_attributes_of_a_layer_built_directly_are_those_of_torchs() -> None:
    arguments: Any = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}
    for kind in KINDS.values():
        if "kernel_size" in kind.settings:
            low: Any = kind(rank=2, **arguments)
            dense: Any = kind.dense_class(**arguments)
            assert {n: getattr(low, n) for n in kind.settings} == {
                n: getattr(dense, n) for n in kind.settings
            }


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_rounds_but_does_not_change_the_layer(
    case: Case, dtype: torch.dtype
) -> None:
    dense = case.dense().to(dtype)
    low = case.low(dense)
    assert {p.dtype for p in low.parameters()} == {dtype}
    assert low.weight.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 6e-2
    x = case.input().to(dtype)
    assert_close(low(x), dense(x), rtol=tolerance, atol=tolerance)


@every_case
def test_non_contiguous_and_expanded_weights_are_factorised_as_they_are(case: Case) -> None:
    strided, expanded = case.dense(), case.dense()
    weight = strided.weight.detach()
    turned = weight.transpose(0, -1).contiguous().transpose(0, -1)
    strided.weight = nn.Parameter(turned)
    close(case.low(strided).weight, weight)
    flat = noise(*(1 for _ in weight.shape)).expand(weight.shape)
    expanded.weight = nn.Parameter(flat)
    close(case.low(expanded, 1).weight, flat)


@every_case
def test_a_zero_weight_gives_zero_and_nan_is_refused(case: Case) -> None:
    dense = case.dense()
    dense.weight.data.zero_()
    close(case.low(dense).weight, torch.zeros_like(dense.weight))
    dense.weight.data.view(-1)[-1] = float("nan")
    with pytest.raises(FactorizeError, match=f"1 of {dense.weight.numel()} weights"):
        case.low(dense)


@every_case
def test_a_rank_beyond_a_blocks_full_rank_is_refused(case: Case) -> None:
    dense = case.dense()
    full = case.full_rank(dense)
    for rank in (0, full + 1):
        with pytest.raises(PlanError, match=f"1 to {full}"):
            case.low(dense, rank)


@pytest.mark.parametrize("name", BATCHED)
def test_the_output_has_the_memory_format_of_the_dense_one(name: str) -> None:
    case = CASES[name]
    dense, x = case.dense(), case.input()
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None:
        assert case.low(dense, 1)(x).stride() == dense(x).stride()
        return
    dense = dense.to(memory_format=last)
    low = case.low(dense, 1)
    for layout in (torch.contiguous_format, last):
        y = x.contiguous(memory_format=layout)
        assert low(y).stride() == dense(y).stride()
    assert low.to_dense().weight.stride() == dense.weight.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [(3, 1), (1, 3), (1, 1)])
def test_one_channel_tells_no_format_by_itself(
    kernel: tuple[int, int], layout: torch.memory_format
) -> None:
    """Strides of a map with one channel and one tap are those of either format."""
    dense = filled(nn.Conv2d(1, 5, kernel, **DOUBLE)).to(memory_format=layout)
    case = Case(lambda: dense, (2, 1, 8, 7), separable=True)
    low = case.low(dense)
    assert low(case.input()).stride() == dense(case.input()).stride()
    assert low.to_dense().weight.stride() == dense.weight.stride()


@pytest.mark.parametrize("size", [[9, 7], [10, 8]])
def test_a_transposed_convolution_takes_an_output_size(size: list[int]) -> None:
    dense = filled(nn.ConvTranspose2d(5, 3, 3, 2, 1, **DOUBLE))
    case = Case(lambda: dense, (2, 5, 5, 4))
    low, x = case.low(dense), case.input()
    close(low(x, output_size=size), dense(x, output_size=size))
    assert list(low(x, size).shape[-2:]) == size
    with pytest.raises(ValueError, match="requested an output size"):
        low(x, output_size=[20, 20])


class Together(nn.Module):
    """Layers side by side, each with an input of its own."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        parts = zip(self.layers, inputs, strict=True)
        return torch.stack([layer(x).square().mean() for layer, x in parts])


# Dynamo's own, about the interpreter's future.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compilers_take_every_class_without_a_graph_break() -> None:
    torch._dynamo.reset()
    model = Together([case.low(case.dense(), 1) for case in CASES.values()])
    inputs = [case.input() for case in CASES.values()]
    expected = model(*inputs)
    expected.sum().backward()
    grown = [p.grad for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(*inputs)
    actual.sum().backward()
    close(actual, expected)
    close([p.grad for p in model.parameters()], grown)
