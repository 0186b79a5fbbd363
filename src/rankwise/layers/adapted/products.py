"""y = x (W + s U V)^T + b without forming U V, and with a backward that saves nothing R wide.

B: rows of the input, I: in_features, O: out_features, R: rank, H: heads with a chunk each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.onednn import add_product_, by_onednn, matmul, multiply


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    scale: float,
    gain: float = 1.0,
) -> Tensor:
    """A dense linear map and its low-rank update, as one differentiable function.

    The update is added in place to what the dense map returned, forward and backward, and the
    codes x V^T are computed again in backward. Of a weight that is frozen no gradient is formed.

    Args:
        x: (..., I); with heads the rows are H chunks of the same length, one behind the other.
        weight: W (O, I).
        bias: (O,) or None.
        u: U (O, R), or (H, O, R) for one update a chunk.
        v: V (R, I), or (H, R, I).
        scale: s.
        gain: factor on the gradients of U and V alone.

    Returns:
        (..., O).
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, u, v = (t.to(dtype) for t in (x, weight, u, v))
        bias = None if bias is None else bias.to(dtype)
    y: Tensor = _AdaptedLinear.apply(x, weight, bias, u, v, scale, gain)
    return y


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor,
        v: Tensor,
        scale: float,
        gain: float,
    ) -> Tensor:
        if _worth_summing(x, weight, u):
            return _linear(x, _sum(weight, u, v, scale), bias)
        y = _linear(x, weight, bias)
        _add_product_(_rows(y, u), _product(_rows(x, v), v.mT), _as_rows(u), scale)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, u, v, ctx.scale, ctx.gain = inputs
        ctx.save_for_backward(x, weight, u, v)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, u, v = ctx.saved_tensors
        grad, (need_x, need_w, need_b, need_u, need_v, *_) = gradients[0], ctx.needs_input_grad
        rows, inputs, summed = _rows(grad, u), _rows(x, v), _worth_summing(x, weight, u)
        of_x = of_w = of_b = of_u = of_v = None
        of_codes: Any = None
        if need_v or (need_x and not summed):
            of_codes = _product(rows, _as_rows(u).mT)
        if need_x and summed:
            of_x = _linear(grad, _sum(weight, u, v, ctx.scale).mT, None)
        elif need_x:
            of_x = _linear(grad, weight.mT, None)
            _add_product_(_rows(of_x, v), of_codes, v, ctx.scale)
        if need_u:
            of_u = _product(_product(inputs, v.mT).mT, rows).mT * (ctx.scale * ctx.gain)
        if need_v:
            of_v = _product(of_codes.mT, inputs) * (ctx.scale * ctx.gain)
        if need_w:
            of_w = matmul(grad.reshape(-1, grad.shape[-1]).mT, x.reshape(-1, x.shape[-1]))
        if need_b:
            of_b = grad.reshape(-1, grad.shape[-1]).sum(0)
        return of_x, of_w, of_b, of_u, of_v, None, None


def _worth_summing(x: Tensor, weight: Tensor, u: Tensor) -> bool:
    """Whether W + s U V, formed for a moment, is cheaper than passing over all rows once more.

    Both add a product R deep, to O I numbers or to B O (forward) and B I (backward). In half
    precision the sum would round the update away.
    """
    rows = x.numel() // x.shape[-1]
    wide = weight.dtype in (torch.float32, torch.float64)
    return u.dim() == 2 and wide and rows * sum(weight.shape) > 2 * weight.numel()


def _rows(x: Tensor, factor: Tensor) -> Tensor:
    """(..., I) as the rows (B, I), or as chunks (H, B / H, I) where there is a factor for each."""
    if factor.dim() == 2:
        return x.reshape(-1, x.shape[-1])
    return x.reshape(factor.shape[0], -1, x.shape[-1])


def _as_rows(u: Tensor) -> Tensor:
    """U^T in memory: with columns of a few numbers products are slower than with rows."""
    return u.mT.contiguous()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if not by_onednn(weight, len(rows)):
        return F.linear(x, weight, bias)
    y = multiply(rows, weight).view(*x.shape[:-1], len(weight))
    return y if bias is None else y.add_(bias)


def _sum(weight: Tensor, u: Tensor, v: Tensor, scale: float) -> Tensor:
    """W + s U V."""
    if not by_onednn(v, len(u)):
        return torch.addmm(weight, u, v, alpha=scale)
    summed = weight.clone()
    add_product_(summed, u, v, alpha=scale)
    return summed


def _product(left: Tensor, right: Tensor) -> Tensor:
    return matmul(left, right) if left.dim() == 2 else left @ right


def _add_product_(target: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    if target.dim() == 2:
        add_product_(target, left, right, alpha=scale)
    else:
        target.baddbmm_(left, right, alpha=scale)
