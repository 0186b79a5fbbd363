"""The low-rank GRU. T: steps, B: batch, I: input_size, H: hidden_size, R: rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.layers.recurrent import fused_gru, gru_loop
from rankwise.layers.recurrent.base import OpenRecurrent, Ranks
from rankwise.layers.recurrent.codes import operand_dtype, state_dtype
from rankwise.layers.recurrent.matrices import Encoded, Matrix, for_loop
from rankwise.layers.recurrent.native import narrowed, native
from rankwise.layers.recurrent.sequences import Layout


class LowRankGRU(OpenRecurrent):
    """nn.GRU with matrices that may be low-rank, each a child layer of its own.

    As LowRankLSTM, with three gates; torch's GRU has no projection.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: stacked layers.
        bias: two biases a layer, as torch has them.
        batch_first: inputs and outputs are (B, T, ..).
        dropout: behind every layer but the last, in training mode.
        bidirectional: a second set of matrices runs from the end.
        rank: R of the input's and the recurrent matrix; a pair (either may be None: dense); a list
            of these, one for each layer. None: all dense.
        per_gate: R for each of the three gates' matrices instead of for the stacked one.
        recompute: see `OpenRecurrent`.
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> gru = LowRankGRU(20, 32, rank=(None, 8), bidirectional=True)
        >>> y, h = gru(torch.zeros(5, 3, 20))
        >>> y.shape, h.shape
        (torch.Size([5, 3, 64]), torch.Size([2, 3, 32]))
    """

    kind: ClassVar[str] = "gru"
    dense_class: ClassVar[type[nn.Module]] = nn.GRU
    gates: ClassVar[int] = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        rank: Ranks = None,
        per_gate: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (num_layers, bias, batch_first, dropout, bidirectional)
        dense = nn.GRU(input_size, hidden_size, *shape, device="meta")  # checks its arguments
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
        ih, hh = matrices
        if way == "product":
            return native("gru", x, states, matrices, layout, reverse)
        assert hh.v is not None
        assert isinstance(x, Tensor)  # no layer below ran as a projected LSTM
        dtype = operand_dtype(x)
        q0, h0 = F.linear(states[0], hh.v).to(dtype), states[0].to(state_dtype(dtype))
        if way == "fused":
            ih = narrowed(ih)
            n = 2 * self.hidden_size
            # The recurrent bias of n stays inside: r multiplies it.
            bx, bh = (m.u.new_zeros(len(m.u)) if m.bias is None else m.bias for m in matrices)
            bias = torch.cat([bx[:n] + bh[:n], bx[n:]])
            x = F.linear(*(part.to(dtype) for part in (ih.encode(x), ih.u, bias)))
            u, v, inside = (part.to(dtype) for part in (hh.u, hh.v, bh[n:]))
            y = fused_gru.run(x, u, inside, v, q0, h0, reverse)
            return y, layout.last(y, reverse)
        turned = reverse and layout.packed is not None
        x = layout.turn(x) if turned else x
        v = _n_first(ih) if ih.apart else ih.v
        zx = (x if v is None else F.linear(x, v)).to(dtype)

        def factors() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            assert hh.v is not None
            ux, uh, v = (t.to(dtype) for t in (ih.u, hh.u, hh.v))
            bx, bh = (
                uh.new_zeros(len(uh)) if m.bias is None else m.bias.to(dtype) for m in matrices
            )
            return ux, uh, bx, bh, v

        where = {"reverse": reverse and not turned}
        if hh.is_kept:
            ready = for_loop(matrices, zx, way, lambda: gru_loop.prepare(zx, *factors()))
            y = gru_loop.infer(zx, ready, q0, h0, **where)
        else:
            hh.let_go()
            y = gru_loop.run(zx, *factors(), q0, h0, recompute=self.recompute, **where)
        y = layout.turn(y) if turned else y
        return y, layout.last(y, reverse)

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def _handed_over(self, states: tuple[Tensor, ...]) -> Any:
        return states[0]


def _n_first(ih: Matrix) -> Tensor:
    """V of the inputs with the codes of gate n before those of r and z, as the loop wants them."""
    assert ih.v is not None
    return ih.v.unflatten(0, (3, -1))[[2, 0, 1]].flatten(0, 1)
