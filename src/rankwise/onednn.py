"""Matrix products by oneDNN, where it is faster than the BLAS behind torch's `mm`.

On x86 processors oneDNN multiplies float32 up to 2.5 times as fast (AMD EPYC with AVX-512: 230-260
against 85-110 GFLOP/s from 20 rows on); nn.LSTM runs on it. torch offers it by the operators that
its compiler calls. Where they are missing, or the product is so small that their overhead counts,
`mm` is taken, and where a gradient is to flow through: oneDNN's product has none. Precision is that
of the tensors in both cases.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Multiplications and additions from which oneDNN's call (4 us more) is the faster one.
WORTH = 1.2e6
# Numbers of a passing product for each thread (1 MB): it is added while it is still in the cache.
PASSING = 1 << 18
_DTYPES = (torch.float32, torch.bfloat16)


@cache
def _available() -> bool:
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )


def by_onednn(weight: Tensor, rows: int) -> bool:
    """Whether a product of `rows` rows with a weight goes by oneDNN."""
    return (
        not torch.compiler.is_compiling()  # the compiler chooses by itself
        and weight.device.type == "cpu"
        and weight.dtype in _DTYPES
        and 2 * rows * weight.numel() >= WORTH
        and torch.backends.mkldnn.enabled
        and _available()
    )


def _dense(x: Tensor) -> Tensor:
    """A matrix without gaps: oneDNN takes a hundred times as long for one that has them."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def _differentiated(*tensors: Tensor) -> bool:
    """Whether autograd records, as in a backward that is to be differentiated again."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K) times W (N, K) transposed, once, plus b (N); x and W may be transposed views."""
    if by_onednn(weight, len(x)) and not _differentiated(x, weight):
        x, weight = _dense(x), _dense(weight)
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices, A (M, K) and B (K, N)."""
    return multiply(a, b.t())


def add_product_(
    target: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> None:
    """target <- beta target + alpha A B, in place, as `Tensor.addmm_`; all of one dtype."""
    rows, columns = target.shape
    # In less than float32 addmm rounds once, a product and a sum would round twice.
    once = target.dtype != torch.float32 or _differentiated(target, a, b)
    if once or not by_onednn(b, rows):
        target.addmm_(a, b, beta=beta, alpha=alpha)
        return
    if beta == 0.0:
        target.zero_()  # what is not finite must not stay
    elif beta != 1.0:
        target.mul_(beta)
    turned = _dense(b.t())
    step = max(1, PASSING * torch.get_num_threads() // columns)
    for part, of_a in zip(target.split(step), a.split(step), strict=True):
        part.add_(multiply(of_a, turned), alpha=alpha)
