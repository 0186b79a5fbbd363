"""The ways a layer with a low-rank recurrence can be run, and which of them is taken.

`loop`: our loop over time on the factors. `compiled`: the LSTM's with its steps in C++, where a
compiler is at hand (`rankwise.cpp`). `product`: torch's kernel on W_hh = U V, formed at each
call with gradients and else once (`kept`); its inputs are codes. `projected`: torch's LSTM with a
projection, which is the same function: h enters the next step through V h alone, so V stands for
the projection and U for the recurrent matrix. With the next layer's V below (and zeros in U) it
hands on that layer's codes; h itself it does not give, so it serves layers whose hidden states only
such a layer reads. `fused`: our loop as one CUDA kernel (`fused`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rankwise.errors import OptionError, unknown
from rankwise.layers.recurrent import fused, lstm_steps
from rankwise.layers.recurrent.codes import operand_dtype
from rankwise.layers.recurrent.matrices import Encoded, Matrix
from rankwise.layers.recurrent.sequences import Layout

WAYS = ("auto", "loop", "compiled", "product", "projected", "fused")
LOOPS = ("loop", "compiled")  # these can make gates again for backward
# In multiplications and additions, as measured on an AMD EPYC (docs/studies/recurrent.md):
CALLS = 7.5e6  # what the calls of one step cost, more than one call of torch's kernel for all
PACKING = 30  # what it costs to copy and reorder one number of the factors, at each call
WIDE = 8_000_000  # numbers of all factors that no longer stay near a processor
FEW = 16  # fewer rows take as long as so many: reading the weights is all the work
_THREADS = torch.get_num_threads()  # as torch.compile cannot ask for it
_REPEATS = 3
_measured: dict[tuple[Any, ...], dict[str, float]] = {}

Results = tuple[Any, ...]


def possible(
    kind: str,
    matrices: Sequence[Matrix],
    ahead: Matrix | None,
    layout: Layout,
    x: Tensor | Encoded,
) -> tuple[str, ...]:
    """The ways that give this layer's function, `loop` first if it is one.

    Args:
        kind: "lstm" or "gru".
        matrices: of the layer in one direction.
        ahead: the next layer's input matrix if nothing else reads the hidden states.
        layout: how the sequences lie.
        x: (T, B, N), the layer's input.
    """
    hh, given = matrices[1], x.codes if isinstance(x, Encoded) else x
    # torch.export has no place for our loop; there the product is part of the graph. The loops have
    # a backward and no more: torch.func would refuse them, or find tangents of zero.
    if hh.v is None or torch.compiler.is_exporting() or _transformed():
        return ("product",)
    compiled = kind == "lstm" and lstm_steps.serves(matrices)
    ways = [*(LOOPS if compiled else LOOPS[:1]), "product"]
    if hh.apart or len(matrices) > 2 or layout.packed is not None:
        return tuple(ways)
    # torch wants a projection that is smaller than the hidden state.
    if kind == "lstm" and ahead is not None and ahead.v is not None and not ahead.apart:
        ways += ["projected"] * (len(hh.v) + len(ahead.v) < hh.v.shape[1])
    # torch.compile is not to look into it.
    if not torch.compiler.is_compiling() and fused.fits(
        hh.v, operand_dtype(given), *given.shape[:2]
    ):
        ways.append("fused")
    return tuple(ways)


@torch.compiler.assume_constant_result  # torch.compile traces anew where transforms differ
def _transformed() -> bool:
    """Within torch.func's grad or jvp, or where tangents are carried (forward_ad)."""
    func: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    active = {each.key() for each in func.get_interpreter_stack() or ()}
    kinds = (func.TransformType.Grad, func.TransformType.Jvp)
    return forward_ad._current_level >= 0 or not active.isdisjoint(kinds)


