"""The GRU's loop over time on low-rank factors, with its own backward through time.

    q_t = V h_{t-1}                                          (R; `z` is a gate here)
    r, z = s(Ux zx_t + Uh q_t + bx + bh)                     (rows r, z of torch's order r, z, n)
    n = tanh(Ux zx_t + bx + r (Uh q_t + bh))                 (rows n)
    h_t = n + z (h_{t-1} - n)

Made as the LSTM's loop, see `lstm_loop`. The rows of n are doubled for tanh(x) = 2 s(2x) - 1, the
hidden state is kept as h / 2. In backward all four gradients are one factor each times dh:

    n: (1 - z) (1 - n^2) = a,   r: a m r (1 - r),   z: (h_{t-1} - n) z (1 - z),   m: a r

with m = Uh q_t + bh of n's rows, so a step is one pointwise product of four slabs.

Saved for backward, in numbers per step, row and unit of H: 5 + (Rx + Rh + 1) / H (r, z, n, m,
outputs, codes), with `recompute` 1 + (Rx + Rh + 1) / H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.errors import LifeCycleError
from rankwise.layers.recurrent import codes as rows

Results = tuple[Tensor, Tensor, Tensor]
# Slabs of the gates: n, r, z, m. The inputs have part in the first three, the codes of h in the
# last three.
N, R, Z, M = range(4)


def packed(ux: Tensor, uh: Tensor, bx: Tensor, bh: Tensor) -> tuple[Tensor, Tensor]:
    """For the inputs (3, Rx + 1, H) of n, r, z and for h (3, 1 + Rh, H) of r, z, m; n, m doubled.

    The biases of r and z are summed into the inputs' row.
    """
    x = torch.cat([ux, bx[:, None]], 1).unflatten(0, (3, -1)).transpose(1, 2)
    h = torch.cat([bh[:, None], uh], 1).unflatten(0, (3, -1)).transpose(1, 2).contiguous()
    x = x[[2, 0, 1]]
    x[0].mul_(2)
    h[2].mul_(2)
    x[1:, -1].add_(h[:2, 0])
    return x, h


def run(
    zx: Tensor,
    ux: Tensor,
    uh: Tensor,
    bx: Tensor,
    bh: Tensor,
    v: Tensor,
    q0: Tensor,
    h0: Tensor,
    reverse: bool = False,
    recompute: bool = False,
) -> Tensor:
    """All hidden states of one layer in one direction.

    Args:
        zx: (T, B, Kx), the codes of the inputs; Kx = Rx, or 3 Rx with codes for each gate, n, r, z.
        ux: (3 H, Rx).
        uh: (3 H, Rh).
        bx: (3 H).
        bh: (3 H).
        v: (Kh, H); Kh = Rh, or 3 Rh with codes for each gate.
        q0: (B, Kh), the codes of the first hidden state.
        h0: (B, H), the first hidden state, in the dtype of states.
        reverse: from the last step to the first.
        recompute: keep no gates for backward, make them again.

    Returns:
        (T, B, H) in the operands' dtype.
    """
    tensors = (zx, ux, uh, bx, bh, v, q0, h0)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return _forward(*tensors, reverse, recompute, save)[0]


@torch.library.custom_op("rankwise::gru", mutates_args=())
def _forward(
    zx: Tensor,
    ux: Tensor,
    uh: Tensor,
    bx: Tensor,
    bh: Tensor,
    v: Tensor,
    q0: Tensor,
    h0: Tensor,
    reverse: bool,
    recompute: bool,
    save: bool,
) -> Results:
    """Hidden states; and for backward: n / 2, r, z, 2 m (4, T, B, H) and codes (else empty)."""
    (steps, batch, _), hidden = zx.shape, v.shape[1]
    with torch.autocast(zx.device.type, enabled=False):
        codes = rows.rows_of_codes(zx, v.shape[0])
        output = zx.new_empty(steps, batch, hidden)
        slab = h0.new_empty(4, steps, batch, hidden) if save and not recompute else None
        weights = packed(ux, uh, bx, bh)
        _loop(codes, weights, v, q0, h0, output, slab, reverse)
    nothing = h0.new_empty(0)
    return output, nothing if slab is None else slab, codes if save else zx.new_empty(0)


def _loop(
    codes: Tensor,
    weights: tuple[Tensor, Tensor],
    v: Tensor,
    q0: Tensor,
    h0: Tensor,
    output: Tensor,
    slab: Tensor | None,
    reverse: bool,
) -> None:
    """Run all steps: fill h's part of `codes`, `output` and the gates in `slab`."""
    steps, batch, hidden = output.shape
    inputs, (from_x, from_h) = codes.shape[2] - v.shape[0], weights
    bias, of_gates, of_m = from_h[2, 0], from_h[:2, 1:], from_h[2, 1:]
    length, ranges = rows.chunks(steps, batch, backwards=reverse)
    buffer = h0.new_empty(4, length, batch, hidden) if slab is None else None
    half = codes.new_empty(2, batch, hidden) if codes.dtype != h0.dtype else None
    each_q, h, to_codes = codes[..., inputs:].unbind(0), output.unbind(0), (v * 2).t()
    spread = [rows.spread(q, 3, from_h.shape[1] - 1) for q in each_q]
    q_of_gates, q_of_m = [q[:2] for q in spread], [q[2] for q in spread]
    state, begun = h0 / 2, reverse and steps - 1
    mm, bmm, addmm, addcmul, lerp = torch.mm, torch.bmm, torch.addmm, torch.addcmul, torch.lerp
    each_q[begun].copy_(q0)
    for start, end in ranges:
        part = slab[:, start:end] if slab is not None else buffer[:, : end - start]  # pyright: ignore
        flat = codes[start:end, :, :inputs].flatten(0, 1)
        rows.multiply(flat, from_x, part[:M].flatten(1, 2))
        gates, (n, r, z, m) = part[R:M].unbind(1), (gate.unbind(0) for gate in part.unbind(0))
        for t in range(end - 1, start - 1, -1) if reverse else range(start, end):
            k = t - start
            if half is None:
                gates[k].baddbmm_(q_of_gates[t], of_gates).sigmoid_()
                addmm(bias, q_of_m[t], of_m, out=m[k])
            else:
                gates[k].add_(bmm(q_of_gates[t], of_gates, out=half)).sigmoid_()
                m[k].copy_(addmm(bias, q_of_m[t], of_m))
            addcmul(n[k], r[k], m[k], out=n[k]).sigmoid_().sub_(0.5)  # tanh / 2
            if half is None:
                state = lerp(n[k], state, z[k], out=h[t])  # h / 2
            else:
                h[t].copy_(lerp(n[k], state, z[k], out=state))
            following = t - 1 if reverse else t + 1
            if 0 <= following < steps:
                mm(h[t], to_codes, out=each_q[following])
    output.mul_(2)


