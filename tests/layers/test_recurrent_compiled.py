"""Compiled steps of the LSTM are the loop: results, gradients, packed; and who is without them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

from rankwise import cpp
from rankwise.layers import LowRankLSTM
from rankwise.layers.recurrent import codes, lstm_loop, lstm_steps, ways
from rankwise.layers.recurrent.matrices import read
from rankwise.layers.recurrent.sequences import Layout

T, I = 5, 7  # noqa: E741

needs_compiler = pytest.mark.skipif(lstm_steps.library() is None, reason="no compiler is at hand")


def noise(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def lstm(hidden: int, rank: Any, **options: Any) -> LowRankLSTM:
    torch.manual_seed(0)
    return LowRankLSTM(I, hidden, rank=rank, **{"dtype": torch.float64, **options})


def results(layer: LowRankLSTM, way: str, x: Any, hx: Any = None) -> list[Tensor]:
    """Output, states and every gradient, each output with its own weights."""
    layer.way = way
    y, (h, c) = layer(x, hx)
    found = [y if isinstance(y, Tensor) else y.data, h, c]
    total = torch.stack(
        [(t * noise(*t.shape, seed=i).to(t.dtype)).sum() for i, t in enumerate(found)]
    )
    leaves = [t for t in (x, *(hx or ())) if isinstance(t, Tensor)]
    return [*found, *torch.autograd.grad(total.sum(), [*leaves, *layer.parameters()])]


FORMS: list[dict[str, Any]] = [
    {"num_layers": 2, "bidirectional": True},
    {"recompute": True, "bidirectional": True, "bias": False},
    {"proj_size": 2, "batch_first": True},
]


@needs_compiler
@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("batch", [1, 5, 14])  # blocks of rows of one and of several sizes
@pytest.mark.parametrize(("hidden", "rank"), [(3, 2), (32, (5, 16)), (37, (None, 35))])
def test_compiled_steps_are_the_loop(
    hidden: int, rank: Any, batch: int, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "ROWS", 2 * batch)  # several chunks, the last one shorter
    layer = lstm(hidden, rank if not options.get("proj_size") else (2, 2), **options)
    first = (batch, T) if layer.batch_first else (T, batch)
    x = noise(*first, I).requires_grad_()
    count = layer.num_layers * layer.directions
    h = noise(count, batch, layer.proj_size or hidden, seed=1).requires_grad_()
    c = noise(hidden, batch, count, seed=2).permute(2, 1, 0).requires_grad_()  # with gaps
    expected = results(layer, "loop", x, (h, c))
    assert_close(results(layer, "compiled", x, (h, c)), expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        y, (h, c) = layer(x, (h, c))
    assert_close([y, h, c], [t.detach() for t in expected[:3]], rtol=1e-10, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("way", ["loop", "compiled"])
def test_what_is_saved_may_come_back_with_gaps(way: str, recompute: bool) -> None:
    layer, x = lstm(6, 2, recompute=recompute), noise(T, 3, I).requires_grad_()

    def turned(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT if t.dim() > 1 else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, turned):
        found = results(layer, way, x)
    assert_close(found, results(layer, "loop", x), rtol=1e-10, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize(("reverse", "recompute"), [(False, False), (True, True)])
@pytest.mark.parametrize("rows", [1, 4, 512])
def test_gradients_are_those_of_finite_differences(
    rows: int, reverse: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "ROWS", rows)
    shapes = [(4, 2, 2), (12, 2), (12, 2), (12,), (2, 3), (2, 2), (2, 3)]
    arguments = [noise(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    how: Any = {"reverse": reverse, "recompute": recompute, "compiled": True}
    assert torch.autograd.gradcheck(lambda *given: lstm_loop.run(*given, **how), arguments)
    sizes = [2, 2, 1, 1]
    assert torch.autograd.gradcheck(
        lambda *given: lstm_loop.run(*given, batch_sizes=sizes, compiled=True)[1], arguments
    )


@needs_compiler
@pytest.mark.parametrize("lengths", [(6, 4, 4, 1), (2, 5, 1, 4)])
def test_packed_sequences(lengths: tuple[int, ...]) -> None:
    layer = lstm(21, 4, num_layers=2, bidirectional=True)
    x = pack_sequence([noise(n, I, seed=n) for n in lengths], enforce_sorted=False)
    hx = tuple(noise(4, len(lengths), 21, seed=i).requires_grad_() for i in (1, 2))
    expected = results(layer, "loop", x, hx)
    assert_close(results(layer, "compiled", x, hx), expected, rtol=1e-10, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_threads_that_share_the_rows(count: int, packed: bool) -> None:
    """Each has some of them for all steps; among those that end there may be none of it."""
    layer, batch = lstm(21, 4, num_layers=2, bidirectional=True), 14
    x: Any = noise(T, batch, I)
    if packed:
        x = pack_sequence([noise(1 + n % 6, I, seed=n) for n in range(batch)], enforce_sorted=False)
    hx = tuple(noise(4, batch, 21, seed=i).requires_grad_() for i in (1, 2))
    leaves = x if packed else x.requires_grad_()
    alone, before = results(layer, "compiled", leaves, hx), torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        assert lstm_steps.threads(batch, count) == min(count, 3)
        found = results(layer, "compiled", leaves, hx)
    finally:
        torch.set_num_threads(before)
    assert_close(found, alone, rtol=1e-12, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("way", ["compiled", "auto"])
def test_float32_against_float64(way: str) -> None:
    layer = lstm(96, (6, 24), dtype=torch.float32)
    x = noise(40, 20, I).float().requires_grad_()
    exact = results(copy.deepcopy(layer).double(), "loop", x.detach().double().requires_grad_())
    found = results(layer, way, x)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() < 2e-6 * b.norm()
    again = results(layer, way, x)
    assert_close(again, found, rtol=0, atol=0)


@needs_compiler
def test_far_and_undefined_numbers() -> None:
    layer = lstm(16, 4, dtype=torch.float32)
    x = noise(T, 4, I).float()
    x[:, 1], x[2, 2, 0], x[2, 3, 0] = 1e30 * x[:, 1], float("nan"), float("inf")
    for layer.way in ("loop", "compiled"):
        y = layer(x)[0]
        assert torch.isfinite(y[:, :2]).all()
        assert torch.isfinite(y[:2, 2:]).all()
        assert torch.isnan(y[2:, 2]).all()
    with torch.no_grad():
        for part in (layer.ih_l0.u.weight, layer.hh_l0.u.weight):
            part.zero_()
        layer.ih_l0.u.bias.copy_(torch.tensor([200.0, 200.0, -200.0, 200.0]).repeat_interleave(16))
        y = layer(x.nan_to_num(0, 0, 0))[0]
    # i = f = o = 1 and tanh(g) = -1
    assert_close(y[:, 0, 0], -torch.tanh(torch.arange(1.0, T + 1)), rtol=1e-6, atol=0)


@needs_compiler
def test_what_is_made_of_weights_is_made_again_when_they_or_the_way_change() -> None:
    layer, x = lstm(16, 4, dtype=torch.float32), noise(T, 3, I).float()
    with torch.no_grad():
        for _ in range(2):
            for way in ("compiled", "loop", "compiled"):
                layer.way = way
                assert_close(layer(x)[0], copy.deepcopy(layer)(x)[0], rtol=0, atol=0)
            layer.hh_l0.v.weight.mul_(2)
        layer.way = "loop"
        expected = layer(x[:3, :1])[0]
        layer.way = "compiled"
        assert_close(layer(x[:3, :1])[0], expected, rtol=1e-5, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("way", ["compiled", "auto"])
def test_compiles_to_one_graph(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = lstm(32, 4, num_layers=2, bidirectional=True, dtype=torch.float32), noise(T, 20, I)
    x, layer.way = x.float(), way
    found: list[bool] = []
    inner = lstm_steps.Forward.run
    monkeypatch.setattr(
        lstm_steps.Forward, "run", lambda *given: found.append(True) or inner(*given)
    )
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)[0]
    assert len(found) == 4
    assert_close(y, layer(x)[0], rtol=0, atol=0)
    parameters = list(layer.parameters())
    wanted = torch.autograd.grad(layer(x)[0].sum(), parameters)
    assert_close(torch.autograd.grad(y.sum(), parameters), wanted, rtol=1e-5, atol=1e-6)


def test_without_a_compiler_the_loop_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "load", lambda _: None)
    monkeypatch.setattr(ways, "CALLS", -float("inf"))  # so small a layer would not be in a loop
    layer, x = lstm(32, 4, dtype=torch.float32), noise(T, 20, I).float().requires_grad_()
    expected = results(layer, "loop", x)
    for way in ("compiled", "auto"):
        assert_close(results(layer, way, x), expected, rtol=0, atol=0)
    # As where a graph was made by a process that had one.
    shapes = [(4, 2, 2), (12, 2), (12, 2), (12,), (2, 3), (2, 2), (2, 3)]
    arguments: Any = [noise(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    both = [lstm_loop.run(*arguments, compiled=compiled) for compiled in (False, True)]
    grads = [torch.autograd.grad(y.sum() + c.sum(), arguments) for y, c in both]
    assert_close((both[1], grads[1]), (both[0], grads[0]), rtol=0, atol=0)


def test_what_has_no_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lstm_steps, "_is_here", lambda: True)

    def serves(**options: Any) -> bool:
        layer = lstm(16, **{"rank": 3, **options})
        return lstm_steps.serves([read(getattr(layer, n), 4) for n in layer.matrices])

    assert serves()
    assert serves(dtype=torch.float32, rank=(None, 3))
    assert not serves(rank=(3, None))
    assert not serves(per_gate=True)
    assert not serves(dtype=torch.bfloat16)
    assert not serves(device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves(dtype=torch.float32)


def test_where_the_compiled_steps_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By figures of docs/studies/recurrent.md; products of wide layers gain more from threads."""

    def wins(hidden: int, rank: int, batch: int = 20, threads: int = 1, **options: Any) -> bool:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        given = {"rank": rank, "device": "meta", "dtype": torch.float32, **options}
        layer = LowRankLSTM(hidden, hidden, **given)
        matrices = [read(getattr(layer, n), 4) for n in layer.matrices]
        x = torch.empty(35, batch, hidden, device="meta", dtype=given["dtype"])
        return ways.compiled_wins(x, matrices, Layout())

    assert wins(256, 64)
    assert wins(256, 128)
    assert wins(1500, 375)
    assert wins(256, 64, batch=1)
    assert not wins(256, 250)  # no fewer multiplications than torch's kernel on the product
    assert wins(256, 250, proj_size=255)  # torch has no such kernel there
    assert not wins(256, 64, dtype=torch.float64)
    assert wins(1500, 750)
    monkeypatch.setattr(lstm_steps, "_has_threads", lambda: True)  # they share the rows
    assert wins(256, 128, threads=2)
    assert wins(650, 325, threads=2)
    assert wins(1024, 512, batch=32, threads=2)
    assert not wins(1500, 750, threads=2)
    assert wins(256, 64, batch=64, threads=16)
    assert not wins(1024, 256, batch=4, threads=16)
    monkeypatch.setattr(lstm_steps, "_has_threads", lambda: False)
    assert wins(256, 64, threads=2)
    assert not wins(256, 128, threads=2)
    assert not wins(1024, 256, batch=32, threads=2)


@needs_compiler
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="has only the one kind"
)
def test_older_processors() -> None:
    """The same source with narrower vectors, in a process of its own."""
    code = """
import torch
from rankwise.layers import LowRankLSTM
from rankwise.layers.recurrent import lstm_steps
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
assert lstm_steps.library().vector_bytes() == 32
torch.manual_seed(0)
layer, x = LowRankLSTM(7, 37, 2, rank=5, bidirectional=True), torch.randn(5, 9, 7)
found = []
for layer.way in ("loop", "compiled"):
    y = layer(x)[0]
    found.append([y, *torch.autograd.grad((y * y).sum(), list(layer.parameters()))])
torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
