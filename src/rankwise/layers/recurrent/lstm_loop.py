"""The LSTM's loop over time on low-rank factors, with its own backward through time.

    z_t = V h_{t-1}                       (R)
    i, f, g, o = Ux zx_t + Uh z_t + b     (4 H; torch's order of gates)
    c_t = s(f) c_{t-1} + s(i) tanh(g),    h_t = s(o) tanh(c_t)

What makes it fast on a CPU, where an LSTM is a chain of products of few rows:
 1. tanh(x) = 2 s(2x) - 1: ATen's tanh costs about six sigmoids there. The factor 2 is folded into
    the rows of g in the one copy of U and b that each call makes; the cell state is kept as 2 c,
    the hidden state inside a step as h / 2 (powers of two: exact): one sigmoid for four gates.
 2. Slabs with one block per gate, and chunks of time: see `codes`.
 3. Backward, chunk by chunk: all pointwise factors at once, then a loop that carries dh and dc
    alone through two thin products, then the weights' gradients of the chunk, each as one product.
    A 4 H wide slab of gradients of all steps is never stored.
 4. `recompute`: gates are a function of codes R wide, so they need not be saved; backward makes
    them again, one product per chunk and no loop.

Saved for backward, in numbers per step, row and unit of H: 6 + (Rx + Rh + 1) / H (gates 4, cells 1,
outputs 1, codes), with `recompute` 2 + (Rx + Rh + 1) / H; oneDNN's nn.LSTM keeps 16.5.
Operators of torch.library, so that torch.compile sees one opaque call in either direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import LifeCycleError
from rankwise.layers.recurrent import codes as rows

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def packed(ux: Tensor, uh: Tensor, bias: Tensor) -> Tensor:
    """Both U (4 H, R) and the bias as (4, Rx + 1 + Rh, H), the rows of g doubled: one copy."""
    whole = torch.cat([ux, bias[:, None], uh], 1)
    whole = whole.unflatten(0, (4, -1)).transpose(1, 2).contiguous()
    whole[2].mul_(2)
    return whole


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
    """Hidden states, last cell; and for backward: gates (4, T, B, H), 2 c, codes (else empty)."""
    (steps, batch, _), hidden = zx.shape, v.shape[1]
    nothing = (c0.new_empty(0), c0.new_empty(0), zx.new_empty(0))
    with torch.autocast(zx.device.type, enabled=False):
        codes = rows.rows_of_codes(zx, v.shape[0])
        output = zx.new_empty(steps, batch, hidden)
        # 2 c of every step, and of c0 where the loop begins; without backward one row is enough.
        cells = c0.new_empty(steps + 1 if save else 1, batch, hidden)
        slab = c0.new_empty(4, steps, batch, hidden) if save and not recompute else None
        weights = packed(ux, uh, bias)
        ranks = (ux.shape[1], uh.shape[1])
        last = _loop(codes, weights, ranks, v, z0, c0, output, cells, slab, reverse, batch_sizes)
    if not save:
        return output, last, *nothing
    return output, last, nothing[0] if slab is None else slab, cells, codes


def _loop(
    codes: Tensor,
    weights: Tensor,
    ranks: tuple[int, int],
    v: Tensor,
    z0: Tensor,
    c0: Tensor,
    output: Tensor,
    cells: Tensor,
    slab: Tensor | None,
    reverse: bool,
    batch_sizes: Sequence[int],
) -> Tensor:
    """Run all steps: fill h's part of `codes`, `output`, 2 c in `cells` and the gates in `slab`."""
    steps, batch, hidden = output.shape
    inputs = codes.shape[2] - v.shape[0]
    from_input, from_hidden = weights[:, : ranks[0] + 1], weights[:, ranks[0] + 1 :]
    length, ranges = rows.chunks(steps, batch, backwards=reverse)
    buffer = c0.new_empty(4, length, batch, hidden) if slab is None else None
    half = codes.new_empty(4, batch, hidden) if codes.dtype != c0.dtype else None
    tanh, to_codes, last = torch.empty_like(c0), (v * 2).t(), torch.empty_like(c0)
    z = codes[..., inputs:].unbind(0)
    z_of_gates = [rows.spread(one, 4, ranks[1]) for one in z]
    h = output.unbind(0)
    kept = len(cells) > 1
    cell = torch.mul(c0, 2, out=cells[steps if reverse and kept else 0])
    c = (cells[:-1] if reverse else cells[1:]).unbind(0) if kept else (cell,) * steps
    final = rows.ends(batch_sizes)
    mm, mul, bmm, sigmoid = torch.mm, torch.mul, torch.bmm, torch.sigmoid
    z[-1 if reverse else 0].copy_(z0)
    for start, end in ranges:
        part = slab[:, start:end] if buffer is None else buffer[:, : end - start]  # type: ignore[index]
        rows.multiply(codes[start:end, :, :inputs].flatten(0, 1), from_input, part.flatten(1, 2))
        gates = part.unbind(1)
        i, f, g, o = (gate.unbind(0) for gate in part.unbind(0))
        for t in range(end - 1, start - 1, -1) if reverse else range(start, end):
            k = t - start
            if half is None:
                gates[k].baddbmm_(z_of_gates[t], from_hidden).sigmoid_()
            else:
                gates[k].add_(bmm(z_of_gates[t], from_hidden, out=half)).sigmoid_()
            g[k].sub_(0.5)  # tanh / 2
            cell = mul(f[k], cell, out=c[t]).addcmul_(i[k], g[k], value=4)
            mul(o[k], sigmoid(cell, out=tanh).sub_(0.5), out=h[t])  # h / 2
            following = t - 1 if reverse else t + 1
            if 0 <= following < steps:
                mm(h[t], to_codes, out=z[following])
            if final and (ended := final[t]):
                last[slice(*ended)] = cell[slice(*ended)]
    output.mul_(2)
    return (last if final else cell) / 2


