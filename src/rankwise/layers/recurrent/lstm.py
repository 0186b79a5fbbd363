"""The low-rank LSTM. T: steps, B: batch, I: input_size, H: hidden_size, R: rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.layers.recurrent import fused_lstm, lstm_loop
from rankwise.layers.recurrent.base import OpenRecurrent, Ranks
from rankwise.layers.recurrent.codes import operand_dtype, state_dtype
from rankwise.layers.recurrent.matrices import Encoded, Matrix, bias_of, for_loop
from rankwise.layers.recurrent.native import narrowed, native, projected
from rankwise.layers.recurrent.sequences import Layout


class LowRankLSTM(OpenRecurrent):
    """nn.LSTM with matrices that may be low-rank, each a child layer of its own.

    Same arguments, same inputs and results (packed and unbatched sequences too). Layers whose
    recurrent matrix is dense run in torch's own kernel; the others in a loop with its own backward,
    which cannot be differentiated twice.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: stacked layers.
        bias: two biases a layer, as torch has them.
        batch_first: inputs and outputs are (B, T, ..).
        dropout: behind every layer but the last, in training mode.
        bidirectional: a second set of matrices runs from the end.
        proj_size: size of a projection of the hidden state; 0: none.
        rank: R of the input's and the recurrent matrix; a pair (either may be None: dense), a
            triple with the projection's; a list of these, one for each layer. None: all dense.
        per_gate: R for each of the four gates' matrices instead of for the stacked one
            (2103.03936).
        recompute: see `OpenRecurrent`.
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> lstm = LowRankLSTM(20, 32, num_layers=2, rank=8)
        >>> y, (h, c) = lstm(torch.zeros(5, 3, 20))
        >>> y.shape, h.shape
        (torch.Size([5, 3, 32]), torch.Size([2, 3, 32]))
    """

    kind: ClassVar[str] = "lstm"
    dense_class: ClassVar[type[nn.Module]] = nn.LSTM
    gates: ClassVar[int] = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        rank: Ranks = None,
        per_gate: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        dense = nn.LSTM(input_size, hidden_size, *shape, device="meta")  # checks its arguments
        super().__init__(dense, rank, per_gate, recompute, device, dtype)

    def _run(
        self,
        x: Tensor | Encoded,
        states: tuple[Tensor, ...],
        matrices: Sequence[Matrix],
        layout: Layout,
        reverse: bool,
        way: str,
        ahead: Matrix | None,
    ) -> tuple[Any, ...]:
        ih, hh, *projection = matrices
        if way == "product":
            return native("lstm", x, states, matrices, layout, reverse)
        if way == "projected" and ahead is not None:
            return projected(x, states, ih, hh, ahead, layout)
        assert hh.v is not None
        dtype = operand_dtype(states[0])
        z0, c0 = F.linear(states[0], hh.v).to(dtype), states[1].to(state_dtype(dtype))
        if way == "fused":
            ih = narrowed(ih)
            preactivations = F.linear(
                *(part.to(dtype) for part in (ih.encode(x), ih.u, bias_of(ih, hh)))
            )
            u, v = hh.u.to(dtype), hh.v.to(dtype)
            y, c = fused_lstm.run(preactivations, u, v, z0, c0, reverse)
            return y, layout.last(y, reverse), c.to(dtype)
        turned = reverse and layout.packed is not None
        zx = ih.encode(layout.turn(x) if turned and isinstance(x, Tensor) else x).to(dtype)

        def factors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            assert hh.v is not None
            # h is seen through V alone: of its projection the loop needs V W_hr.
            v = hh.v @ projection[0].product() if projection else hh.v
            return ih.u.to(dtype), hh.u.to(dtype), bias_of(ih, hh).to(dtype), v.to(dtype)

        where = {"reverse": reverse and not turned, "batch_sizes": layout.batch_sizes}
        if hh.is_kept:
            ready = for_loop(
                matrices, zx, way, lambda: lstm_loop.prepare(zx, *factors(), way == "compiled")
            )
            y, c = lstm_loop.infer(zx, ready, z0, c0, **where)
        else:
            hh.let_go()
            how = {"recompute": self.recompute, "compiled": way == "compiled"}
            y, c = lstm_loop.run(zx, *factors(), z0, c0, **how, **where)
        if projection:
            y = F.linear(projection[0].encode(y), projection[0].u)
        y = layout.turn(y) if turned else y
        return y, layout.last(y, reverse), c.to(dtype)

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, self.hidden_size)

    def _handed_over(self, states: tuple[Tensor, ...]) -> Any:
        return states
