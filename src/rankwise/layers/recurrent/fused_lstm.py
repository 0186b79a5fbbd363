"""The LSTM's loop over time on low-rank factors as one CUDA kernel, with its own backward.

    z_t = V h_{t-1},    i, f, g, o = x_t + U z_t,    c_t = s(f) c_{t-1} + s(i) tanh(g),
    h_t = s(o) tanh(c_t)

Saved for backward, in numbers per step, row and unit: gates 4, cells 1, outputs 1, codes R / H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.layers.recurrent.codes import final
from rankwise.layers.recurrent.fused import gradient_of_v, launch


def run(
    x: Tensor, u: Tensor, v: Tensor, z0: Tensor, c0: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """All hidden states and the last cell state of one layer in one direction.

    Args:
        x: (T, B, 4 H), the inputs' part of the gates, both biases included.
        u: (4 H, R).
        v: (R, H), which `fused.fits`.
        z0: (B, R), the codes of the first hidden state.
        c0: (B, H), the first cell state, float32.
        reverse: from the last step to the first.

    Returns:
        (T, B, H) of x's dtype, and (B, H).
    """
    tensors = (x, u, v, z0, c0)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Loop.apply(*tensors, reverse)
    output, last, *_ = _steps(*tensors, reverse, save=False)
    return output, last


def _steps(
    x: Tensor, u: Tensor, v: Tensor, z0: Tensor, c0: Tensor, reverse: bool, *, save: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Hidden states, last cell; for backward gates, cells and codes of every step."""
    x, u, v, cells = x.contiguous(), u.contiguous(), v.contiguous(), c0.contiguous()
    (steps, batch, _), (rank, hidden) = x.shape, v.shape
    z = x.new_empty(steps, batch, rank)
    z[-1 if reverse else 0] = z0
    output, last = x.new_empty(steps, batch, hidden), torch.empty_like(cells)
    gates = torch.empty_like(x) if save else None
    if save:
        cells = c0.new_empty(steps + 1, batch, hidden)
        cells[-1 if reverse else 0] = c0
    given = (x, None, u, v, z, cells, output, gates, last)
    launch("forward", z, v, *given, GRU=False, REVERSE=int(reverse), SAVE=save)
    return output, last, gates, cells, z


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        _, u, v, _, _, ctx.reverse = given
        output, last, *kept = _steps(*given, save=True)
        ctx.save_for_backward(output, *kept, u, v)
        ctx.set_materialize_grads(False)
        return output, last

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (d_output, d_last), reverse = gradients, ctx.reverse
        # Hooks of what is saved may return it with gaps.
        output, gates, cells, z, u, v = (t.contiguous() for t in ctx.saved_tensors)
        with torch.no_grad():
            d_output = torch.zeros_like(output) if d_output is None else d_output.contiguous()
            d_last = torch.zeros_like(cells[0]) if d_last is None else d_last.contiguous()
            d_x, d_z, d_c0 = (torch.empty_like(t) for t in (gates, z, cells[0]))
            tensors = (d_output, d_last, gates, cells, None, u, v)
            made = (d_x, d_z, d_c0)
            launch("backward", z, v, *tensors, *made, GRU=False, REVERSE=int(reverse))
            _, of_u, of_v, *_ = ctx.needs_input_grad
            d_u = d_x.flatten(0, 1).t() @ z.flatten(0, 1) if of_u else None
            d_v = gradient_of_v(d_z, output, reverse=reverse) if of_v else None
            found = (d_x, d_u, d_v, d_z[-1 if reverse else 0].clone(), d_c0)
        return *final("LSTM", found, *gradients, u, v), None
