"""Each initialisation's product has the variance that its formula says, at every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rankwise.errors import FactorizeError, OptionError
from rankwise.layers import (
    INITS,
    Form,
    LowRankConv1d,
    LowRankConv3d,
    LowRankConvTranspose2d,
    LowRankLinear,
    LowRankSeparableConv2d,
    low_rank_class,
)

RANDOM = ("variance", "orthogonal", "loralinear", "default")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(module: Any, seed: int = 0) -> Any:
    """Weights far from torch's default in scale, so that keeping it and ignoring it differ."""
    source = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) / 3)
    return module


def stand_in(dense: Any, rank: int, init: str, separable: bool = False, **options: Any) -> Any:
    kind = low_rank_class(dense, Form(separable=separable))
    assert isinstance(kind, type)
    options = {"generator": generator(rank)} | options
    return kind.from_dense(dense, rank, init=init, **options)


def matrices(low: Any) -> Tensor:
    """The product as (B, M, N)."""
    matrix = low.as_matrix(low.weight.detach(), low.blocks)
    return matrix if matrix.dim() == 3 else matrix[None]


def mean_square(low: Any) -> Tensor:
    return matrices(low).square().mean(dim=(-2, -1))


def predicted(init: str, low: Any, dense: Any) -> Tensor:
    """Of an entry of the product, by the formula, for every block."""
    weight = low.as_matrix(dense.weight.detach(), low.blocks)
    weight = weight if weight.dim() == 3 else weight[None]
    rank, fan_in, size = low.rank, dense.weight[0].numel(), weight[0].numel()
    third = 1 if low.core is None else 3
    spectrum = torch.linalg.svdvals(weight)[:, :rank]
    return {
        "spectral": spectrum.square().sum(-1) / size,
        "spectral_ones": torch.full((low.blocks,), rank / size),
        "variance": weight.var(dim=(-2, -1), correction=0),
        "orthogonal": weight.square().mean(dim=(-2, -1)),
        "loralinear": torch.full((low.blocks,), 1 / (9 * third * rank)),
        "default": torch.full((low.blocks,), 1 / (9 * third * fan_in)),
    }[init]


SHAPES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(300, 200), {}),
    "linear core": (lambda: nn.Linear(300, 200), {"core": True}),
    "linear blocks": (lambda: nn.Linear(200, 600), {"blocks": 3}),
    "conv2d": (lambda: nn.Conv2d(32, 150, 3), {}),
    "conv2d groups": (lambda: nn.Conv2d(60, 260, 3, groups=2), {}),
    "separable": (lambda: nn.Conv2d(90, 80, (3, 2)), {"separable": True}),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("init", INITS)
def test_the_products_variance_follows_the_formula_at_every_rank(
    shape: tuple[Callable[[], Any], dict[str, Any]], init: str
) -> None:
    make, options = shape
    # A core of 2 x 2 numbers says nothing about their variance.
    for rank in (8, 32, 128) if "core" in options else (2, 16, 128):
        dense = filled(make())
        low = stand_in(dense, rank, init, **options)
        exact = init in ("spectral", "spectral_ones", "orthogonal")
        spread = 1e-4 if exact else 0.4 / rank**0.5 + 0.03
        assert_close(mean_square(low), predicted(init, low, dense), rtol=spread, atol=0)


@pytest.mark.parametrize(("rank", "share"), [(4, 0.03), (64, 0.38), (128, 0.62), (512, 1.0)])
def test_spectral_keeps_the_known_share_of_a_default_layers_variance(
    rank: int, share: float
) -> None:
    weight = (torch.rand(512, 512, generator=generator(1)) * 2 - 1) * 512**-0.5
    dense = nn.Linear(512, 512, bias=False)
    dense.weight = nn.Parameter(weight)
    low = stand_in(dense, rank, "spectral")
    assert_close(mean_square(low)[0] * 3 * 512, torch.tensor(share), rtol=0, atol=0.02)


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("init", ["orthogonal", "spectral_ones"])
def test_orthogonal_factors_have_equal_singular_values(init: str, core: bool) -> None:
    low = stand_in(filled(nn.Linear(30, 40)), 8, init, core=core)
    scales = [torch.linalg.svdvals(factor) for factor in low.factors()]
    for scale in scales:
        assert_close(scale, scales[0][:1].expand(8), rtol=1e-4, atol=0)
    assert len(scales) == (3 if core else 2)


def test_every_block_keeps_its_own_scale() -> None:
    dense = filled(nn.Linear(200, 600))
    dense.weight.data[200:400] *= 10
    for init in ("variance", "orthogonal"):
        low = stand_in(dense, 64, init, blocks=3)
        ratio = mean_square(low)[1] / mean_square(low)[0]
        assert_close(ratio, torch.tensor(100.0), rtol=0.2, atol=0)


def test_loralinear_draws_within_its_bounds_and_the_bias_too() -> None:
    dense = filled(nn.Linear(25, 50))
    bias = dense.bias
    low = stand_in(dense, 4, "loralinear")
    for factor in low.factors():
        assert 0.45 < float(factor.abs().max()) <= 0.5  # 1 / sqrt(4)
    assert low.u.bias is bias
    assert 0.18 < float(bias.detach().abs().max()) <= 0.2  # 1 / sqrt(25)
    kept = filled(nn.Linear(25, 50))
    before = kept.bias.detach().clone()
    stand_in(kept, 4, "default")
    assert torch.equal(kept.bias, before)


