"""The ways to run a low-rank recurrence give one function; which is taken follows the rules."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

from rankwise.errors import OptionError
from rankwise.layers import LowRankGRU, LowRankLSTM
from rankwise.layers.recurrent import kept, lstm_steps, ways
from rankwise.layers.recurrent.matrices import read
from rankwise.layers.recurrent.sequences import Layout

T, B, I, H = 6, 3, 7, 12  # noqa: E741


def noise(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def lstm(layers: int, rank: Any, **options: Any) -> LowRankLSTM:
    torch.manual_seed(0)
    return LowRankLSTM(I, H, layers, rank=rank, dtype=torch.float64, **options)


def results(layer: Any, x: Tensor, hx: Any) -> list[Tensor]:
    """Output, states and every gradient."""
    y, (h, c) = layer(x, hx)
    total = (y * y).sum() + (h**3).sum() + (c**3).sum()
    return [y, h, c, *torch.autograd.grad(total, [x, *layer.parameters()])]


@pytest.mark.parametrize("steps", [1, T])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ih", [None, 3])
def test_all_ways_are_one_function(ih: int | None, bias: bool, steps: int) -> None:
    layer = lstm(3, [(ih, 4), (3, 4), (2, 5)], bias=bias)
    x = noise(steps, B, I).requires_grad_()
    hx = (noise(3, B, H, seed=1), noise(3, B, H, seed=2))
    layer.way = "loop"
    expected = results(layer, x, hx)
    for way in ("compiled", "product", "projected", "auto"):
        layer.way = way
        assert_close(results(layer, x, hx), expected, rtol=1e-9, atol=1e-11)


def taken(layer: Any, x: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The ways that were possible for each layer and direction."""
    found: list[tuple[str, ...]] = []
    inner = ways.possible

    def watch(*given: Any) -> tuple[str, ...]:
        found.append(inner(*given))
        return found[-1]

    monkeypatch.setattr("rankwise.layers.recurrent.base.possible", watch)
    layer(x)
    return found


def test_where_a_projection_can_stand_for_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = ways.LOOPS if lstm_steps.library() else ("loop",)
    every, two = (*loops, "product", "projected"), (*loops, "product")
    x = noise(T, B, I)
    # Not the last layer, whose hidden states are the output.
    assert taken(lstm(2, 4), x, monkeypatch) == [every, two]
    # Not where R + R of the layer above reach H, where that layer is dense, or behind dropout.
    assert taken(lstm(2, [(4, 8), 4]), x, monkeypatch) == [two, two]
    assert taken(lstm(2, [4, (None, 4)]), x, monkeypatch) == [two, two]
    assert taken(lstm(2, 4, dropout=0.5), x, monkeypatch) == [two, two]
    assert taken(lstm(2, 4, dropout=0.5).eval(), x, monkeypatch) == [every, two]
    assert taken(lstm(2, 4, bidirectional=True), x, monkeypatch) == [two] * 4
    assert taken(lstm(2, 3, per_gate=True), x, monkeypatch) == [("loop", "product")] * 2
    assert taken(lstm(2, 4), pack_sequence([x[:, 0], x[:2, 1]]), monkeypatch) == [two, two]
    assert taken(lstm(2, 4, proj_size=5), x, monkeypatch) == [two, two]
    assert taken(lstm(1, (4, None)), x, monkeypatch) == [("product",)]


def test_who_asks_to_recompute_gets_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = lstm(1, 4)
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        "rankwise.layers.recurrent.base.choose", lambda _, ways, *__: asked.append(ways) or ways[0]
    )
    for layer.recompute in (False, True):
        layer(noise(T, B, I))
    layer.way = "product"
    layer(noise(T, B, I))
    loops = ways.LOOPS if lstm_steps.library() else ("loop",)
    assert asked == [(*loops, "product"), loops, (*loops, "product")]


def test_an_unknown_way_is_refused() -> None:
    layer = lstm(1, 4)
    layer.way = "projekted"
    with pytest.raises(OptionError, match="did you mean 'projected'"):
        layer(noise(T, B, I))


