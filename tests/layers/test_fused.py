"""The LSTM's loop as one kernel: on a GPU as it is, elsewhere in Triton's interpreter if there."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1 (make test)", allow_module_level=True)
pytest.importorskip("triton")

from rankwise.errors import LifeCycleError  # noqa: E402
from rankwise.layers import LowRankGRU, LowRankLSTM  # noqa: E402
from rankwise.layers.recurrent import fused, fused_gru, fused_lstm  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
# The interpreter runs one program for all units; a GPU many, of several groups.
LARGE = [(9, 37, 300, 60), (3, 20, 650, 162), (4, 32, 1024, 128)] if GPU else []
SHAPES = [(5, 3, 12, 4), (4, 18, 20, 17), (1, 2, 16, 3), *LARGE]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 as exact as the kernel can."""
    monkeypatch.setattr(fused, "_precision", lambda: "tf32x3")


def drawn(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """x, U, V, z0, c0 of an LSTM; x, U, the bias of n, V, z0, h0 of a GRU."""
    (steps, batch, hidden, rank), g = shape, torch.Generator().manual_seed(0)
    gates = {"lstm": 4, "gru": 3}[kind]

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g)).to(DEVICE, dtype)

    x, z0, bias = draw(steps, batch, gates * hidden), draw(batch, rank), draw(hidden)
    u, v = draw(gates * hidden, rank, scale=rank**-0.5), draw(rank, hidden, scale=hidden**-0.5)
    state = draw(batch, hidden).to(torch.promote_types(dtype, torch.float32))
    return [x, u, v, z0, state] if kind == "lstm" else [x, u, bias, v, z0, state]


def lstm(
    x: Tensor, u: Tensor, v: Tensor, z: Tensor, c: Tensor, reverse: bool
) -> tuple[Tensor, ...]:
    """The definition."""
    found: list[Any] = [None] * len(x)
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        i, f, g, o = (x[t] + z @ u.t()).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        found[t] = h = o.sigmoid() * c.tanh()
        z = h @ v.t()
    return torch.stack(found), c


def gru(
    x: Tensor, u: Tensor, bias: Tensor, v: Tensor, q: Tensor, h: Tensor, reverse: bool
) -> tuple[Tensor, ...]:
    """The definition."""
    found: list[Any] = [None] * len(x)
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        (xr, xz, xn), (hr, hz, hn) = x[t].chunk(3, 1), (q @ u.t()).chunk(3, 1)
        z, n = (xz + hz).sigmoid(), (xn + (xr + hr).sigmoid() * (hn + bias)).tanh()
        found[t] = h = n + z * (h - n)
        q = h @ v.t()
    return (torch.stack(found),)


DEFINED: dict[str, Any] = {"lstm": lstm, "gru": gru}
FUSED: dict[str, Any] = {"lstm": fused_lstm.run, "gru": lambda *given: (fused_gru.run(*given),)}


def with_gradients(run: Any, tensors: list[Tensor], reverse: bool = False) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    results = run(*leaves, reverse)
    total: Any = sum((y.double() ** k).sum() for y, k in zip(results, (2, 3), strict=False))
    gradients: Any = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in (*results, *gradients)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_values_and_gradients_of_the_definition(
    kind: str, shape: tuple[int, int, int, int], reverse: bool
) -> None:
    tensors = drawn(kind, shape, torch.float32)
    expected = with_gradients(DEFINED[kind], [t.double() for t in tensors], reverse)
    found = with_gradients(FUSED[kind], tensors, reverse)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * (1 + other.norm())
    with torch.no_grad():
        inferred = FUSED[kind](*tensors, reverse)
    assert_close(inferred, tuple(found[: len(inferred)]))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_same_bits_every_time(kind: str) -> None:
    tensors = drawn(kind, SHAPES[-1], torch.float32)
    first = with_gradients(FUSED[kind], tensors)
    for _ in range(5 if GPU else 1):
        assert_close(with_gradients(FUSED[kind], tensors), first, rtol=0, atol=0)


