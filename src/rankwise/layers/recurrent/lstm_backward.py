"""The backward of the LSTM's loop through time, chunk by chunk; see `lstm_loop`, points 4 to 6."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.layers.recurrent import lstm_steps, products
from rankwise.layers.recurrent.codes import add_up, chunks, ends

G = 4  # i, f, g, o


def doubled(weight: Tensor) -> Tensor:
    """A copy with the rows of g times two."""
    weight = weight.clone()
    weight.unflatten(0, (G, -1))[2].mul_(2)
    return weight


class Backward:
    """Buffers of one backward, and its three stages for each chunk.

    Args:
        kept: outputs (T, B, H), gates (T, B, 4 H) or empty, 2 c (T + 1, B, H), codes of x and h.
        ux: (4 H, Rx).
        uh: (4 H, Rh).
        bias: (4 H).
        v: (Kh, H).
        reverse: whether the forward loop ran from the last step to the first.
        compiled: the first two stages by `lstm_steps` where they can be had.
    """

    def __init__(
        self,
        kept: tuple[Tensor, Tensor, Tensor, Tensor],
        ux: Tensor,
        uh: Tensor,
        bias: Tensor,
        v: Tensor,
        reverse: bool,
        compiled: bool,
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
        self.mixed = v.dtype != self.cells.dtype
        self.factors = state(self.length, batch, G * hidden)
        self.half = v.new_empty(self.factors.shape) if self.mixed else self.factors
        self.steps = None
        if compiled and lstm_steps.library() is not None:
            self.steps = lstm_steps.Backward(uh, v, reverse)
        else:
            self.back_to_z = products.back_to_codes(uh, G, batch, width)
            self.back_to_h = products.added(v.t(), 1, batch, width, mixed=self.mixed)
            self.d_cell_d_hidden = state(self.length, batch, hidden)
        self.dz = v.new_empty(0)
        self.totals: list[Tensor] = []

    def run(
        self,
        d_output: Tensor | None,
        d_last: Tensor | None,
        batch_sizes: Sequence[int],
        wants_input: bool,
    ) -> list[Tensor]:
        """All chunks, against the direction of the forward loop."""
        final = ends(batch_sizes)
        d_zx = self.zx.new_empty(self.zx.shape if wants_input else 0)
        dc = self.cells.new_zeros(self.cells.shape[1:])
        if d_last is not None and not final:
            dc.copy_(d_last)
        if d_output is None:
            d_output = self.cells.new_zeros(1, 1, 1).expand(self.output.shape)
        z: Tensor | None = None
        sizes = lstm_steps.following(batch_sizes, *self.output.shape[:2])
        for start, end in self.ranges:
            gates = self._gates(start, end)
            if self.steps is None:
                self._pointwise(gates.chunk(G, 2), start, end)
                z = self._loop(gates.chunk(G, 2), d_output, start, end, dc, z, d_last, final)
            else:
                cells, slab = self.cells[start : end + 1], self.factors[: end - start]
                ended = (d_last if final else None, sizes[start : end + 1])
                self.dz = self.steps.run(gates, cells, d_output[start:end], dc, z, slab, *ended)
                z = self.dz[-1 if self.reverse else 0]
            self._gradients(start, end)
            if wants_input:
                d_zx[start:end].flatten(0, 1).copy_(self.back_to_zx(self._slab(start, end)))
        assert z is not None
        du, d_bias, dv = (total.to(self.zx.dtype) for total in self.totals)
        # Of rank 1 a part lies without gaps already, and results share no memory.
        steady = torch.contiguous_format
        d_ux, d_uh = (part.t().clone(memory_format=steady) for part in du.split(self.ranks))
        return [d_zx, d_ux, d_uh, d_bias, dv, z, dc]

    def _slab(self, start: int, end: int) -> Tensor:
        """Gradients of a chunk's preactivations (N, 4 H), as operands."""
        return self.half[: end - start].flatten(0, 1)

    def _gates(self, start: int, end: int) -> Tensor:
        """s(i), s(f), tanh(g) / 2, s(o), side by side: as saved, or made again from the codes."""
        if len(self.slab):
            return self.slab[start:end]
        assert self.from_x is not None
        assert self.from_z is not None
        gates = self.from_x(self.zx[start:end].flatten(0, 1)).to(self.cells.dtype)
        gates.add_(self.from_z(self.zh[start:end].flatten(0, 1))).sigmoid_()
        gates = gates.unflatten(0, self.zx[start:end].shape[:2])
        gates.chunk(G, 2)[2].sub_(0.5)
        return gates

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