@_forward.register_fake
def _(zx, ux, uh, bx, bh, v, q0, h0, reverse, recompute, save):  # pyright: ignore
    (steps, batch, inputs), (width, hidden) = zx.shape, v.shape
    slab, codes = h0.new_empty(0), zx.new_empty(0)
    if save:
        slab = slab if recompute else h0.new_empty(4, steps, batch, hidden)
        codes = zx.new_empty(steps, batch, inputs + 1 + width)
    return zx.new_empty(steps, batch, hidden), slab, codes


@torch.library.custom_op("rankwise::gru_backward", mutates_args=())
def _backward(
    d_output: Tensor,
    output: Tensor,
    slab: Tensor,
    codes: Tensor,
    ux: Tensor,
    uh: Tensor,
    bx: Tensor,
    bh: Tensor,
    v: Tensor,
    h0: Tensor,
    reverse: bool,
    wants_input: bool,
) -> list[Tensor]:
    """Gradients of zx (empty if not wanted), ux, uh, bx, bh, v, q0 and h0."""
    with torch.autocast(codes.device.type, enabled=False):
        work = _Backward(output, slab, codes, ux, uh, bx, bh, v, h0, reverse)
        return work.run(d_output, wants_input)


class _Backward:
    """Buffers of one backward, and its three stages for each chunk."""

    def __init__(
        self,
        output: Tensor,
        slab: Tensor,
        codes: Tensor,
        ux: Tensor,
        uh: Tensor,
        bx: Tensor,
        bh: Tensor,
        v: Tensor,
        h0: Tensor,
        reverse: bool,
    ) -> None:
        steps, batch, hidden = output.shape
        self.output, self.codes, self.v, self.h0, self.reverse = output, codes, v, h0, reverse
        self.slab = slab if slab.numel() else None
        self.ranks = (ux.shape[1], uh.shape[1])
        self.inputs, self.width = codes.shape[2] - 1 - v.shape[0], v.shape[0]
        self.ux = ux.unflatten(0, (3, hidden))[[2, 0, 1]]
        self.uh = uh.unflatten(0, (3, hidden))
        self.weights = packed(ux, uh, bx, bh) if self.slab is None else None
        self.length, self.ranges = rows.chunks(steps, batch, backwards=not reverse)
        size = (self.length, batch, hidden)
        self.gates = h0.new_empty(4, *size) if self.slab is None else None
        self.factors, self.d_hidden = h0.new_empty(4, *size), h0.new_empty(size)
        self.half = codes.new_empty(4, *size) if codes.dtype != h0.dtype else None
        self.dq = codes.new_empty(self.length, batch, self.width)
        # Of n, r, z with the inputs' codes and the 1, and of r, z, m with those of h.
        self.d_of_x = h0.new_zeros(3, self.ranks[0], hidden)
        self.d_of_h = h0.new_zeros(3, self.ranks[1], hidden)
        self.d_bias, self.dv = h0.new_zeros(4, hidden), h0.new_zeros(v.shape)

    def run(self, d_output: Tensor, wants_input: bool) -> list[Tensor]:
        """All chunks, against the direction of the forward loop."""
        (steps, batch, _), codes = self.output.shape, self.codes
        d_zx = codes.new_empty((steps, batch, self.inputs) if wants_input else (0,))
        carry: Tensor = torch.zeros_like(self.h0)
        dq: Tensor | None = None
        for start, end in self.ranges:
            self.d_hidden[: end - start].copy_(d_output[start:end])
            gates = self._gates(start, end)
            self._pointwise(gates, start, end)
            dq = self._loop(gates, start, end, carry, dq)
            self._gradients(start, end, d_zx[start:end].flatten(0, 1) if wants_input else None)
        assert dq is not None
        d_ux = self.d_of_x[[1, 2, 0]].transpose(1, 2).flatten(0, 1)
        d_uh = self.d_of_h.transpose(1, 2).flatten(0, 1)
        d_bx, d_bh = self.d_bias[[R, Z, N]].flatten(), self.d_bias[R:].flatten()
        parts = (part.to(codes.dtype) for part in (d_ux, d_uh, d_bx, d_bh, self.dv))
        return [d_zx, *(part.contiguous() for part in parts), dq.clone(), carry]

    def _before(self, start: int, end: int) -> list[tuple[slice, Tensor]]:
        """h_{t-1} for the steps of a chunk, as slices of it and what stands there."""
        if self.reverse:
            inside = min(end, len(self.output) - 1)
            found = [(slice(0, inside - start), self.output[start + 1 : inside + 1])]
            edge = slice(end - start - 1, end - start) if inside < end else None
        else:
            inside = max(start, 1)
            found = [(slice(inside - start, end - start), self.output[inside - 1 : end - 1])]
            edge = slice(0, 1) if inside > start else None
        return [*found, *([] if edge is None else [(edge, self.h0[None])])]

    def _gates(self, start: int, end: int) -> Tensor:
        """n / 2, r, z and 2 m: as saved, or made again from the codes."""
        if self.slab is not None:
            return self.slab[:, start:end]
        assert self.gates is not None
        assert self.weights is not None
        gates, flat = self.gates[:, : end - start], self.codes[start:end].flatten(0, 1)
        of_x, of_h = self.weights
        slab = gates.flatten(1, 2)
        rows.multiply(flat[:, : self.inputs + 1], of_x, slab[:M])
        q = rows.spread(flat[:, self.inputs + 1 :], 3, self.ranks[1])
        if self.half is None:
            slab[R:M].baddbmm_(q[:2], of_h[:2, 1:]).sigmoid_()
            torch.addmm(of_h[2, 0], q[2], of_h[2, 1:], out=slab[M])
        else:
            slab[R:M].add_(torch.bmm(q[:2], of_h[:2, 1:])).sigmoid_()
            slab[M].copy_(torch.addmm(of_h[2, 0], q[2], of_h[2, 1:]))
        slab[N].addcmul_(slab[R], slab[M]).sigmoid_().sub_(0.5)
        return gates

    def _pointwise(self, gates: Tensor, start: int, end: int) -> None:
        """What dh is multiplied by to give the gradients of n, r, z and m."""
        n, r, z, m = gates.unbind(0)
        factors = self.factors[:, : end - start]
        sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
        for part, before in self._before(start, end):
            torch.sub(before, n[part], alpha=2, out=factors[Z][part])
        sigmoid_backward(factors[Z], z, grad_input=factors[Z])
        # 1 - tanh^2 = 1 - 4 (n / 2)^2, then times 1 - z
        torch.mul(n, n, out=factors[R]).mul_(-4).add_(1)
        torch.addcmul(factors[R], factors[R], z, value=-1, out=factors[N])
        torch.mul(factors[N], r, out=factors[M])
        torch.mul(factors[N], m, out=factors[R]).mul_(0.5)
        sigmoid_backward(factors[R], r, grad_input=factors[R])

    def _loop(
        self, gates: Tensor, start: int, end: int, carry: Tensor, dq: Tensor | None
    ) -> Tensor:
        """Turn the factors of a chunk into gradients in place; `carry` is what z hands to h."""
        factors, half, v, uh = self.factors[:, : end - start], self.half, self.v, self.uh
        d_hidden, z, each = self.d_hidden.unbind(0), gates[Z].unbind(0), factors.unbind(1)
        operands = each if half is None else half[:, : end - start].unbind(1)
        seen = [operand[R:] for operand in operands]
        each_dq, apart = self.dq.unbind(0), self.width != self.ranks[1]
        shared = self.dq if apart else self.dq.new_empty(3, *self.dq.shape[1:])
        for t in range(start, end) if self.reverse else range(end - 1, start - 1, -1):
            k = t - start
            dh = d_hidden[k].add_(carry)
            if dq is not None:
                dh.addmm_(dq, v) if half is None else dh.add_(torch.mm(dq, v))
            each[k].mul_(dh)
            torch.mul(dh, z[k], out=carry)
            if half is not None:
                operands[k].copy_(each[k])
            dq = each_dq[k]
            if apart:
                rows.multiply_back(seen[k], uh, dq)
            else:
                torch.sum(torch.bmm(seen[k], uh, out=shared), 0, out=dq)
        assert dq is not None
        return dq

    def _gradients(self, start: int, end: int, d_zx: Tensor | None) -> None:
        """Add the chunk to the gradients of the weights; write those of the inputs' codes."""
        count = end - start
        slab = (self.factors if self.half is None else self.half)[:, :count].flatten(1, 2)
        flat = self.codes[start:end].flatten(0, 1)
        rows.add_outer(self.d_of_x, flat[:, : self.inputs], slab[:M], self.ranks[0])
        rows.add_outer(self.d_of_h, flat[:, self.inputs + 1 :], slab[R:], self.ranks[1])
        self.d_bias.add_(self.factors[:, :count].sum((1, 2)))
        # The codes of h0 are q0, no product of V.
        part, before = self._before(start, end)[0]
        dq = self.dq[:count][part].flatten(0, 1).t()
        if self.half is None:
            self.dv.addmm_(dq, before.flatten(0, 1))
        else:
            self.dv.add_(torch.mm(dq, before.flatten(0, 1)))
        if d_zx is not None:
            rows.multiply_back(slab[:M], self.ux, d_zx)


