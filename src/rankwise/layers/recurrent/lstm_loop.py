"""The LSTM's loop over time on low-rank factors, with its own backward through time.

    z_t = V h_{t-1}                       (R)
    i, f, g, o = Ux zx_t + Uh z_t + b     (4 H; torch's order of gates)
    c_t = s(f) c_{t-1} + s(i) tanh(g),    h_t = s(o) tanh(c_t)

What makes it fast on a CPU, where an LSTM is a chain of products of few rows:
 1. Products by oneDNN with weights reordered once for all steps: see `products`.
 2. tanh(x) = 2 s(2x) - 1: ATen's tanh costs about nine sigmoids there. The factor 2 is folded into
    the rows of g in the copies of U and b that each call makes; the cell state is kept as 2 c
    (exact): one sigmoid for four gates. h = o (2 s(2c) - 1) is one operation as -h = o - 2 o s(2c).
 3. Chunks of time: the 4 H wide product of the inputs is made just before its steps.
 4. Backward, chunk by chunk: all pointwise factors at once, then a loop that carries dh and dc
    alone through two thin products, then the weights' gradients of the chunk, each as one product.
    A 4 H wide slab of gradients of all steps is never stored.
 5. Where a compiler is at hand, 3 and the loop of 4 are one pass in C++ instead: `lstm_steps`.
 6. `recompute`: gates are a function of codes R wide, so they need not be saved; backward makes
    them again, one product per chunk and no loop.

Saved for backward, in numbers per step, row and unit of H: 6 + (Rx + Rh) / H (gates 4, cells 1,
outputs 1, codes), with `recompute` 2 + (Rx + Rh) / H; oneDNN's nn.LSTM keeps 16.5.
Operators of torch.library, so that torch.compile sees one opaque call in either direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.layers.recurrent import lstm_steps, products
from rankwise.layers.recurrent.codes import chunks, ends, no_second
from rankwise.layers.recurrent.lstm_backward import Backward, G, doubled

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Ready = tuple[products.Steps, products.Into] | lstm_steps.Forward


def run(
    zx: Tensor,
    ux: Tensor,
    uh: Tensor,
    bias: Tensor,
    v: Tensor,
    z0: Tensor,
    c0: Tensor,
    reverse: bool = False,
    recompute: bool = False,
    batch_sizes: Sequence[int] = (),
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """All hidden states and the last cell state of one layer in one direction.

    Args:
        zx: (T, B, Kx), the codes of the inputs; Kx = Rx, or 4 Rx with codes for each gate.
        ux: (4 H, Rx).
        uh: (4 H, Rh).
        bias: (4 H).
        v: (Kh, H); Kh = Rh, or 4 Rh with codes for each gate.
        z0: (B, Kh), the codes of the first hidden state.
        c0: (B, H), the first cell state, in the dtype of states.
        reverse: from the last step to the first.
        recompute: keep no gates for backward, make them again.
        batch_sizes: how many sequences still run at each step, not rising; empty: all of them.
        compiled: steps by `lstm_steps` where they can be had.

    Returns:
        (T, B, H) in the operands' dtype, and (B, H), each row when its sequence ended.
    """
    tensors = (zx, ux, uh, bias, v, z0, c0)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    hidden, last, *_ = _forward(*tensors, reverse, recompute, save, list(batch_sizes), compiled)
    return hidden, last


def prepare(
    zx: Tensor, ux: Tensor, uh: Tensor, bias: Tensor, v: Tensor, compiled: bool = False
) -> Ready:
    """The products of a loop over inputs of zx's shape: factors copied and reordered. As `run`."""
    steps, batch, _ = zx.shape
    if compiled and lstm_steps.library() is not None:
        return lstm_steps.Forward(ux, uh, bias, v)
    length, _ = chunks(steps, batch, len(uh), backwards=False)
    factors = (doubled(ux), doubled(uh), doubled(bias))
    step = products.Steps(zx, *factors, G, length * batch, len(v))
    return step, products.into(-v, batch)