def choose(
    asked: str,
    ways: tuple[str, ...],
    x: Tensor | Encoded,
    matrices: Sequence[Matrix],
    layout: Layout,
    run: Callable[[str, Any], Results],
) -> str:
    """The way that is asked for, if it is possible; else the faster one.

    Args:
        asked: one of `WAYS`.
        ways: the possible ones.
        x: (T, B, N), the layer's input.
        matrices: of the layer in one direction.
        layout: how the sequences lie.
        run: runs the layer on an input, one way.

    Raises:
        OptionError: `asked` is no way.
    """
    if asked not in WAYS:
        raise OptionError(unknown("way", asked, WAYS))
    if asked in ways or len(ways) == 1:
        return asked if asked in ways else ways[0]
    if "fused" in ways:
        return "fused"  # the fastest wherever it is possible (docs/studies/recurrent.md)
    given = x.codes if isinstance(x, Encoded) else x
    if given.device.type == "cuda" and not torch.compiler.is_compiling():
        wrap = Encoded if isinstance(x, Encoded) else None
        seconds = measure(ways, given, matrices, lambda way, y: run(way, wrap(y) if wrap else y))
        return min(seconds, key=lambda way: seconds[way])
    if "compiled" in ways and compiled_wins(given, matrices, layout):
        return "compiled"
    loses = given.device.type == "cuda" or loop_loses(given, matrices, layout)
    return "product" if loses and "product" in ways else "loop"


def compiled_wins(x: Tensor, matrices: Sequence[Matrix], layout: Layout) -> bool:
    """Whether the compiled steps are expected to be the fastest on a CPU. A rule, as `loop_loses`.

    They save the calls of a step. Threads share their rows and each reads all weights, so that wide
    layers gain less than by the others' products.
    """
    (ih, hh), threads = matrices[:2], _threads()
    if hh.v is None or x.dtype != torch.float32:
        return False  # exponentials of float64 are not vectors there
    rows, hidden = max(x.shape[1], FEW), hh.v.shape[1]
    numbers = ih.u.numel() + hh.u.numel() + hh.v.numel()
    work, own = 2 * rows * numbers, lstm_steps.threads(x.shape[1], threads)
    others = [work / threads**0.75 + CALLS * threads**1.5]
    if len(matrices) == 2 and layout.packed is None:
        dense = 2 * rows * (ih.u.numel() + hh.gates * hidden * hidden)
        others.append(dense / threads**0.75)
    wide = 1.2 if own > 1 and numbers > WIDE else 1.0
    return wide * work / own**0.75 < min(others)


def _threads() -> int:
    return _THREADS if torch.compiler.is_compiling() else torch.get_num_threads()


def loop_loses(x: Tensor, matrices: Sequence[Matrix], layout: Layout) -> bool:
    """Whether torch's kernel on the product is expected to be faster on a CPU.

    A rule and no measurement, so that a resumed run takes the same way. The loop saves the
    difference of the recurrent products and the forming of W, which inference does once for many
    calls, and pays for the calls of each step and for copies of the factors; threads make the
    kernel's one call faster, but not the loop's. torch's GRU, its projections and its packed
    sequences have no such kernel there.
    """
    hh = matrices[1]
    if hh.v is None or hh.gates == 3 or len(matrices) > 2 or layout.packed is not None:
        return False
    (steps, batch), hidden = x.shape[:2], hh.v.shape[1]
    factors = hh.u.numel() + hh.v.numel()
    saved = 2 * max(batch, FEW) * (hh.gates * hidden * hidden - factors)
    forming = 0 if hh.is_kept else 4 * hh.u.numel() * hidden
    calls = CALLS * _threads() ** (2 if hh.is_kept else 1.5)
    packing = 0 if hh.is_kept else PACKING * (factors + matrices[0].u.numel())
    return steps * saved + forming < steps * calls + packing


def measure(
    ways: tuple[str, ...],
    x: Tensor,
    matrices: Sequence[Matrix],
    run: Callable[[str, Tensor], Results],
) -> dict[str, float]:
    """Seconds of each way on an input of this shape, with backward where gradients are on.

    Measured once for each shape, rank, type and device of a process, after a pass to warm up.
    """
    training = torch.is_grad_enabled()
    widths = tuple((m.u.shape, None if m.v is None else m.v.shape) for m in matrices)
    key = (x.device, ways, tuple(x.shape), x.dtype, widths, training, torch.get_num_threads())
    if key not in _measured:
        given = x.detach().requires_grad_(training)
        _measured[key] = {way: min(_seconds(way, given, run)) for way in ways}
    return _measured[key]


def _seconds(way: str, x: Tensor, run: Callable[[str, Tensor], Results]) -> list[float]:
    times = []
    for repeat in range(_REPEATS + 1):
        _wait(x)
        start = time.perf_counter()
        y = run(way, x)[0]
        y = y.codes if isinstance(y, Encoded) else y
        if y.requires_grad:
            torch.autograd.grad(y, x, torch.ones_like(y))
        _wait(x)
        if repeat:
            times.append(time.perf_counter() - start)
    return times


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
