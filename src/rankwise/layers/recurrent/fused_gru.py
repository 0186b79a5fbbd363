"""The GRU's loop over time on low-rank factors as one CUDA kernel, with its own backward.

    q_t = V h_{t-1}                                          (R; `z` is a gate here)
    r, z = s(x_t + U q_t)                                    (rows r, z of torch's order r, z, n)
    n = tanh(x_t + r m),    m = U q_t + b                    (rows n)
    h_t = n + z (h_{t-1} - n)

Saved for backward, in numbers per step, row and unit: r, z, n, m 4, outputs 1, codes R / H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.layers.recurrent.codes import final
from rankwise.layers.recurrent.fused import gradient_of_v, launch


def run(
    x: Tensor, u: Tensor, bias: Tensor, v: Tensor, q0: Tensor, h0: Tensor, reverse: bool = False
) -> Tensor:
    """All hidden states (T, B, H) of one layer in one direction, of x's dtype.

    Args:
        x: (T, B, 3 H), the inputs' part of the gates, with both biases of r and z and the
            input's of n.
        u: (3 H, R).
        bias: (H), the recurrent one of n.
        v: (R, H), which `fused.fits`.
        q0: (B, R), the codes of the first hidden state.
        h0: (B, H), the first hidden state, float32.
        reverse: from the last step to the first.
    """
    tensors = (x, u, bias, v, q0, h0)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Loop.apply(*tensors, reverse)
    return _steps(*tensors, reverse, save=False)[0]


def _steps(
    x: Tensor,
    u: Tensor,
    bias: Tensor,
    v: Tensor,
    q0: Tensor,
    h0: Tensor,
    reverse: bool,
    *,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Hidden states; for backward r, z, n, m and codes of every step."""
    x, u, bias, v, h0 = (t.contiguous() for t in (x, u, bias, v, h0))
    (steps, batch, _), (rank, hidden) = x.shape, v.shape
    q = x.new_empty(steps, batch, rank)
    q[-1 if reverse else 0] = q0
    output = x.new_empty(steps, batch, hidden)
    slots = x.new_empty(steps, batch, 4 * hidden) if save else None
    given = (x, bias, u, v, q, h0, output, slots, None)
    launch("forward", q, v, *given, GRU=True, REVERSE=int(reverse), SAVE=save)
    return output, slots, q


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        _, u, _, v, _, h0, ctx.reverse = given
        output, *kept = _steps(*given, save=True)
        ctx.save_for_backward(output, *kept, u, v, h0)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (d_output,) = gradients
        # Hooks of what is saved may return it with gaps.
        output, slots, q, u, v, h0 = (t.contiguous() for t in ctx.saved_tensors)
        reverse, hidden = ctx.reverse, v.shape[1]
        with torch.no_grad():
            d_slots, d_q, d_h0 = (torch.empty_like(t) for t in (slots, q, h0))
            made = (d_slots, d_q, d_h0)
            tensors = (d_output.contiguous(), None, slots, h0, output, u, v, *made)
            launch("backward", q, v, *tensors, GRU=True, REVERSE=int(reverse))
            codes, rows = q.flatten(0, 1), d_slots.flatten(0, 1)
            d_m, d_u, d_v = rows[:, 3 * hidden :], None, None
            _, of_u, of_bias, of_v, *_ = ctx.needs_input_grad
            if of_u:
                d_u = torch.cat([rows[:, : 2 * hidden].t() @ codes, d_m.t() @ codes])
            if of_v:
                d_v = gradient_of_v(d_q, output, reverse=reverse)
            d_bias = d_m.sum(0) if of_bias else None
            first = d_q[-1 if reverse else 0].clone()
            found = (d_slots[..., : 3 * hidden], d_u, d_bias, d_v, first, d_h0)
        return *final("GRU", found, d_output, u, v), None
