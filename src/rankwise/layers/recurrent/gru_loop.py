"""The GRU's loop over time on low-rank factors, with its own backward through time.

    q_t = V h_{t-1}                                          (R; `z` is a gate here)
    r, z = s(Ux zx_t + Uh q_t + bx + bh)                     (rows r, z of torch's order r, z, n)
    n = tanh(Ux zx_t + bx + r (Uh q_t + bh))                 (rows n)
    h_t = n + z (h_{t-1} - n)

Made as the LSTM's loop, see `lstm_loop`. The rows of n are doubled for tanh(x) = 2 s(2x) - 1, the
hidden state is kept as h / 2. In backward all four gradients are one factor each times dh:

    n: (1 - z) (1 - n^2) = a,   r: a m r (1 - r),   z: (h_{t-1} - n) z (1 - z),   m: a r

with m = Uh q_t + bh of n's rows, so a step is one pointwise product of four slabs.

Saved for backward, in numbers per step, row and unit of H: 5 + (Rx + Rh) / H (r, z, n, m,
outputs, codes), with `recompute` 1 + (Rx + Rh) / H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.layers.recurrent import products
from rankwise.layers.recurrent.codes import add_up, chunks, no_second

Results = tuple[Tensor, Tensor, Tensor]
G = 3
# A slab (.., 4 H) of n, r, z, m: the inputs have part in the first three, h in the last three.


def packed(ux: Tensor, uh: Tensor, bx: Tensor, bh: Tensor) -> tuple[Tensor, ...]:
    """Copies of Ux, bx in the order n, r, z and of Uh, bh in that of r, z, m; n and m doubled.

    The biases of r and z are summed into bx.
    """
    ux, bx = (part.unflatten(0, (G, -1))[[2, 0, 1]] for part in (ux, bx))
    uh, bh = (part.clone().unflatten(0, (G, -1)) for part in (uh, bh))
    for part in (ux[0], bx[0], uh[2], bh[2]):
        part.mul_(2)
    bx[1:].add_(bh[:2])
    bh[:2].zero_()
    return ux.flatten(0, 1), uh.flatten(0, 1), bx.flatten(), bh.flatten()


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


def prepare(
    zx: Tensor, ux: Tensor, uh: Tensor, bx: Tensor, bh: Tensor, v: Tensor
) -> tuple[products.Product, ...]:
    """The products of a loop over inputs of zx's shape: factors copied and reordered. As `run`."""
    steps, batch, width_x = zx.shape
    length, _ = chunks(steps, batch, 4 * v.shape[1], backwards=False)
    ux, uh, bx, bh = packed(ux, uh, bx, bh)
    return (
        products.of_gates(ux, G, length * batch, width_x, bx),
        products.of_gates(uh, G, batch, len(v), bh),
        products.product(v * 2, batch),
    )


def infer(
    zx: Tensor, ready: tuple[products.Product, ...], q0: Tensor, h0: Tensor, reverse: bool = False
) -> Tensor:
    """As `run`, without gradients, by factors that were prepared."""
    output = zx.new_empty(*zx.shape[:2], h0.shape[1])
    with torch.autocast(zx.device.type, enabled=False):
        _loop(zx, ready, q0, h0, (output, h0.new_empty(0), zx.new_empty(0)), reverse)
    return output


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
    """Hidden states; for backward n / 2, r, z, 2 m (T, B, 4 H) and codes of x and h, or empty."""
    (steps, batch, width_x), (width, hidden) = zx.shape, v.shape
    output = zx.new_empty(steps, batch, hidden)
    slab = h0.new_empty((steps, batch, 4 * hidden) if save and not recompute else 0)
    codes = zx.new_empty((steps, batch, width_x + width) if save else 0)
    with torch.autocast(zx.device.type, enabled=False):
        ready = prepare(zx, ux, uh, bx, bh, v)
        _loop(zx, ready, q0, h0, (output, slab, codes), reverse)
    return output, slab, codes


