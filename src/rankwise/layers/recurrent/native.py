"""torch's own LSTM and GRU kernels on matrices that were read from children."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rankwise.layers.recurrent.codes import operand_dtype
from rankwise.layers.recurrent.matrices import Encoded, Matrix, bias_of
from rankwise.layers.recurrent.sequences import Layout


def native(
    kind: str,
    x: Tensor | Encoded,
    states: tuple[Tensor, ...],
    matrices: Sequence[Matrix],
    layout: Layout,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """One layer in one direction by torch's kernel; its input is the codes where they are fewer.

    Args:
        kind: "lstm" or "gru".
        x: (T, B, N).
        states: the first ones, (B, ..).
        matrices: the input's, the recurrent one's, the projection's if there is one.
        layout: where sequences end.
        reverse: from their ends.

    Returns:
        Hidden states (T, B, P), then the last states (B, ..).
    """
    ih, hh, *projection = matrices
    ih = narrowed(ih)
    z = ih.encode(layout.turn(x) if reverse and isinstance(x, Tensor) else x)
    weights = [ih.u, hh.product()]
    if ih.bias is not None and hh.bias is not None:
        weights += [ih.bias, hh.bias]
    weights += [each.product() for each in projection]
    y, *last = _call(kind, layout.pack(z), [s[None] for s in states], weights, layout)
    y = layout.unpack(y)
    y = layout.turn(y) if reverse else y
    # Not state[0]: compiled by torch 2.11 its own LSTM gives states one dimension more.
    return (y, *(end.reshape(begun.shape) for end, begun in zip(last, states, strict=True)))


def _call(
    kind: str, z: Tensor, states: list[Tensor], weights: list[Tensor], layout: Layout
) -> tuple[Tensor, ...]:
    dtype = operand_dtype(z)
    z, states = z.to(dtype), [state.to(dtype) for state in states]
    weights = [weight.to(dtype) for weight in weights]
    # With one layer it switches no dropout, but cuDNN keeps what backward needs only in training.
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (z, *states, *weights))
    options = (len(weights) > 3, 1, 0.0, training, False)
    begin = states if kind == "lstm" else states[0]
    function = getattr(torch._VF, kind)
    sizes = () if layout.packed is None else (layout.packed.batch_sizes,)
    given = (z, *sizes, begin, weights, *options, *(() if sizes else (False,)))
    if not z.is_cuda or torch.compiler.is_compiling():
        return function(*given)
    with warnings.catch_warnings():
        # cuDNN copies weights that are not in one piece, and says so; a product never is.
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous")
        return function(*given)


def projected(
    x: Tensor | Encoded,
    states: tuple[Tensor, ...],
    ih: Matrix,
    hh: Matrix,
    ahead: Matrix,
    layout: Layout,
) -> tuple[Encoded, Tensor, Tensor]:
    """One LSTM layer as torch's LSTM with a projection: codes for the layer ahead, last h and c.

    Args:
        x: (T, B, N).
        states: h_0 and c_0, (B, H).
        ih: the input's matrix.
        hh: the recurrent one, low-rank, all gates sharing their codes.
        ahead: the next layer's input matrix, low-rank likewise.
        layout: of sequences of one length.
    """
    assert hh.v is not None
    assert ahead.v is not None
    rank, gates = len(hh.v), hh.gates
    ih = narrowed(ih)
    z, bias = ih.encode(x), bias_of(ih, hh)
    nothing = torch.zeros_like(bias)
    wide = torch.cat([hh.u, hh.u.new_zeros(len(hh.u), len(ahead.v))], 1)
    weights = [ih.u, wide, bias, nothing, torch.cat([hh.v, ahead.v])]
    first = F.linear(states[0], hh.v)
    begin = [F.pad(first, (0, len(ahead.v)))[None], states[1][None]]
    codes, _, c = _call("lstm", z, begin, weights, layout)
    c = c[0]
    # The last h is needed as such: its output gate from the codes before it, then o tanh(c).
    before = first if len(z) == 1 else codes[-2, :, :rank]
    o = (part.chunk(gates)[3] for part in (ih.u, hh.u, bias))
    ux, uh, b = (part.to(codes.dtype) for part in o)
    preactivation = F.linear(z[-1].to(codes.dtype), ux, b) + F.linear(before.to(codes.dtype), uh)
    h = torch.sigmoid(preactivation) * torch.tanh(c)
    return Encoded(codes[..., rank:]), h, c


def narrowed(ih: Matrix) -> Matrix:
    """With codes that all gates share, or dense: what torch's kernel can multiply by."""
    if not ih.apart:
        return ih
    assert ih.v is not None
    fewer = len(ih.v) < ih.v.shape[1]
    return ih.narrow() if fewer else Matrix(ih.product(), None, ih.bias, ih.gates)


def whole_stack(
    kind: str,
    x: Tensor,
    states: tuple[Tensor, ...],
    weights: list[Tensor],
    layout: Layout,
    *,
    bias: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    """All layers by one call of torch's kernel: (T, B, D P), then the last states (L D, B, ..)."""
    options = (bias, layers, dropout, training, bidirectional)
    begin = states if kind == "lstm" else states[0]
    function = getattr(torch._VF, kind)
    if layout.packed is None:
        return function(x, begin, weights, *options, False)
    y, *last = function(layout.pack(x), layout.packed.batch_sizes, begin, weights, *options)
    return (layout.unpack(y), *last)
