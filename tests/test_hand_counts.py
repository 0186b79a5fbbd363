"""FLOPs, multiply-adds and bytes of each family of networks against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import rankwise
from rankwise import accounting, models
from rankwise.cli import main


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Real(nn.Module):
    """Needs values, so that the count is made by a run with real numbers."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Any, *more: Any, **named: Any) -> Any:
        if x.sum().item() > 1e9:
            return x
        return self.inside(x, *more, **named)


def attended(queries: int, keys: int, kdim: int = 8, vdim: int = 8) -> int:
    """Multiply-adds of one sequence through attention of width 8: projections and two products."""
    return 2 * queries * 64 + keys * 8 * (kdim + vdim) + 2 * queries * keys * 8


class Groups(nn.Module):
    """Six query heads on two heads of keys and values, four wide."""

    def forward(self, query: Tensor, pairs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, pairs, pairs, enable_gqa=True)


def cross_attention() -> tuple[nn.Module, dict[str, Any]]:
    layer = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    return layer, {"key": noise(7, 3, 6), "value": noise(7, 3, 4)}


# Each: the layer, what it takes beside the queries, the queries, multiply-adds.
ATTENTIONS: dict[str, Callable[[], tuple[nn.Module, Any, Tensor, int]]] = {
    "cross, other widths": lambda: (*cross_attention(), noise(5, 3, 8), 3 * attended(5, 7, 6, 4)),
    "a bias and a zero as keys": lambda: (
        nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True),
        {"key": noise(3, 5, 8), "value": noise(3, 5, 8)},
        noise(3, 5, 8),
        # The two further keys meet no projection.
        3 * (attended(5, 5) + 2 * 5 * 2 * 8),
    ),
    "grouped queries": lambda: (
        Groups(),
        {"pairs": noise(2, 2, 7, 4)},
        noise(2, 6, 5, 4),
        2 * 6 * 2 * 5 * 7 * 4,
    ),
}


@pytest.mark.parametrize("real", [False, True], ids=["meta", "real"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_costs_its_projections_and_two_products(
    name: str, weights: bool, real: bool
) -> None:
    layer, more, query, by_hand = ATTENTIONS[name]()
    if isinstance(layer, nn.MultiheadAttention):
        more = {**more, "need_weights": weights}  # without: scaled_dot_product_attention
    named = {"x" if real else "query": query, **more}
    model = Real(layer) if real else layer
    assert accounting.macs(model, named) == by_hand
    assert accounting.flops(model, named) == 2 * by_hand


@pytest.mark.parametrize("real", [False, True], ids=["meta", "real"])
def test_an_encoder_and_decoder_cost_their_attentions_and_feed_forward_parts(real: bool) -> None:
    layer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    feed = 2 * 8 * 16
    encoder = attended(5, 5) + 5 * feed
    decoder = attended(4, 4) + attended(4, 5) + 4 * feed
    model = Real(layer) if real else layer
    assert accounting.macs(model, (noise(2, 5, 8), noise(2, 4, 8))) == 2 * (encoder + decoder)


@pytest.mark.parametrize("real", [False, True], ids=["meta", "real"])
@pytest.mark.parametrize("rank", [None, 2])
def test_an_lstm_costs_every_matrix_at_every_step(rank: int | None, real: bool) -> None:
    layer = nn.LSTM(5, 6, 2, bidirectional=True, proj_size=3, batch_first=True)
    matrices = [(24, 5), (24, 3), (3, 6), (24, 6), (24, 3), (3, 6)]  # ih, hh, hr of two layers
    cost = [rows * columns for rows, columns in matrices]
    model: Any = nn.Sequential(layer)
    if rank is not None:
        names = [f"0.{kind}_l{i}" for i in (0, 1) for kind in ("ih", "hh")]
        both = [name + suffix for name in names for suffix in ("", "_reverse")]
        rankwise.factorize(model, dict.fromkeys(both, rank))
        cost = [rank * (r + c) if r == 24 else r * c for r, c in matrices]
    by_hand = 4 * 7 * 2 * sum(cost)
    model = Real(model) if real else model
    assert accounting.macs(model, noise(4, 7, 5)) == by_hand


@pytest.mark.parametrize("real", [False, True], ids=["meta", "real"])
def test_looking_up_costs_nothing_and_a_tied_head_is_counted_where_it_multiplies(
    real: bool,
) -> None:
    tokens = torch.zeros(3, 5, dtype=torch.int64)
    lookup: nn.Module = nn.Sequential(nn.Embedding(11, 4), nn.LayerNorm(4), nn.GELU())
    assert accounting.flops(Real(lookup) if real else lookup, tokens) == 0
    assert accounting.parameters(lookup).stored == 11 * 4 + 8
    tied = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11))
    tied[1].weight = tied[0].weight  # pyright: ignore[reportArgumentType]
    assert accounting.macs(Real(tied) if real else tied, tokens) == 3 * 5 * 4 * 11
    assert accounting.parameters(tied).stored == 11 * 4 + 11


