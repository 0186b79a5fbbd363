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
 5. `recompute`: gates are a function of codes R wide, so they need not be saved; backward makes
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

from rankwise.layers.recurrent import products
from rankwise.layers.recurrent.codes import add_up, chunks, ends, no_second

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Ready = tuple[products.Steps, products.Into]
G = 4  # i, f, g, o


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

    Returns:
        (T, B, H) in the operands' dtype, and (B, H), each row when its sequence ended.
    """
    tensors = (zx, ux, uh, bias, v, z0, c0)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    hidden, last, *_ = _forward(*tensors, reverse, recompute, save, list(batch_sizes))
    return hidden, last


def prepare(zx: Tensor, ux: Tensor, uh: Tensor, bias: Tensor, v: Tensor) -> Ready:
    """The products of a loop over inputs of zx's shape: factors copied and reordered. As `run`."""
    steps, batch, _ = zx.shape
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
) -> Results:
    """Hidden states, last cell; for backward gates (T, B, 4 H), 2 c, codes of x and h, or empty."""
    (steps, batch, _), (width, hidden) = zx.shape, v.shape
    output = zx.new_empty(steps, batch, hidden)
    # 2 c of every step, and of c0 where the loop begins.
    cells = c0.new_empty((steps + 1, batch, hidden) if save else 0)
    slab = c0.new_empty((steps, batch, G * hidden) if save and not recompute else 0)
    codes = zx.new_empty((steps, batch, zx.shape[2] + width) if save else 0)
    with torch.autocast(zx.device.type, enabled=False):
        ready = prepare(zx, ux, uh, bias, v)
        last = _loop(zx, ready, z0, c0, (output, cells, slab, codes), reverse, batch_sizes)
    return output, last, slab, cells, codes


def doubled(weight: Tensor) -> Tensor:
    """A copy with the rows of g times two."""
    weight = weight.clone()
    weight.unflatten(0, (G, -1))[2].mul_(2)
    return weight


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
def _(zx, ux, uh, bias, v, z0, c0, reverse, recompute, save, batch_sizes):  # pyright: ignore
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
    wants_input: bool,
) -> list[Tensor]:
    """Gradients of zx (empty if not wanted), ux, uh, bias, v, z0 and c0."""
    with torch.autocast(codes.device.type, enabled=False):
        work = _Backward((output, slab, cells, codes), ux, uh, bias, v, reverse)
        return work.run(d_output, d_last, ends(batch_sizes), wants_input)


