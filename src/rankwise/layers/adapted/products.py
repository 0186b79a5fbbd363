"""y = x (W + s U V)^T + b without forming U V, and with a backward that saves nothing R wide.

B: rows of the input, I: in_features, O: out_features, R: rank, H: heads with a chunk each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
    *,
    less: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A dense linear map and its low-rank update, as one differentiable function.

    The update is added to what the dense map returned, forward and backward, or summed with W where
    that is cheaper; the codes x V^T are computed again in backward. Of a weight that is frozen no
    gradient is formed.

    Args:
        x: (..., I); with heads the rows are H chunks of the same length, one behind the other.
        weight: W (O, I).
        bias: (O,) or None.
        u: U (O, R), or (H, O, R) for one update a chunk.
        v: V (R, I), or (H, R, I).
        scale: s.
        gain: factor on the gradients of U and V alone.
        less: U' and V' of the same shapes, which do not learn: the update is s (U V - U' V').

    Returns:
        (..., O).
    """
    less_u, less_v = (None, None) if less is None else less
    tensors = (x, weight, bias, u, v, less_u, less_v)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = (None if t is None else t.to(dtype) for t in tensors)
    y: Tensor = _AdaptedLinear.apply(*tensors, scale, gain)
    return y


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor,
        v: Tensor,
        less_u: Tensor | None,
        less_v: Tensor | None,
        scale: float,
        gain: float,
    ) -> Tensor:
        u, v = _joined(u, v, less_u, less_v)
        if _worth_summing(x, weight, u):
            return _linear(x, _sum(weight, u, v, scale), bias)
        (codes,) = _by_chunks(lambda rows, v: (_product(rows, v.mT),), _rows(x, v), v)
        return _linear_and(codes, _in_rows(u), scale, x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, u, v, less_u, less_v, ctx.scale, ctx.gain = inputs
        ctx.save_for_backward(x, weight, u, v, less_u, less_v)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, u, v, *less = ctx.saved_tensors
        grad, (need_x, need_w, need_b, need_u, need_v, *_) = gradients[0], ctx.needs_input_grad
        (all_u, all_v), times = _joined(u, v, *less), ctx.scale * ctx.gain
        of_x = of_w = of_b = None
        summed = _worth_summing(x, weight, all_u)
        thin = partial(_thin_products, needs=(need_x and not summed, need_u, need_v))
        of_codes, of_u, of_v = _by_chunks(thin, _rows(grad, u), _rows(x, v), all_u, u, v)
        if need_x and summed:
            of_x = _linear(grad, _sum(weight, all_u, all_v, ctx.scale).mT, None)
        elif need_x:
            of_x = _linear_and(of_codes, all_v, ctx.scale, grad, weight.mT, None)
        of_u = None if of_u is None else of_u.mT * times
        of_v = None if of_v is None else of_v * times
        if need_w:
            of_w = matmul(grad.reshape(-1, grad.shape[-1]).mT, x.reshape(-1, x.shape[-1]))
        if need_b:
            of_b = grad.reshape(-1, grad.shape[-1]).sum(0)
        return of_x, of_w, of_b, of_u, of_v, None, None, None, None


def _joined(
    u: Tensor, v: Tensor, less_u: Tensor | None, less_v: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[U, -U'] and [V; V'], whose product is U V - U' V'."""
    if less_u is None or less_v is None:
        return u, v
    return torch.cat([u, -less_u], -1), torch.cat([v, less_v], -2)


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


def _thin_products(
    grad: Tensor, x: Tensor, all_u: Tensor, u: Tensor, v: Tensor, *, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What backward needs, without the scale: gradients of all codes, of U transposed, of V.

    Args:
        grad: of y, (B, O).
        x: (B, I).
        all_u: (O, R), or with columns that do not learn behind those of U.
        u: (O, R).
        v: (R, I).
        needs: which of the three.
    """
    need_codes, need_u, need_v = needs
    of_codes = of_u = of_v = None
    if need_codes or need_v:
        of_codes = _product(grad, _in_rows(all_u if need_codes else u).mT)
    if need_v:
        own: Any = of_codes
        of_v = _product(own[..., : u.shape[-1]].mT, x)
    if need_u:
        of_u = _product(_product(x, v.mT).mT, grad)
    return of_codes, of_u, of_v


def _by_chunks(function: Callable[..., tuple[Any, ...]], *tensors: Tensor) -> tuple[Any, ...]:
    """What a function of matrices says of all chunks, from one call or a call for each.

    oneDNN has no batched product, but is faster so than a batched one of another library; and a
    chunk that is read several times stays in the cache.
    """
    rows, *_, v = tensors
    if rows.dim() == 2 or not by_onednn(v[0], rows.shape[1]):
        return function(*tensors)
    found = [function(*own) for own in zip(*tensors, strict=True)]
    return tuple(
        None if each[0] is None else torch.stack(each) for each in zip(*found, strict=True)
    )


def _in_rows(u: Tensor) -> Tensor:
    """U^T in memory: with columns of a few numbers products are slower than with rows."""
    return u.mT.contiguous()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if not by_onednn(weight, len(rows)):
        return F.linear(x, weight, bias)
    return multiply(rows, weight, bias).view(*x.shape[:-1], len(weight))


def _sum(weight: Tensor, u: Tensor, v: Tensor, scale: float) -> Tensor:
    """W + s U V."""
    if not by_onednn(v, len(u)):
        return torch.addmm(weight, u, v, alpha=scale)
    summed = weight.clone()
    add_product_(summed, u, v, alpha=scale)
    return summed


def _product(left: Tensor, right: Tensor) -> Tensor:
    return matmul(left, right) if left.dim() == 2 else left @ right


def _linear_and(
    codes: Tensor, decode: Tensor, scale: float, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """x W^T + b + s C D, added while what is added to is in the cache still."""
    y = _linear(x, weight, bias)
    if decode.dim() == 2:
        add_product_(_rows(y, decode), codes, decode, alpha=scale)
    else:  # one pass over all chunks
        _rows(y, decode).baddbmm_(codes, decode, alpha=scale)
    return y