def test_a_way_that_is_not_possible_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    gru = LowRankGRU(I, H, rank=4, dtype=torch.float64)
    x = noise(T, B, I)
    expected = gru(x)[0]
    gru.way = "projected"
    assert_close(gru(x)[0], expected, rtol=1e-12, atol=1e-12)
    gru.way = "product"
    assert_close(gru(x)[0], expected, rtol=1e-9, atol=1e-11)


def test_the_loop_is_left_where_it_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """By figures of docs/studies/recurrent.md; many threads make torch's kernel the better one."""

    def loses(kind: Any, hidden: int, rank: int, batch: int, steps: int, **options: Any) -> bool:
        layer = kind(4, hidden, rank=(None, rank), **{"device": "meta", **options})
        read_ones = [read(getattr(layer, name), layer.gates) for name in layer.matrices]
        return ways.loop_loses(torch.empty(steps, batch, 4), read_ones, Layout())

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert loses(LowRankLSTM, 256, 128, 20, 80)
    assert not loses(LowRankLSTM, 256, 64, 20, 80)
    assert not loses(LowRankLSTM, 650, 325, 20, 35)
    # One sequence: forming W costs more than all steps.
    assert not loses(LowRankLSTM, 1024, 256, 1, 64)
    assert not loses(LowRankGRU, 256, 128, 20, 80)
    assert not loses(LowRankLSTM, 256, 60, 20, 80, proj_size=64)
    with torch.no_grad():  # W is formed once
        assert loses(LowRankLSTM, 256, 64, 20, 80, device="cpu")
        assert loses(LowRankLSTM, 256, 64, 20, 1, device="cpu")
        assert not loses(LowRankLSTM, 256, 32, 20, 80, device="cpu")
        assert not loses(LowRankLSTM, 1024, 256, 1, 1, device="cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert loses(LowRankLSTM, 256, 64, 20, 80)
    assert not loses(LowRankLSTM, 650, 162, 20, 35)
    assert not loses(LowRankLSTM, 650, 325, 20, 35)
    with torch.no_grad():
        assert loses(LowRankLSTM, 650, 325, 20, 35, device="cpu")
        assert not loses(LowRankLSTM, 650, 162, 20, 35, device="cpu")


class Counting(WeakKeyDictionary[Any, Any]):
    """What is kept, and how often something was made."""

    made = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        self.made += 1
        super().__setitem__(key, value)


@pytest.mark.parametrize(
    ("kind", "way", "options"),
    [
        (LowRankLSTM, "product", {"per_gate": True}),
        (LowRankLSTM, "loop", {"proj_size": 5, "bidirectional": True}),
        (LowRankGRU, "loop", {"per_gate": True}),
    ],
)
def test_inference_makes_things_of_weights_once_while_they_stay(
    kind: Any, way: str, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = kind(I, H, rank=(None, 4), dtype=torch.float64, **options), noise(T, B, I)
    monkeypatch.setattr(kept, "_kept", found := Counting())
    layer.way = way

    def made(given: Tensor = x) -> int:
        """How often in two calls, which give what a copy of the layer gives with gradients."""
        count = found.made
        with torch.no_grad():
            ys = layer(given)[0], layer(given)[0]
        copied = copy.deepcopy(layer)
        for y in ys:
            assert_close(y, copied(given)[0].detach(), rtol=1e-9, atol=1e-11)
        return found.made - count

    assert made() == layer.directions
    assert made() == 0
    hh, generator = layer.hh_l0, torch.Generator().manual_seed(0)
    for write in (
        lambda: hh.u.weight.data.mul_(2),
        lambda: hh.u.weight.data.neg_(),
        lambda: hh.v.weight.data.copy_(hh.v.weight.data.flip(1)),  # the same numbers elsewhere
        lambda: hh.u.weight.detach().add_(1),
        lambda: setattr(hh.u, "weight", torch.nn.Parameter(hh.u.weight.detach() / 2)),
        lambda: [p.data.normal_(generator=generator) for p in layer.parameters()],
        lambda: layer.load_state_dict({k: -w for k, w in layer.state_dict().items()}),
    ):
        write()
        assert made() >= 1
        assert made() == 0
    layer.ih_l0.bias.data.add_(1)  # no factor of the product
    assert made() == (way == "loop")
    layer.ih_l0.weight.data.add_(1)
    made()
    if way == "loop":  # things are made for a shape
        assert made(x[:, :1]) == layer.directions
        assert made() == layer.directions
    layer(x)  # with gradients: what was kept is let go
    assert len(found) == 0
    with torch.inference_mode():
        inside = copy.deepcopy(layer)  # its parameters have no version
        assert_close(inside(x)[0], inside(x)[0], rtol=0, atol=0)
    assert len(found) == 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", ["loop", "compiled"])
@pytest.mark.parametrize("kind", [LowRankLSTM, LowRankGRU])
def test_inputs_of_vmap(kind: Any, way: str, grad: bool) -> None:
    torch.manual_seed(0)
    layer, x = kind(I, H, rank=3, dtype=torch.float64), noise(2, T, B, I)
    layer.way = way
    with torch.set_grad_enabled(grad):
        expected = torch.stack([layer(each)[0] for each in x])
        found = torch.vmap(lambda each: layer(each)[0])(x)
    assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own call
@pytest.mark.parametrize("way", ["loop", "compiled"])
@pytest.mark.parametrize("kind", [LowRankLSTM, LowRankGRU])
def test_derivatives_by_torch_func_and_of_tangents(kind: Any, way: str) -> None:
    """Of the product: a loop has no more than its backward."""
    torch.manual_seed(0)
    layer, x, direction = kind(I, H, rank=3, dtype=torch.float64), noise(T, B, I), noise(T, B, I)
    layer.way = way

    def total(x: Tensor) -> Tensor:
        return (layer(x)[0] ** 2).sum()

    expected = torch.autograd.grad(total(leaf := x.clone().requires_grad_()), leaf)[0]
    assert_close(torch.func.grad(total)(x), expected, rtol=1e-9, atol=1e-11)
    tangent = (expected * direction).sum()
    assert_close(torch.func.jvp(total, (x,), (direction,))[1], tangent, rtol=1e-9, atol=1e-11)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            found = forward_ad.unpack_dual(total(forward_ad.make_dual(x, direction))).tangent
        assert_close(found, tangent, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own call
@pytest.mark.parametrize("kind", [LowRankLSTM, LowRankGRU])
def test_derivatives_by_torch_func_in_a_compiled_graph(kind: Any) -> None:
    torch.manual_seed(0)
    layer, x, direction = kind(I, H, rank=3, dtype=torch.float64), noise(T, B, I), noise(T, B, I)
    layer.way = "loop"

    def total(x: Tensor) -> Tensor:
        return (layer(x)[0] ** 2).sum()

    def derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.grad(total)(x), torch.func.jvp(total, (x,), (direction,))[1]

    found = torch.compile(derivatives, backend="aot_eager", fullgraph=True)(x)
    assert_close(found, derivatives(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("grad", [True, False])
def test_measured_once_for_each_shape(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where it decides."""
    monkeypatch.setattr(ways, "_measured", {})
    runs: list[tuple[str, bool]] = []

    def run(way: str, x: Tensor) -> tuple[Tensor]:
        runs.append((way, x.requires_grad))
        return (x * 2,)

    nothing: list[Any] = []
    with torch.set_grad_enabled(grad):
        first = ways.measure(("loop", "product"), noise(T, B, I), nothing, run)
        assert runs[0] == ("loop", grad)
        count = len(runs)
        assert ways.measure(("loop", "product"), noise(T, B, I), nothing, run) == first
        assert len(runs) == count
        ways.measure(("loop", "product"), noise(T, B + 1, I), nothing, run)
    assert set(first) == {"loop", "product"}
    assert min(first.values()) > 0
    assert len(runs) == 2 * count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_ways_on_a_gpu() -> None:
    layer = lstm(2, 4).cuda().float()
    x = noise(T, B, I).float().cuda().requires_grad_()
    layer.way = "loop"
    expected = layer(x)[0]
    for way in ("product", "projected", "fused", "auto"):
        layer.way = way
        assert_close(layer(x)[0], expected, rtol=1e-2, atol=1e-3)  # TF32 in all but the loop