def _loop(
    zx: Tensor,
    ready: tuple[products.Product, ...],
    q: Tensor,
    h0: Tensor,
    kept: tuple[Tensor, Tensor, Tensor],
    reverse: bool,
) -> None:
    """Run all steps: fill the outputs, and of gates and codes those that are not empty."""
    output, slab, codes = kept
    (steps, batch, hidden), width_x, mixed = output.shape, zx.shape[2], zx.dtype != h0.dtype
    _, ranges = chunks(steps, batch, 4 * hidden, backwards=reverse)
    from_x, from_h, to_codes = ready
    if len(codes):
        codes[..., :width_x] = zx
    of_h, h = codes[..., width_x:].unbind(0), output.unbind(0)
    state, half, buffer = h0 / 2, torch.full_like(h0, 0.5), h0.new_empty(batch, 4 * hidden)
    sizes, add, addcmul, lerp = (2 * hidden, hidden), torch.add, torch.addcmul, torch.lerp
    for start, end in ranges:
        x = from_x(zx[start:end].flatten(0, 1)).to(h0.dtype).unflatten(0, (end - start, batch))
        x_n, x_rz = (part.unbind(0) for part in x.split(sizes[::-1], 2))
        chunk = slab[start:end] if len(slab) else buffer.expand(end - start, -1, -1)
        n, r, z, m = (part.unbind(0) for part in chunk.chunk(4, 2))
        gates = chunk[..., hidden : 3 * hidden].unbind(0)
        for t in range(end - 1, start - 1, -1) if reverse else range(start, end):
            k = t - start
            if of_h:
                of_h[t].copy_(q)
            h_rz, h_m = from_h(q).split(sizes, 1)
            add(h_rz, x_rz[k], out=gates[k]).sigmoid_()
            h_m = m[k].copy_(h_m) if mixed or len(slab) else h_m
            addcmul(x_n[k], r[k], h_m, out=n[k]).sigmoid_().sub_(half)  # tanh / 2
            if mixed:
                h[t].copy_(lerp(n[k], state, z[k], out=state))
            else:
                state = lerp(n[k], state, z[k], out=h[t])  # h / 2
            q = to_codes(h[t])
    output.mul_(2)


@_forward.register_fake
def _(zx, ux, uh, bx, bh, v, q0, h0, reverse, recompute, save):  # pyright: ignore
    (steps, batch, width_x), (width, hidden) = zx.shape, v.shape
    slab = h0.new_empty((steps, batch, 4 * hidden) if save and not recompute else 0)
    codes = zx.new_empty((steps, batch, width_x + width) if save else 0)
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
        work = _Backward((output, slab, codes), (ux, uh, bx, bh), v, h0, reverse)
        return work.run(d_output, wants_input)