def infer(
    zx: Tensor,
    ready: Ready,
    z0: Tensor,
    c0: Tensor,
    reverse: bool = False,
    batch_sizes: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """As `run`, without gradients, by factors that were prepared."""
    output, nothing = zx.new_empty(*zx.shape[:2], c0.shape[1]), c0.new_empty(0)
    with torch.autocast(zx.device.type, enabled=False):
        kept = (output, nothing, nothing, zx.new_empty(0))
        return output, _loop(zx, ready, z0, c0, kept, reverse, batch_sizes)


@torch.library.custom_op("rankwise::lstm", mutates_args=())
def _forward(
    zx: Tensor,
    ux: Tensor,
    uh: Tensor,
    bias: Tensor,
    v: Tensor,
    z0: Tensor,
    c0: Tensor,
    reverse: bool,
    recompute: bool,
    save: bool,
    batch_sizes: Sequence[int],
    compiled: bool,
) -> Results:
    """Hidden states, last cell; for backward gates (T, B, 4 H), 2 c, codes of x and h, or empty."""
    (steps, batch, _), (width, hidden) = zx.shape, v.shape
    output = zx.new_empty(steps, batch, hidden)
    # 2 c of every step, and of c0 where the loop begins.
    cells = c0.new_empty((steps + 1, batch, hidden) if save else 0)
    slab = c0.new_empty((steps, batch, G * hidden) if save and not recompute else 0)
    codes = zx.new_empty((steps, batch, zx.shape[2] + width) if save else 0)
    with torch.autocast(zx.device.type, enabled=False):
        ready = prepare(zx, ux, uh, bias, v, compiled)
        last = _loop(zx, ready, z0, c0, (output, cells, slab, codes), reverse, batch_sizes)
    return output, last, slab, cells, codes


def _loop(
    zx: Tensor,
    ready: Ready,
    z0: Tensor,
    c0: Tensor,
    kept: tuple[Tensor, Tensor, Tensor, Tensor],
    reverse: bool,
    batch_sizes: Sequence[int],
) -> Tensor:
    """Run all steps: fill the outputs, and of 2 c, gates and codes those that are not empty."""
    if isinstance(ready, lstm_steps.Forward):
        return ready.run(zx, z0, c0, kept, reverse, batch_sizes)
    output, cells, slab, codes = kept
    (steps, batch, hidden), (width_x, width) = output.shape, (zx.shape[2], z0.shape[1])
    _, ranges = chunks(steps, batch, G * hidden, backwards=reverse)
    step, encode = ready
    if step.joined and not len(codes):
        codes = zx.new_empty(steps, batch, width_x + width)
    if len(codes):
        codes[..., :width_x] = zx
    # The codes of h that each step reads: the product with V writes them where they are kept.
    both, z = codes.unbind(0), codes[..., width_x:].unbind(0) or (torch.empty_like(z0),) * steps
    z[steps - 1 if reverse else 0].copy_(z0)
    tanh, last, final = torch.empty_like(c0), torch.empty_like(c0), ends(batch_sizes)
    # A whole tensor: a number would be made into one at each step, 1 us each.
    buffer, half = c0.new_empty(batch, G * hidden), torch.full_like(c0, 0.5)
    cell = torch.mul(c0, 2, out=cells[steps if reverse else 0] if len(cells) else None)
    c = (cells[:-1] if reverse else cells[1:]).unbind(0) if len(cells) else (cell,) * steps
    h, mul, sigmoid, addcmul = output.unbind(0), torch.mul, torch.sigmoid, torch.addcmul
    before: Tensor | None = None
    for start, end in ranges:
        x = step.begin(zx[start:end])
        gates = slab[start:end].unbind(0) if len(slab) else (buffer,) * (end - start)
        parts = slab[start:end].chunk(G, 2) if len(slab) else buffer.chunk(G, 1)
        i, f, g, o = (p.unbind(0) if len(slab) else (p,) * (end - start) for p in parts)
        for t in range(end - 1, start - 1, -1) if reverse else range(start, end):
            k = t - start
            if before is not None:
                encode(before, z[t])
            sigmoid(step.both(both[t]) if step.joined else step.from_h(z[t], x[k]), out=gates[k])
            g[k].sub_(half)  # tanh / 2
            cell = mul(f[k], cell, out=c[t]).addcmul_(i[k], g[k], value=4)
            before = addcmul(o[k], o[k], sigmoid(cell, out=tanh), value=-2, out=h[t])  # -h
            if final and (ended := final[t]):
                last[slice(*ended)] = cell[slice(*ended)]
    output.neg_()
    return (last if final else cell) / 2


@_forward.register_fake
def _(zx, ux, uh, bias, v, z0, c0, reverse, recompute, save, batch_sizes, compiled):  # pyright: ignore
    (steps, batch, _), (width, hidden) = zx.shape, v.shape
    cells = c0.new_empty((steps + 1, batch, hidden) if save else 0)
    slab = c0.new_empty((steps, batch, G * hidden) if save and not recompute else 0)
    codes = zx.new_empty((steps, batch, zx.shape[2] + width) if save else 0)
    return zx.new_empty(steps, batch, hidden), torch.empty_like(c0), slab, cells, codes


@torch.library.custom_op("rankwise::lstm_backward", mutates_args=())
def _backward(
    d_output: Tensor | None,
    d_last: Tensor | None,
    output: Tensor,
    slab: Tensor,
    cells: Tensor,
    codes: Tensor,
    ux: Tensor,
    uh: Tensor,
    bias: Tensor,
    v: Tensor,
    reverse: bool,
    batch_sizes: Sequence[int],
    compiled: bool,
    wants_input: bool,
) -> list[Tensor]:
    """Gradients of zx (empty if not wanted), ux, uh, bias, v, z0 and c0."""
    with torch.autocast(codes.device.type, enabled=False):
        work = Backward((output, slab, cells, codes), ux, uh, bias, v, reverse, compiled)
        return work.run(d_output, d_last, batch_sizes, wants_input)


@_backward.register_fake
def _(
    d_output, d_last, output, slab, cells, codes, ux, uh, bias, v, reverse, sizes, compiled, wanted
):  # pyright: ignore
    (steps, batch, both), width = codes.shape, len(v)
    d_zx = codes.new_empty((steps, batch, both - width) if wanted else 0)
    d_z0 = codes.new_empty(batch, width)
    d_c0 = cells.new_empty(cells.shape[1:])
    return [d_zx, *(torch.empty_like(p) for p in (ux, uh, bias, v)), d_z0, d_c0]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    _, ux, uh, bias, v, _, _, ctx.reverse, _, _, *ctx.how = inputs
    hidden, _, slab, cells, codes = output
    ctx.save_for_backward(hidden, slab, cells, codes, ux, uh, bias, v)
    ctx.mark_non_differentiable(slab, cells, codes)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_output: Tensor | None, d_last: Tensor | None, *_: Any) -> Any:
    wanted = ctx.needs_input_grad[0]
    results = _backward(d_output, d_last, *ctx.saved_tensors, ctx.reverse, *ctx.how, wanted)
    return None if not wanted else results[0], *results[1:], None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second("LSTM"))