def test_default_is_what_two_torch_layers_start_with() -> None:
    low = stand_in(filled(nn.Conv2d(5, 80, 3)), 16, "default")
    for child in (low.v, low.u):
        bound = child.weight[0].numel() ** -0.5
        assert 0.95 * bound < float(child.weight.detach().abs().max()) <= bound


def test_default_of_a_transposed_convolution_is_torchs_too() -> None:
    # torch counts (O, K...) as the fan-in of a transposed kernel, at every rank.
    dense = filled(nn.ConvTranspose2d(120, 50, 3))
    for rank in (8, 64):
        low = stand_in(dense, rank, "default")
        expected = torch.tensor([rank / 120 / (9 * 50 * 9)])
        assert_close(mean_square(low), expected, rtol=0.15, atol=0)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("core", [False, True])
def test_random_numbers_come_from_the_generator_alone(init: str, core: bool) -> None:
    state = torch.random.get_rng_state()
    source = generator(3)
    first = stand_in(filled(nn.Linear(9, 8)), 3, init, generator=source, core=core)
    drew = not torch.equal(source.get_state(), generator(3).get_state())
    again = stand_in(filled(nn.Linear(9, 8)), 3, init, generator=generator(3), core=core)
    other = stand_in(filled(nn.Linear(9, 8)), 3, init, generator=generator(4), core=core)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert drew == (init in RANDOM)
    assert torch.equal(first.weight, other.weight) == (init not in RANDOM)
    # nn.Linear itself draws from the global generator when it is built; nothing else may.
    for _ in range(3):
        torch.set_rng_state(state)
        filled(nn.Linear(9, 8))
        fresh = torch.random.get_rng_state()
        torch.set_rng_state(state)
        stand_in(filled(nn.Linear(9, 8)), 3, init, core=core)
        assert torch.equal(torch.random.get_rng_state(), fresh)


@pytest.mark.parametrize("init", RANDOM)
def test_without_a_generator_torchs_global_one_is_used(init: str) -> None:
    dense = filled(nn.Linear(9, 8))
    torch.manual_seed(5)
    first = stand_in(dense, 3, init, generator=None).weight
    torch.manual_seed(5)
    assert torch.equal(stand_in(dense, 3, init, generator=None).weight, first)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_dtype_and_strides_of_the_dense_weight(init: str, dtype: torch.dtype) -> None:
    dense = filled(nn.Conv2d(6, 8, 3).to(dtype))
    weight = dense.weight.detach().to(memory_format=torch.channels_last)
    dense.weight = nn.Parameter(weight)
    low = stand_in(dense, 3, init)
    assert {p.dtype for p in low.parameters()} == {dtype}
    assert bool(torch.isfinite(low.weight).all())


@pytest.mark.parametrize("init", INITS)
def test_weights_that_are_not_finite_are_refused_where_they_are_read(init: str) -> None:
    dense = filled(nn.Linear(6, 9))
    dense.weight.data[4, 0] = float("nan")
    if init in ("loralinear", "default"):
        assert bool(torch.isfinite(stand_in(dense, 2, init, blocks=3).weight).all())
        return
    with pytest.raises(FactorizeError, match=r"not finite|variance nan|mean square nan"):
        stand_in(dense, 2, init, blocks=3)


@pytest.mark.parametrize("init", ["variance", "orthogonal"])
def test_a_zero_block_has_no_scale_to_keep(init: str) -> None:
    dense = filled(nn.Linear(6, 9))
    dense.weight.data[3:6] = 0
    with pytest.raises(FactorizeError, match=r"have (variance|mean square) 0\.0; to keep it"):
        stand_in(dense, 2, init, blocks=3)


@pytest.mark.parametrize("init", INITS)
def test_the_meta_device_draws_nothing(init: str) -> None:
    with torch.device("meta"):
        dense = nn.Linear(6, 9)
    source = generator(1)
    low = stand_in(dense, 2, init, blocks=3, core=True, generator=source)
    assert low.weight.is_meta
    assert torch.equal(source.get_state(), generator(1).get_state())


def test_an_unknown_initialisation_names_the_closest() -> None:
    with pytest.raises(OptionError, match="did you mean 'orthogonal'"):
        stand_in(nn.Linear(4, 4), 2, "ortogonal")


BUILT: dict[str, Callable[[int], Any]] = {
    "linear core": lambda r: LowRankLinear(300, 400, r, core=True),
    "linear blocks": lambda r: LowRankLinear(200, 600, r, blocks=3),
    "conv1d groups": lambda r: LowRankConv1d(200, 300, 3, r, groups=2),
    "conv3d": lambda r: LowRankConv3d(20, 200, 2, r),
    "separable": lambda r: LowRankSeparableConv2d(70, 80, (3, 2), r),
    "transposed": lambda r: LowRankConvTranspose2d(200, 40, 2, r),
}


@pytest.mark.parametrize("build", BUILT.values(), ids=BUILT)
@pytest.mark.parametrize("rank", [16, 96])
def test_built_directly_the_product_has_a_default_dense_layers_variance(
    build: Callable[[int], Any], rank: int
) -> None:
    torch.manual_seed(rank)  # torch's initialisers draw from the global generator
    low = build(rank)
    fan_in = low.weight[0].numel()
    assert_close(mean_square(low), torch.full((low.blocks,), 1 / (3 * fan_in)), rtol=0.15, atol=0)
    assert 0.8 * fan_in**-0.5 < float(low.u.bias.detach().abs().max()) <= fan_in**-0.5
    dense = low.dense_like()
    dense.reset_parameters()
    assert_close(mean_square(low), dense.weight.detach().var().expand(low.blocks), rtol=0.2, atol=0)