@_backward.register_fake
def _(d_output, output, slab, codes, ux, uh, bx, bh, v, h0, reverse, wants_input):  # pyright: ignore
    (steps, batch, _), width = output.shape, v.shape[0]
    inputs = codes.shape[2] - 1 - width
    d_zx = codes.new_empty((steps, batch, inputs) if wants_input else (0,))
    parts = (torch.empty_like(p) for p in (ux, uh, bx, bh, v))
    return [d_zx, *parts, codes.new_empty(batch, width), torch.empty_like(h0)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    _, ux, uh, bx, bh, v, _, h0, ctx.reverse, _, _ = inputs
    hidden, slab, codes = output
    ctx.save_for_backward(hidden, slab, codes, ux, uh, bx, bh, v, h0)
    ctx.mark_non_differentiable(slab, codes)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_output: Tensor | None, *_: Any) -> Any:
    if d_output is None:
        return (None,) * 11
    wants_input = ctx.needs_input_grad[0]
    results = _backward(d_output, *ctx.saved_tensors, ctx.reverse, wants_input)
    return None if not wants_input else results[0], *results[1:], None, None, None


def _no_second(ctx: Any, *_: Any) -> Any:
    raise LifeCycleError(
        "the backward of a low-rank GRU cannot be differentiated again (create_graph=True); for "
        "gradient penalties and Hessians take the dense layer: to_dense()"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_no_second)