class _Backward:
    """Buffers of one backward, and its three stages for each chunk."""

    def __init__(
        self,
        kept: tuple[Tensor, Tensor, Tensor, Tensor],
        ux: Tensor,
        uh: Tensor,
        bias: Tensor,
        v: Tensor,
        reverse: bool,
    ) -> None:
        self.output, self.slab, self.cells, self.codes = kept
        self.v, self.reverse, self.ranks = v, reverse, (ux.shape[1], uh.shape[1])
        (steps, batch, hidden), width = self.output.shape, len(v)
        width_x = self.codes.shape[2] - width
        self.zx, self.zh = self.codes[..., :width_x], self.codes[..., width_x:]
        self.length, self.ranges = chunks(steps, batch, G * hidden, backwards=not reverse)
        rows, state = self.length * batch, self.cells.new_empty
        self.from_x = self.from_z = None
        if not len(self.slab):
            self.from_x = products.of_gates(doubled(ux), G, rows, width_x, doubled(bias))
            self.from_z = products.of_gates(doubled(uh), G, rows, width, None)
        self.back_to_zx = products.back_to_codes(ux, G, rows, width_x)
        self.back_to_z = products.back_to_codes(uh, G, batch, width)
        self.mixed = v.dtype != self.cells.dtype
        self.back_to_h = products.added(v.t(), 1, batch, width, mixed=self.mixed)
        self.factors = state(self.length, batch, G * hidden)
        self.d_cell_d_hidden = state(self.length, batch, hidden)
        self.half = v.new_empty(self.factors.shape) if self.mixed else self.factors
        self.dz = v.new_empty(0)
        self.totals: list[Tensor] = []

    def run(
        self,
        d_output: Tensor | None,
        d_last: Tensor | None,
        final: list[tuple[int, int] | None],
        wants_input: bool,
    ) -> list[Tensor]:
        """All chunks, against the direction of the forward loop."""
        d_zx = self.zx.new_empty(self.zx.shape if wants_input else 0)
        dc = self.cells.new_zeros(self.cells.shape[1:])
        if d_last is not None and not final:
            dc.copy_(d_last)
        if d_output is None:
            d_output = self.cells.new_zeros(1, 1, 1).expand(self.output.shape)
        z: Tensor | None = None
        for start, end in self.ranges:
            gates = self._gates(start, end)
            self._pointwise(gates, start, end)
            z = self._loop(gates, d_output, start, end, dc, z, d_last, final)
            self._gradients(start, end)
            if wants_input:
                d_zx[start:end].flatten(0, 1).copy_(self.back_to_zx(self._slab(start, end)))
        assert z is not None
        du, d_bias, dv = (total.to(self.zx.dtype) for total in self.totals)
        d_ux, d_uh = (part.t().contiguous() for part in du.split(self.ranks))
        return [d_zx, d_ux, d_uh, d_bias, dv, z, dc]

    def _slab(self, start: int, end: int) -> Tensor:
        """Gradients of a chunk's preactivations (N, 4 H), as operands."""
        return self.half[: end - start].flatten(0, 1)

    def _gates(self, start: int, end: int) -> tuple[Tensor, ...]:
        """s(i), s(f), tanh(g) / 2, s(o): as saved, or made again from the codes."""
        if len(self.slab):
            return self.slab[start:end].chunk(G, 2)
        assert self.from_x is not None
        assert self.from_z is not None
        gates = self.from_x(self.zx[start:end].flatten(0, 1)).to(self.cells.dtype)
        gates.add_(self.from_z(self.zh[start:end].flatten(0, 1))).sigmoid_()
        parts = gates.unflatten(0, self.zx[start:end].shape[:2]).chunk(G, 2)
        parts[2].sub_(0.5)
        return parts

    def _pointwise(self, gates: tuple[Tensor, ...], start: int, end: int) -> None:
        """What dh and dc are multiplied by to give the gradients of the preactivations."""
        this, before = (slice(start, end), slice(start + 1, end + 1))
        if not self.reverse:
            this, before = before, this
        i, f, g, o = gates
        of_i, of_f, of_g, of_o = self.factors[: end - start].chunk(G, 2)
        passed = self.d_cell_d_hidden[: end - start]
        sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
        tanh = torch.sigmoid(self.cells[this], out=passed).sub_(0.5)  # tanh(c) / 2
        torch.mul(tanh, 2, out=of_o)
        sigmoid_backward(of_o, o, grad_input=of_o)
        torch.addcmul(o, o, tanh.mul_(tanh), value=-4, out=passed)
        torch.mul(g, 2, out=of_i)
        sigmoid_backward(of_i, i, grad_input=of_i)
        torch.mul(self.cells[before], 0.5, out=of_f)
        sigmoid_backward(of_f, f, grad_input=of_f)
        torch.addcmul(i, i, torch.mul(g, g, out=of_g), value=-4, out=of_g)

    def _loop(
        self,
        gates: tuple[Tensor, ...],
        d_output: Tensor,
        start: int,
        end: int,
        dc: Tensor,
        z: Tensor | None,
        d_last: Tensor | None,
        final: list[tuple[int, int] | None],
    ) -> Tensor:
        """Turn the factors of a chunk into gradients of its preactivations, in place."""
        factors, hidden = self.factors[: end - start], self.output.shape[2]
        forget, passed = gates[1].unbind(0), self.d_cell_d_hidden.unbind(0)
        whole, half, of_output = (
            factors.unbind(0),
            self.half.unbind(0),
            d_output[start:end].unbind(0),
        )
        of_cell = factors[..., : 3 * hidden].unflatten(2, (3, hidden)).unbind(0)
        of_o, each_dc = factors[..., 3 * hidden :].unbind(0), dc.unsqueeze(1)
        dz: list[Any] = [None] * (end - start)
        back_to_h, back_to_z = self.back_to_h, self.back_to_z
        for t in range(start, end) if self.reverse else range(end - 1, start - 1, -1):
            k = t - start
            dh = of_output[k] if z is None else back_to_h(z, of_output[k])
            if final and d_last is not None and (ended := final[t]):
                dc[slice(*ended)] = d_last[slice(*ended)]
            dc.addcmul_(dh, passed[k])
            of_cell[k].mul_(each_dc)
            of_o[k].mul_(dh)
            dc.mul_(forget[k])
            if self.mixed:
                half[k].copy_(whole[k])
            z = dz[k] = back_to_z(half[k])
        self.dz = torch.stack(dz)
        assert z is not None
        return z

    def _gradients(self, start: int, end: int) -> None:
        """Add the chunk to the gradients of the weights."""
        slab, count = self._slab(start, end), end - start
        codes = self.codes[start:end].flatten(0, 1)
        if codes.shape[1] == sum(self.ranks):
            of_u = products.multiply(codes.t(), slab.t())
        else:
            each = zip(codes.split((self.zx.shape[2], len(self.v)), 1), self.ranks, strict=True)
            of_u = torch.cat([products.outer(of, slab, G, rank) for of, rank in each])
        # Step t's codes are V h of the step before it; the first step's are z0, no product of V.
        dz, last = self.dz, len(self.output)
        if self.reverse:
            end = min(end, last - 1)
            dz, before = dz[: end - start], self.output[start + 1 : end + 1]
        else:
            dz, before = dz[int(start == 0) :], self.output[max(start - 1, 0) : end - 1]
        of_v = products.multiply(dz.flatten(0, 1).t(), before.flatten(0, 1).t())
        parts = (of_u, products.column_sums(self.factors[:count].flatten(0, 1)), of_v)
        self.totals = add_up(self.totals, parts, self.cells.dtype)


@_backward.register_fake
def _(d_output, d_last, output, slab, cells, codes, ux, uh, bias, v, reverse, sizes, wanted):  # pyright: ignore
    (steps, batch, both), width = codes.shape, len(v)
    d_zx = codes.new_empty((steps, batch, both - width) if wanted else 0)
    d_z0 = codes.new_empty(batch, width)
    d_c0 = cells.new_empty(cells.shape[1:])
    return [d_zx, *(torch.empty_like(p) for p in (ux, uh, bias, v)), d_z0, d_c0]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    _, ux, uh, bias, v, _, _, ctx.reverse, _, _, ctx.batch_sizes = inputs
    hidden, _, slab, cells, codes = output
    ctx.save_for_backward(hidden, slab, cells, codes, ux, uh, bias, v)
    ctx.mark_non_differentiable(slab, cells, codes)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_output: Tensor | None, d_last: Tensor | None, *_: Any) -> Any:
    wanted = ctx.needs_input_grad[0]
    results = _backward(d_output, d_last, *ctx.saved_tensors, ctx.reverse, ctx.batch_sizes, wanted)
    return None if not wanted else results[0], *results[1:], None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second("LSTM"))