class _Backward:
    """Buffers of one backward, and its three stages for each chunk."""

    def __init__(
        self,
        kept: tuple[Tensor, Tensor, Tensor],
        weights: tuple[Tensor, Tensor, Tensor, Tensor],
        v: Tensor,
        h0: Tensor,
        reverse: bool,
    ) -> None:
        self.output, self.slab, self.codes = kept
        ux, uh, bx, bh = weights
        self.h0, self.reverse, self.ranks = h0, reverse, (ux.shape[1], uh.shape[1])
        (steps, batch, self.hidden), width = self.output.shape, len(v)
        width_x = self.codes.shape[2] - width
        self.zx, self.q = self.codes[..., :width_x], self.codes[..., width_x:]
        self.length, self.ranges = chunks(steps, batch, 4 * self.hidden, backwards=not reverse)
        rows, self.mixed = self.length * batch, v.dtype != h0.dtype
        self.from_x = self.from_h = None
        if not len(self.slab):
            doubled_ux, doubled_uh, both, of_m = packed(ux, uh, bx, bh)
            self.from_x = products.of_gates(doubled_ux, G, rows, width_x, both)
            self.from_h = products.of_gates(doubled_uh, G, rows, width, of_m)
        ux = ux.unflatten(0, (G, -1))[[2, 0, 1]].flatten(0, 1)
        self.back_to_zx = products.back_to_codes(ux, G, rows, width_x)
        self.back_to_q = products.back_to_codes(uh, G, batch, width)
        self.back_to_h = products.added(v.t(), 1, batch, width, mixed=self.mixed)
        self.factors = h0.new_empty(self.length, batch, 4 * self.hidden)
        self.half = v.new_empty(self.factors.shape) if self.mixed else self.factors
        self.dq = v.new_empty(self.length, batch, width)
        self.totals: list[Tensor] = []

    def run(self, d_output: Tensor, wants_input: bool) -> list[Tensor]:
        """All chunks, against the direction of the forward loop."""
        d_zx = self.zx.new_empty(self.zx.shape if wants_input else 0)
        carry: Tensor = torch.zeros_like(self.h0)
        dq: Tensor | None = None
        for start, end in self.ranges:
            gates = self._gates(start, end)
            self._pointwise(gates, start, end)
            dq = self._loop(gates[2], d_output[start:end], carry, dq)
            self._gradients(start, end)
            if wants_input:
                of_x = self.half[: end - start, :, : 3 * self.hidden].flatten(0, 1)
                d_zx[start:end].flatten(0, 1).copy_(self.back_to_zx(of_x))
        assert dq is not None
        d_ux, d_uh, bias, dv = (total.to(self.zx.dtype) for total in self.totals)
        d_ux = d_ux.unflatten(1, (G, -1))[:, [1, 2, 0]].flatten(1).t().contiguous()
        of_n, of_h = bias.split((self.hidden, 3 * self.hidden))
        d_bx = torch.cat([of_h[: 2 * self.hidden], of_n])
        return [d_zx, d_ux, d_uh.t().contiguous(), d_bx, of_h.clone(), dv, dq, carry]

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

    def _gates(self, start: int, end: int) -> tuple[Tensor, ...]:
        """n / 2, r, z and 2 m: as saved, or made again from the codes."""
        if len(self.slab):
            return self.slab[start:end].chunk(4, 2)
        assert self.from_x is not None
        assert self.from_h is not None
        hidden, shape = self.hidden, (end - start, len(self.h0))
        x = self.from_x(self.zx[start:end].flatten(0, 1)).to(self.h0.dtype)
        h = self.from_h(self.q[start:end].flatten(0, 1)).to(self.h0.dtype)
        x[:, hidden:].add_(h[:, : 2 * hidden]).sigmoid_()
        n, r, z = x.unflatten(0, shape).chunk(3, 2)
        m = h[:, 2 * hidden :].unflatten(0, shape)
        n.addcmul_(r, m).sigmoid_().sub_(0.5)
        return n, r, z, m

    def _pointwise(self, gates: tuple[Tensor, ...], start: int, end: int) -> None:
        """What dh is multiplied by to give the gradients of n, r, z and m."""
        n, r, z, m = gates
        of_n, of_r, of_z, of_m = self.factors[: end - start].chunk(4, 2)
        sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
        for part, before in self._before(start, end):
            torch.sub(before, n[part], alpha=2, out=of_z[part])
        sigmoid_backward(of_z, z, grad_input=of_z)
        # 1 - tanh^2 = 1 - 4 (n / 2)^2, then times 1 - z
        torch.mul(n, n, out=of_r).mul_(-4).add_(1)
        torch.addcmul(of_r, of_r, z, value=-1, out=of_n)
        torch.mul(of_n, r, out=of_m)
        torch.mul(of_n, m, out=of_r).mul_(0.5)
        sigmoid_backward(of_r, r, grad_input=of_r)

    def _loop(self, z: Tensor, d_output: Tensor, carry: Tensor, dq: Tensor | None) -> Tensor:
        """Turn the factors of a chunk into gradients in place; `carry` is what z hands to h."""
        hidden, count = self.hidden, len(d_output)
        factors, half = self.factors[:count].unflatten(2, (4, hidden)), self.half[:count]
        each, whole, halves = factors.unbind(0), self.factors.unbind(0), half.unbind(0)
        of_h, of_output = half[..., hidden:].unbind(0), d_output.unbind(0)
        of_z, save = z.unbind(0), self.dq.unbind(0)
        back_to_h, back_to_q = self.back_to_h, self.back_to_q
        for k in range(count) if self.reverse else range(count - 1, -1, -1):
            dh = torch.add(carry, of_output[k])
            if dq is not None:
                dh = back_to_h(dq, dh)
            each[k].mul_(dh.unsqueeze(1))
            torch.mul(dh, of_z[k], out=carry)
            if self.mixed:
                halves[k].copy_(whole[k])
            dq = back_to_q(of_h[k])
            save[k].copy_(dq)
        assert dq is not None
        return dq

    def _gradients(self, start: int, end: int) -> None:
        """Add the chunk to the gradients of the weights."""
        count, hidden = end - start, self.hidden
        slab = self.half[:count].flatten(0, 1)
        of_x, of_h = slab[:, : 3 * hidden], slab[:, hidden:]
        zx, q = (codes[start:end].flatten(0, 1) for codes in (self.zx, self.q))
        # The codes of h0 are q0, no product of V.
        part, before = self._before(start, end)[0]
        dq = self.dq[:count][part].flatten(0, 1).t()
        parts = (
            products.outer(zx, of_x, G, self.ranks[0]),
            products.outer(q, of_h, G, self.ranks[1]),
            products.column_sums(self.factors[:count].flatten(0, 1)),
            products.multiply(dq, before.flatten(0, 1).t()),
        )
        self.totals = add_up(self.totals, parts, self.h0.dtype)


@_backward.register_fake
def _(d_output, output, slab, codes, ux, uh, bx, bh, v, h0, reverse, wanted):  # pyright: ignore
    (steps, batch, both), width = codes.shape, len(v)
    d_zx = codes.new_empty((steps, batch, both - width) if wanted else 0)
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


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_second("GRU"))
