"""torch's own LSTM and GRU kernels on matrices that were read from children."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.layers.recurrent.codes import operand_dtype
from rankwise.layers.recurrent.matrices import Matrix
from rankwise.layers.recurrent.sequences import Layout


def without_loop(recurrent: Matrix) -> bool:
    """Whether a layer goes by torch's kernel: a dense recurrence, or a graph to be exported.

    torch.export has no place for our loop; there the product of the factors is part of the graph.
    """
    return recurrent.v is None or torch.compiler.is_exporting()


def native(
    kind: str,
    x: Tensor,
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
    if ih.apart:
        narrower = ih.v is not None and len(ih.v) < ih.v.shape[1]
        ih = ih.narrow() if narrower else Matrix(ih.product(), None, ih.bias, ih.gates)
    z = ih.encode(layout.turn(x) if reverse else x)
    weights = [ih.u, hh.product()]
    if ih.bias is not None and hh.bias is not None:
        weights += [ih.bias, hh.bias]
    weights += [each.product() for each in projection]
    y, *last = _call(kind, layout.pack(z), [s[None] for s in states], weights, layout)
    y = layout.unpack(y)
    return (layout.turn(y) if reverse else y, *(state[0] for state in last))


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
    if layout.packed is not None:
        return function(z, layout.packed.batch_sizes, begin, weights, *options)
    return function(z, begin, weights, *options, False)


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
