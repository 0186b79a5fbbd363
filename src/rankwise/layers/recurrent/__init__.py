"""Low-rank recurrent layers: nn.LSTM and nn.GRU with every matrix a child, dense or low-rank."""

from __future__ import annotations

from torch import nn

from rankwise.layers.recurrent.base import OpenRecurrent
from rankwise.layers.recurrent.gru import LowRankGRU
from rankwise.layers.recurrent.lstm import LowRankLSTM

__all__ = ["RECURRENT", "LowRankGRU", "LowRankLSTM", "OpenRecurrent", "recurrent_class"]

RECURRENT: dict[str, type[OpenRecurrent]] = {c.kind: c for c in (LowRankLSTM, LowRankGRU)}


def recurrent_class(module: nn.Module) -> type[OpenRecurrent] | None:
    """The class that opens a dense recurrent layer; None for anything else, subclasses too."""
    return next((c for c in RECURRENT.values() if type(module) is c.dense_class), None)
