"""Timing matrices of recurrent layers where they work: in a loop over the steps of a sequence.

What the input is multiplied by meets all steps at once, as in a linear layer, and is timed like
one. The others meet one step at a time: they are timed in a layer of one input, whose product with
the input takes no time to speak of. T: steps, B: batch, H: hidden_size, P: proj_size or H.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.accounting import Call
from rankwise.layers import LowRankLinear, OpenRecurrent, recurrent_class
from rankwise.ranks.gains.stopwatch import Work


@dataclass(frozen=True)
class RecurrentWork(Work):
    """One step after the other through a recurrent layer of one input.

    Attributes:
        recurrent: the layer's class.
        part: the matrix that may be low-rank: "hh", or "hr", the projection.
        sizes: hidden_size and proj_size.
    """

    recurrent: type[OpenRecurrent] = field(default=OpenRecurrent)
    part: str = "hh"
    sizes: tuple[int, int] = (1, 0)

    @property
    def place(self) -> str:
        return f" in the loop of {self.recurrent.dense_class.__name__} {self.sizes}"

    def dense_layer(self, source: torch.Generator) -> Any:
        weight: Any = self.dense.weight
        options = {"proj_size": self.sizes[1]} if self.sizes[1] else {}
        bias = {"bias": self.dense.bias is not None or self.part == "hr"}
        place = {"device": self.device, "dtype": weight.dtype}
        kind: Any = self.recurrent
        layer = kind(1, self.sizes[0], **bias, **options, **place)
        return layer.requires_grad_(weight.requires_grad)

    def low_rank_layer(self, dense: Any, rank: int, source: torch.Generator) -> nn.Module:
        layer = self.dense_layer(source)
        child = getattr(layer, f"{self.part}_l0")
        low = LowRankLinear.from_dense(child, rank, init="variance", generator=source, **self.form)
        setattr(layer, f"{self.part}_l0", low)
        return layer

    def example(self, dense: Any, source: torch.Generator) -> Tensor:
        x = torch.randn((*self.input[:2], 1), generator=source, device=self.device)
        weight: Any = self.dense.weight
        return x.to(self.autocast or weight.dtype)


def recurrent_home(model: nn.Module, name: str) -> Any:
    """The recurrent layer, open or shut, that a matrix of this name is of; None for others."""
    home = model.get_submodule(name.rpartition(".")[0])
    known = isinstance(home, OpenRecurrent) or recurrent_class(home) is not None
    return home if known else None


def work_in(home: Any, name: str, call: Call, plain: Work) -> Work:
    """What is timed for a matrix of a recurrent layer.

    Args:
        home: the layer, open or shut.
        name: of the matrix.
        call: shapes of a traced call; its output is (T, B, rows).
        plain: what would be timed if it were a linear layer; its input is that of the timing.
    """
    if name.rpartition(".")[2].startswith("ih"):
        return plain
    steps, batch = call.output[:2]
    growth = plain.input[0] / call.input[0]
    if home.batch_first or len(plain.input) == 2:
        batch = round(batch * growth)
    else:
        steps = round(steps * growth)
    recurrent: Any = type(home) if isinstance(home, OpenRecurrent) else recurrent_class(home)
    return RecurrentWork(
        plain.dense,
        plain.stand_in,
        plain.form,
        (steps, batch, plain.input[-1]),
        False,
        plain.device,
        plain.autocast,
        recurrent=recurrent,
        part=name.rpartition(".")[2][:2],
        sizes=(home.hidden_size, home.proj_size),
    )