def residual(side: int, *, wide: int = 1) -> int:
    """Multiply-adds of ResNet-50 for square images: inside 64 to 512 wide, outside 4 times that."""
    total, side, inputs = 49 * 3 * 64 * (side // 2) ** 2, side // 4, 64
    for stage, (width, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
        inner, outputs = wide * width, 4 * width
        before, side = side, side // 2 if stage else side
        # The first 1x1 of a stage still sees the larger image; the shortcut does not.
        total += inputs * inner * before**2 + inputs * outputs * side**2
        total += blocks * (9 * inner**2 + inner * outputs) * side**2
        total += (blocks - 1) * outputs * inner * side**2
        inputs = outputs
    return total + 2048 * 1000


def transformer_macs(tokens: int, width: int, hidden: int, layers: int, outside: int) -> int:
    """Layers with four square projections, two of an MLP, and attention without a mask's gain."""
    layer = tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width
    return layers * layer + outside


VGG_19 = [(64, 3, 32), (64, 64, 32), (128, 64, 16), (128, 128, 16), (256, 128, 8)]
VGG_19 += [(256, 256, 8)] * 3 + [(512, 256, 4)] + [(512, 512, 4)] * 3 + [(512, 512, 2)] * 4


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("mlp-512x8", 784 * 512 + 8 * 512 * 512 + 512 * 10),
        ("vgg-19", sum(9 * o * i * s * s for o, i, s in VGG_19) + 2 * 512 * 512 + 5120),
        # torchvision's tables: 4.09 and 11.4 billion, which they call FLOPs.
        ("resnet-50", residual(224)),
        ("wrn-50-2", residual(224, wide=2)),
        ("vit-cifar", transformer_macs(65, 512, 512, 6, 64 * 48 * 512 + 5120)),
        ("gpt2-124m", transformer_macs(1024, 768, 3072, 12, 1024 * 768 * 50_257)),
        ("lstm-wikitext2", 35 * (4 * 6000 * 1500 + 1500 * 33_278)),
    ],
)
def test_the_multiply_adds_of_each_family(name: str, by_hand: int) -> None:
    with torch.device("meta"):
        model, sample = models.build(name), models.sample(name)
    assert accounting.macs(model, sample) == by_hand


def test_millions_of_numbers_and_megabytes_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(1000, 500), nn.Linear(500, 10)).to(torch.bfloat16)
    counted = accounting.parameters(model)
    assert counted.stored == 505_510
    assert_close((counted.millions, counted.megabytes), (0.50551, 1.01102), rtol=1e-12, atol=0)


def test_a_plan_says_flops_and_macs_numbers_and_megabytes(capsys: Any) -> None:
    assert main(["plan", "--model", "mlp-512x2", "--ranks", "64"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    # 784x512 and 512x10 stay; 512x512 becomes 512x64 and 64x512. Biases are stored, not counted.
    assert "parameters 669,706 -> 473,098" in text
    assert "forward FLOPs 1.34M -> 944k (70.6%), MACs 669k -> 472k" in text
    assert "weights 2.68 MB -> 1.89 MB (10^6 bytes)" in text