@_forward.register_fake
def _(zx, ux, uh, bias, v, z0, c0, reverse, recompute, save, batch_sizes):  # pyright: ignore
    (steps, batch, inputs), (width, hidden) = zx.shape, v.shape
    slab, cells, codes = c0.new_empty(0), c0.new_empty(0), zx.new_empty(0)
    if save:
        slab = slab if recompute else c0.new_empty(4, steps, batch, hidden)
        cells = c0.new_empty(steps + 1, batch, hidden)
        codes = zx.new_empty(steps, batch, inputs + 1 + width)
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
        work = _Backward(output, slab, cells, codes, ux, uh, bias, v, reverse)
        return work.run(d_output, d_last, rows.ends(batch_sizes), wants_input)


class _Backward:
    """Buffers of one backward, and its three stages for each chunk."""

    def __init__(
        self,
        output: Tensor,
        slab: Tensor,
        cells: Tensor,
        codes: Tensor,
        ux: Tensor,
        uh: Tensor,
        bias: Tensor,
        v: Tensor,
        reverse: bool,
    ) -> None:
        steps, batch, hidden = output.shape
        self.output, self.cells, self.codes, self.v, self.reverse = output, cells, codes, v, reverse
        self.slab = slab if slab.numel() else None
        self.ranks = (ux.shape[1], uh.shape[1])
        self.inputs, self.width = codes.shape[2] - 1 - v.shape[0], v.shape[0]
        self.ux, self.uh = ux.unflatten(0, (4, hidden)), uh.unflatten(0, (4, hidden))
        self.weights = packed(ux, uh, bias) if self.slab is None else None
        self.length, self.ranges = rows.chunks(steps, batch, backwards=not reverse)
        size = (self.length, batch, hidden)
        self.gates = cells.new_empty(4, *size) if self.slab is None else None
        self.factors, self.d_cell_d_hidden = cells.new_empty(4, *size), cells.new_empty(size)
        self.d_hidden = cells.new_empty(size)
        self.half = codes.new_empty(4, *size) if codes.dtype != cells.dtype else None
        self.dz = codes.new_empty(self.length, batch, self.width)
        self.d_weights = cells.new_zeros(4, sum(self.ranks) + 1, hidden)
        self.dv = cells.new_zeros(v.shape)

    def run(
        self,
        d_output: Tensor | None,
        d_last: Tensor | None,
        final: list[tuple[int, int] | None],
        wants_input: bool,
    ) -> list[Tensor]:
        """All chunks, against the direction of the forward loop."""
        (steps, batch, _), codes = self.output.shape, self.codes
        d_zx = codes.new_empty((steps, batch, self.inputs) if wants_input else (0,))
        dc = self.cells.new_zeros(self.cells.shape[1:])
        if d_last is not None and not final:
            dc.copy_(d_last)
        z: Tensor | None = None
        for start, end in self.ranges:
            d_hidden = self.d_hidden[: end - start]
            d_hidden.zero_() if d_output is None else d_hidden.copy_(d_output[start:end])
            gates = self._gates(start, end)
            self._pointwise(gates, start, end)
            z = self._loop(gates, start, end, dc, z, d_last, final)
            self._gradients(start, end, d_zx[start:end].flatten(0, 1) if wants_input else None)
        assert z is not None
        totals = self.d_weights.transpose(1, 2).flatten(0, 1).to(codes.dtype)
        middle = self.ranks[0]
        d_ux, d_bias, d_uh = totals[:, :middle], totals[:, middle], totals[:, middle + 1 :]
        parts = (d_ux.contiguous(), d_uh.contiguous(), d_bias.contiguous())
        return [d_zx, *parts, self.dv.to(codes.dtype), z.clone(), dc]

    def _gates(self, start: int, end: int) -> Tensor:
        """s(i), s(f), tanh(g) / 2, s(o): as saved, or made again from the codes."""
        if self.slab is not None:
            return self.slab[:, start:end]
        assert self.gates is not None
        assert self.weights is not None
        gates, flat = self.gates[:, : end - start], self.codes[start:end].flatten(0, 1)
        middle = self.ranks[0] + 1
        slab = gates.flatten(1, 2)
        rows.multiply(flat[:, : self.inputs + 1], self.weights[:, :middle], slab)
        z = rows.spread(flat[:, self.inputs + 1 :], 4, self.ranks[1])
        if self.half is None:
            slab.baddbmm_(z, self.weights[:, middle:])
        else:
            slab.add_(torch.bmm(z, self.weights[:, middle:]))
        slab.sigmoid_()
        gates[2].sub_(0.5)
        return gates

    def _pointwise(self, gates: Tensor, start: int, end: int) -> None:
        """What dh and dc are multiplied by to give the gradients of the preactivations."""
        this, before = (slice(start, end), slice(start + 1, end + 1))
        if not self.reverse:
            this, before = before, this
        i, _, g, o = gates.unbind(0)
        factors, passed = self.factors[:, : end - start], self.d_cell_d_hidden[: end - start]
        sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
        tanh = torch.sigmoid(self.cells[this], out=passed).sub_(0.5)  # tanh(c) / 2
        torch.mul(tanh, 2, out=factors[3])
        sigmoid_backward(factors[3], o, grad_input=factors[3])
        torch.addcmul(o, o, tanh.mul_(tanh), value=-4, out=passed)
        torch.mul(g, 2, out=factors[0])
        torch.mul(self.cells[before], 0.5, out=factors[1])
        sigmoid_backward(factors[:2], gates[:2], grad_input=factors[:2])
        torch.addcmul(i, i, torch.mul(g, g, out=factors[2]), value=-4, out=factors[2])

    def _loop(
        self,
        gates: Tensor,
        start: int,
        end: int,
        dc: Tensor,
        z: Tensor | None,
        d_last: Tensor | None,
        final: list[tuple[int, int] | None],
    ) -> Tensor:
        """Turn the factors of a chunk into gradients of its preactivations, in place."""
        factors, half = self.factors[:, : end - start], self.half
        d_hidden, passed = self.d_hidden.unbind(0), self.d_cell_d_hidden.unbind(0)
        forget, all_gates = gates[1].unbind(0), factors.unbind(1)
        of_cell, of_output = factors[:3].unbind(1), factors[3].unbind(0)
        operands = all_gates if half is None else half[:, : end - start].unbind(1)
        each_dz, apart = self.dz.unbind(0), self.width != self.ranks[1]
        shared = self.dz.new_empty(4, *self.dz.shape[1:]) if not apart else self.dz
        v, uh = self.v, self.uh
        for t in range(start, end) if self.reverse else range(end - 1, start - 1, -1):
            k = t - start
            dh = d_hidden[k]
            if z is not None:
                dh.addmm_(z, v) if half is None else dh.add_(torch.mm(z, v))
            if final and d_last is not None and (ended := final[t]):
                dc[slice(*ended)] = d_last[slice(*ended)]
            dc.addcmul_(dh, passed[k])
            of_cell[k].mul_(dc)
            of_output[k].mul_(dh)
            dc.mul_(forget[k])
            if half is not None:
                operands[k].copy_(all_gates[k])
            if apart:
                rows.multiply_back(operands[k], uh, each_dz[k])
            else:
                torch.sum(torch.bmm(operands[k], uh, out=shared), 0, out=each_dz[k])
            z = each_dz[k]
        assert z is not None
        return z

    def _gradients(self, start: int, end: int, d_zx: Tensor | None) -> None:
        """Add the chunk to the gradients of the weights; write those of the inputs' codes."""
        count = end - start
        slab = (self.factors if self.half is None else self.half)[:, :count].flatten(1, 2)
        flat, middle = self.codes[start:end].flatten(0, 1), self.ranks[0]
        if flat.shape[1] == self.d_weights.shape[1]:
            rows.add_outer(self.d_weights, flat, slab, flat.shape[1])
        else:
            of_x, of_h = self.d_weights[:, :middle], self.d_weights[:, middle + 1 :]
            rows.add_outer(of_x, flat[:, : self.inputs], slab, self.ranks[0])
            rows.add_outer(of_h, flat[:, self.inputs + 1 :], slab, self.ranks[1])
            self.d_weights[:, middle].add_(self.factors[:, :count].sum((1, 2)))
        # Step t's codes are V h of the step before it; the first step's are z0, no product of V.
        dz = self.dz[:count]
        if self.reverse:
            end = min(end, len(self.output) - 1)
            dz, before = dz[: end - start], self.output[start + 1 : end + 1]
        else:
            dz, before = dz[int(start == 0) :], self.output[max(start - 1, 0) : end - 1]
        if self.half is None:
            self.dv.addmm_(dz.flatten(0, 1).t(), before.flatten(0, 1))
        else:
            self.dv.add_(torch.mm(dz.flatten(0, 1).t(), before.flatten(0, 1)))
        if d_zx is not None:
            rows.multiply_back(slab, self.ux, d_zx)


@_backward.register_fake
def _(d_output, d_last, output, slab, cells, codes, ux, uh, bias, v, reverse, sizes, wants_input):  # pyright: ignore
    (steps, batch, _), width = output.shape, v.shape[0]
    inputs = codes.shape[2] - 1 - width
    d_zx = codes.new_empty((steps, batch, inputs) if wants_input else (0,))
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
    wants_input = ctx.needs_input_grad[0]
    results = _backward(
        d_output, d_last, *ctx.saved_tensors, ctx.reverse, ctx.batch_sizes, wants_input
    )
    return None if not wants_input else results[0], *results[1:], None, None, None, None


def _no_second(ctx: Any, *_: Any) -> Any:
    raise LifeCycleError(
        "the backward of a low-rank LSTM cannot be differentiated again (create_graph=True); for "
        "gradient penalties and Hessians take the dense layer: to_dense()"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_no_second)