# The interpreter multiplies bfloat16 as the integers that it keeps them in.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16] if GPU else [torch.float16])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_half_precision_is_within_its_rounding(kind: str, dtype: torch.dtype) -> None:
    tensors = drawn(kind, SHAPES[-1], dtype)
    expected = with_gradients(DEFINED[kind], [t.double() for t in tensors])
    found = with_gradients(FUSED[kind], tensors)
    assert found[0].dtype == dtype
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 2e-2 * (1 + other.norm())


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_one_result_alone_and_no_second_derivative(kind: str) -> None:
    leaves = [t.requires_grad_() for t in drawn(kind, SHAPES[0], torch.float32)]
    for part in range(2 if kind == "lstm" else 1):
        one = DEFINED[kind](*leaves, False)[part].sum()
        expected = torch.autograd.grad(one, leaves, materialize_grads=True, allow_unused=True)
        found = torch.autograd.grad(FUSED[kind](*leaves)[part].sum(), leaves)
        assert_close(found, expected, rtol=1e-4, atol=1e-5)
    first = torch.autograd.grad(FUSED[kind](*leaves)[0].sum(), leaves[:1], create_graph=True)
    with pytest.raises(LifeCycleError, match="to_dense"):
        first[0].sum().backward()


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_what_is_saved_may_come_back_with_gaps(kind: str) -> None:
    tensors = drawn(kind, SHAPES[0], torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.mT.contiguous().mT):
        found = with_gradients(FUSED[kind], tensors)
    assert_close(found, with_gradients(FUSED[kind], tensors), rtol=1e-5, atol=1e-6)


def test_launched_where_the_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a second GPU, too, while the first is the current device."""
    entered: list[Any] = []

    class Entered(torch.cuda.device_of):
        def __init__(self, obj: Any) -> None:
            super().__init__(obj)
            entered.append(obj.device)

    monkeypatch.setattr(torch.cuda, "device_of", Entered)
    tensors = drawn("lstm", SHAPES[0], torch.float32)
    with_gradients(FUSED["lstm"], tensors)
    assert entered == [tensors[0].device] * 2  # forward and backward


@pytest.mark.parametrize("kind", [LowRankLSTM, LowRankGRU])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4},
        {"rank": 3, "per_gate": True},  # of which only the input's matrix stays so
        {"rank": (None, 4), "bias": False},
        {"rank": [(3, 4), (None, 5)], "num_layers": 2, "bidirectional": True},
    ],
)
def test_a_layer_by_its_loop_and_by_the_kernel(
    kind: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "fits", lambda *_: True)
    torch.manual_seed(0)
    layer = kind(7, 12, **options).to(DEVICE)
    if layer.hh_l0.spec().get("blocks", 1) > 1:
        layer.hh_l0 = kind(7, 12, rank=4).to(DEVICE).hh_l0
    x = torch.randn(6, 3, 7, device=DEVICE, requires_grad=True)
    states = layer.num_layers * layer.directions
    h, c = (torch.randn(states, 3, 12, device=DEVICE) for _ in range(2))
    hx = (h, c) if kind is LowRankLSTM else h
    results = []
    for layer.way in ("loop", "fused"):
        y, last = layer(x, hx)
        ends = last if isinstance(last, tuple) else (last,)
        total = (y * y).sum() + sum((end**3).sum() for end in ends)
        results.append([y, *ends, *torch.autograd.grad(total, [x, *layer.parameters()])])
    assert_close(*results, rtol=2e-4, atol=2e-4)


COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rankwise.layers.recurrent import fused, fused_kernels

FLOAT32 = {"states", "last", "partial", "d_last", "d_first"}

def check(name, gru, dtype, size, rank, capability, chip):
    batch, hidden = 32, 1024
    tiles = fused.tiling(batch, hidden, rank, size, chip)
    programs = tiles.programs(hidden)
    fixed = {"GRU": gru, "P": programs, "PP": programs, "BM": tiles.rows, "BN": tiles.units}
    fixed |= {"BR": rank, "SHARE": 32, "REVERSE": 0, "PRECISION": "tf32"}
    fixed |= {"INTERPRETED": False} | ({"SAVE": True} if name == "forward" else {})
    absent = {("forward", True): "last", ("forward", False): "bias_m"}
    absent |= {("backward", True): "d_last", ("backward", False): "hidden"}
    fixed[absent[name, gru]] = None
    kernel = getattr(fused_kernels, name)
    kinds = {a: "*fp32" if a in FLOAT32 else "*" + dtype for a in kernel.arg_names}
    kinds |= {"counters": "*i32"} | {a: "i32" for a in "TBHR"} | {a: "constexpr" for a in fixed}
    values = {(kernel.arg_names.index(a),): value for a, value in fixed.items()}
    source = ASTSource(kernel, {a: kinds[a] for a in kernel.arg_names}, values)
    options = {"num_warps": tiles.units // 4, "num_stages": 1, "launch_cooperative_grid": True}
    made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.metadata.shared <= tiles.memory(rank, size, "tf32"), made.metadata.shared
    assert made.asm["ptx"].count("ld.acquire.gpu") == 2
    assert made.asm["ptx"].count("global.gpu.release.add") == 2

h200, a100 = fused.Chip(132, 227 << 10), fused.Chip(108, 163 << 10)
for name in ("forward", "backward"):
    check(name, False, "fp32", 4, 128, 90, h200)
    check(name, True, "fp32", 4, 512, 90, h200)
    check(name, False, "bf16", 2, 256, 90, h200)
    check(name, True, "bf16", 2, 128, 80, a100)  # fewer processors, wider tiles
"""


