"""What a recurrent layer accepts: torch's shapes, refused in torch's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rankwise.layers.recurrent.codes import autocast_is_on


def check_input(layer: Any, x: Tensor | PackedSequence) -> None:
    """Refuse an input of the wrong dtype or shape.

    Raises:
        ValueError: neither one sequence nor a batch of them, or not of the weights' dtype.
        RuntimeError: rows of another width than input_size, or no steps.
    """
    rows = x.data if isinstance(x, PackedSequence) else x
    name = type(layer).__name__
    if not isinstance(x, PackedSequence) and x.dim() not in (2, 3):
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {x.dim()}D instead")
    weights = next(layer.parameters()).dtype
    if rows.dtype != weights and not autocast_is_on(rows):
        raise ValueError(
            f"{name} input dtype ({rows.dtype}) does not match weight dtype ({weights}). "
            f"Convert input: input.to({weights}), or convert model: model.to({rows.dtype})"
        )
    if rows.shape[-1] != layer.input_size:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {layer.input_size}, got {rows.shape[-1]}"
        )
    steps = 1 if layer.batch_first and rows.dim() == 3 else 0
    if not isinstance(x, PackedSequence) and not x.shape[steps]:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def first_states(
    hx: Any, x: Tensor, shapes: Sequence[tuple[int, int, int]], *, batched: bool
) -> tuple[Tensor, ...]:
    """The states that a sequence begins with, as given or zero.

    Args:
        hx: one tensor or one for each of `shapes`, without their B where not `batched`; or None.
        x: the input (T, B, I).
        shapes: of the states, (L D, B, ..).
        batched: whether the input was given with a dimension for the batch.

    Raises:
        RuntimeError: states of another number or shape.
    """
    if hx is None:
        return tuple(x.new_zeros(shape) for shape in shapes)
    given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if len(given) != len(shapes):
        raise RuntimeError(f"Expected {len(shapes)} hidden states, got {len(given)}")
    dims = 3 if batched else 2
    if any(state.dim() != dims for state in given):
        raise RuntimeError(
            f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hidden states should "
            f"also be {dims}-D but got {', '.join(f'{s.dim()}-D' for s in given)}"
        )
    given = given if batched else tuple(state[:, None] for state in given)
    for i, (state, shape) in enumerate(zip(given, shapes, strict=True)):
        if tuple(state.shape) != shape:
            raise RuntimeError(f"Expected hidden[{i}] size {shape}, got {list(state.shape)}")
    return given
