"""Products of few rows with weights that stay: what a loop over time consists of.

They go by oneDNN where it is faster (`rankwise.onednn`), the more so as the weight is reordered
once for all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.layers.recurrent.codes import operand_dtype, state_dtype
from rankwise.onednn import by_onednn, multiply

# The weights of inputs and hidden state are joined into one product a step up to this many numbers
# (8 MB); larger ones are faster apart, that of the inputs for many steps. So are those of few rows,
# where reading weights is all the work, unless they fit a core's own cache (1 MB).
JOINED, JOINED_FEW, FEW = 1 << 21, 1 << 18, 8

Product = Callable[[Tensor], Tensor]
Into = Callable[[Tensor, Tensor], Tensor]
Sum = Callable[[Tensor, Tensor], Tensor]


def product(weight: Tensor, rows: int, bias: Tensor | None = None) -> Product:
    """x (rows, K) -> x W^T + b, for many x. W is (N, K), b (N)."""
    if by_onednn(weight, rows):
        linear = torch.ops.mkldnn._linear_pointwise.default
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        return lambda x: linear(x.contiguous(), packed, bias, "none", [], "")
    turned = weight.t()
    if bias is None:
        return lambda x: torch.mm(x, turned)
    return lambda x: torch.addmm(bias, x, turned)


def into(weight: Tensor, rows: int) -> Into:
    """x (rows, K), y (rows, N) -> y, which becomes x W^T; for many x."""
    if by_onednn(weight, rows):
        times = product(weight, rows)  # it allocates its results
        return lambda x, y: y.copy_(times(x))
    turned = weight.t()
    return lambda x, y: torch.mm(x, turned, out=y)


def added(weight: Tensor, gates: int, rows: int, width: int, *, mixed: bool = False) -> Sum:
    """codes (rows, R) or (rows, G R), y (rows, G H) -> codes U^T + y, as `of_gates`.

    With `mixed` y and the sum are of higher precision than the product.
    """
    if mixed or width != weight.shape[1]:
        times = of_gates(weight, gates, rows, width, None)
        return lambda x, y: times(x) + y
    if by_onednn(weight, rows):
        linear = torch.ops.mkldnn._linear_pointwise.binary
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        return lambda x, y: linear(x.contiguous(), y.contiguous(), packed, None, "add")
    turned = weight.t()
    return lambda x, y: torch.addmm(y, x, turned)


@torch.library.custom_op("rankwise::rows_times", mutates_args=())
def _rows_times(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K) times W (N, K) transposed, as `multiply`, but with a gradient."""
    return multiply(x, weight)


@_rows_times.register_fake
def _(x, weight):  # pyright: ignore
    return x.new_empty(len(x), len(weight))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    of_x = _rows_times(gradient, weight.t()) if ctx.needs_input_grad[0] else None
    of_weight = _rows_times(gradient.t(), x.t()) if ctx.needs_input_grad[1] else None
    return of_x, of_weight


_rows_times.register_autograd(_differentiate, setup_context=_keep)


def encode(x: Tensor, v: Tensor) -> Tensor:
    """The codes (.., R) of rows x (.., N) by V (R, N)."""
    rows = x.numel() // max(1, x.shape[-1])
    if not by_onednn(v, rows) or operand_dtype(x) != v.dtype or x.dtype != v.dtype:
        return F.linear(x, v)
    return _rows_times(x.reshape(-1, x.shape[-1]), v).unflatten(0, x.shape[:-1])


def form(u: Tensor, v: Tensor) -> Tensor:
    """W = U V (M, N), formed for one call; differentiable."""
    if not by_onednn(v, len(u)) or operand_dtype(u) != v.dtype or u.dtype != v.dtype:
        return u @ v
    return _rows_times(u, v.t())


def of_gates(weight: Tensor, gates: int, rows: int, width: int, bias: Tensor | None) -> Product:
    """x's codes -> x W^T + b; (rows, R) shared by all gates or (rows, G R), R for each gate.

    Args:
        weight: U, (G H, R).
        gates: G.
        rows: how many rows there are at a time.
        width: R or G R.
        bias: (G H) or None.
    """
    if width == weight.shape[1]:
        return product(weight, rows, bias)
    biases = (None,) * gates if bias is None else bias.chunk(gates)
    each = [product(u, rows, b) for u, b in zip(weight.chunk(gates), biases, strict=True)]
    return lambda x: torch.cat(
        [one(codes) for one, codes in zip(each, x.chunk(gates, 1), strict=True)], 1
    )


def back_to_codes(weight: Tensor, gates: int, rows: int, width: int) -> Product:
    """The gradient of codes (rows, R) or (rows, G R) from that of their products (rows, G H)."""
    if width == weight.shape[1]:
        return product(weight.t(), rows)
    each = [product(u.t(), rows) for u in weight.chunk(gates)]
    return lambda x: torch.cat(
        [one(slab) for one, slab in zip(each, x.chunk(gates, 1), strict=True)], 1
    )


def outer(codes: Tensor, slab: Tensor, gates: int, rank: int) -> Tensor:
    """The gradient of U, transposed (R, G H), from codes (N, R) or (N, G R) and slab (N, G H)."""
    if codes.shape[1] == rank:
        return multiply(codes.t(), slab.t())
    pairs = zip(codes.chunk(gates, 1), slab.chunk(gates, 1), strict=True)
    return torch.cat([multiply(one.t(), part.t()) for one, part in pairs], 1)


def column_sums(slab: Tensor) -> Tensor:
    """(N) of (M, N), as a product: twice as fast as `sum` over rows."""
    return torch.mv(slab.t(), slab.new_ones(len(slab)))


class Steps:
    """The preactivations of one step after the other, from codes of the inputs and of h.

    Either both in one product, whose operand is the row [x's codes | h's codes], or the inputs'
    part for a chunk of steps beforehand and h's part added to it.

    Attributes:
        joined: which of the two.
    """

    def __init__(
        self, zx: Tensor, ux: Tensor, uh: Tensor, bias: Tensor, gates: int, rows: int, width: int
    ) -> None:
        """Reorder the weights.

        Args:
            zx: (T, B, Kx), codes of the inputs.
            ux: (G H, Rx).
            uh: (G H, Rh).
            bias: (G H).
            gates: G.
            rows: how many rows a chunk has.
            width: Kh.
        """
        batch, mixed = zx.shape[1], state_dtype(zx.dtype) != zx.dtype
        stacked = zx.shape[2] == ux.shape[1] and width == uh.shape[1]
        most = JOINED if batch >= FEW else JOINED_FEW
        self.joined = stacked and not mixed and ux.numel() + uh.numel() <= most
        if self.joined:
            self.both = product(torch.cat([ux, uh], 1), batch, bias)
        else:
            self.from_x = of_gates(ux, gates, rows, zx.shape[2], bias)
            self.from_h = added(uh, gates, batch, width, mixed=mixed)

    def begin(self, zx: Tensor) -> Sequence[Tensor]:
        """The inputs' part (B, G H) of each step of a chunk of x's codes; not if joined."""
        if self.joined:
            return ()
        x = self.from_x(zx.flatten(0, 1))
        return x.to(state_dtype(x.dtype)).unflatten(0, zx.shape[:2]).unbind(0)