@pytest.mark.skipif(GPU, reason="is compiled by the tests above")
def test_the_kernels_compile_for_gpus_within_the_memory_that_tiles_count_on() -> None:
    """The interpreter takes more than the compiler does, which needs no GPU."""
    others = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILED], env=others, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_the_finest_tiles_whose_programs_run_at_once() -> None:
    h200 = fused.Chip(132, 227 << 10)
    assert fused.tiling(32, 1024, 128, 4, h200) == fused.Tiling(16, 16)
    assert fused.tiling(64, 1024, 128, 4, h200) == fused.Tiling(16, 32)
    assert fused.tiling(20, 1500, 187, 4, h200) == fused.Tiling(16, 32)
    assert fused.tiling(128, 2048, 128, 4, h200) == fused.Tiling(64, 32)
    assert fused.tiling(256, 2048, 128, 4, h200) is None
    # What a program must hold: 512 codes of 32 units in float32 are too many.
    assert fused.tiling(20, 1500, 375, 4, h200) is None
    assert fused.tiling(20, 1500, 375, 2, h200) == fused.Tiling(16, 32)
    assert fused.tiling(20, 1024, 512, 4, h200) == fused.Tiling(16, 16)
    # Two parts of each number of U, for three products.
    assert fused.tiling(20, 1024, 512, 4, h200, "tf32x3") is None
    # A smaller chip's memory.
    assert fused.tiling(20, 1024, 512, 4, fused.Chip(128, 99 << 10)) is None
    assert fused.tiling(20, 1024, 128, 4, fused.Chip(128, 99 << 10)) == fused.Tiling(16, 16)
    assert fused.tiling(20, 256, 64, 4, fused.Chip()) is None


def test_a_kernel_that_cannot_be_built_is_left_out_with_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused, "launch", fail)
    with pytest.warns(UserWarning, match=r"another, slower way \(RuntimeError: Failed to find C"):
        assert not fused._runs.__wrapped__(torch.device(DEVICE))


def test_the_trial_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    assert fused._runs.__wrapped__(torch.device(DEVICE))


def test_the_kernel_is_taken_where_it_is_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "fits", lambda *_: True)
    taken: list[str] = []
    layer, x = LowRankLSTM(7, 12, rank=4).to(DEVICE), torch.randn(6, 3, 7, device=DEVICE)
    inner = layer._run
    layer._run = lambda *given: taken.append(given[5]) or inner(*given)  # pyright: ignore
    layer(x)
    assert taken == ["fused"]
    layer.recompute = True  # who asks for memory is not given speed
    layer(x)
    assert taken[1:] in (["loop"], ["compiled"])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_how_exact_float32_is(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_precision", lambda: precision)
    tensors = drawn("lstm", (64, 32, 1024, 128), torch.float32)
    expected = DEFINED["lstm"](*[t.double() for t in tensors], False)[0]
    error = (FUSED["lstm"](*tensors)[0] - expected).norm() / expected.norm()
    assert error < (1e-3 if precision == "tf32" else 1e-5)
