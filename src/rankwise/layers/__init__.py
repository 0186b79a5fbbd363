"""Low-rank layers: drop-in stand-ins for dense ones, and which of them stands for what."""

from __future__ import annotations

from torch import nn

from rankwise.layers.adapted import AdaptedLayer
from rankwise.layers.attention import OpenAttention
from rankwise.layers.base import LowRankLayer
from rankwise.layers.conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from rankwise.layers.embedding import LowRankEmbedding
from rankwise.layers.form import Form
from rankwise.layers.initial import INITS
from rankwise.layers.inventory import adapted_layers, low_rank_layers
from rankwise.layers.linear import BlockLinear, LowRankLinear
from rankwise.layers.recurrent import (
    RECURRENT,
    LowRankGRU,
    LowRankLSTM,
    OpenRecurrent,
    recurrent_class,
)
from rankwise.layers.separable import LowRankSeparableConv2d
from rankwise.layers.transposed_conv import (
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
)
from rankwise.layers.transposed_linear import LowRankTransposedLinear

__all__ = [
    "INITS",
    "KINDS",
    "RECURRENT",
    "AdaptedLayer",
    "BlockLinear",
    "Form",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankConvTranspose1d",
    "LowRankConvTranspose2d",
    "LowRankConvTranspose3d",
    "LowRankEmbedding",
    "LowRankGRU",
    "LowRankLSTM",
    "LowRankLayer",
    "LowRankLinear",
    "LowRankSeparableConv2d",
    "LowRankTransposedLinear",
    "OpenAttention",
    "OpenRecurrent",
    "adapted_layers",
    "low_rank_class",
    "low_rank_layers",
    "recurrent_class",
]

_CLASSES = (
    LowRankLinear,
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
    LowRankEmbedding,
)
# Chosen by the form, or for a class known by name.
_OTHERS = (LowRankSeparableConv2d, LowRankTransposedLinear)
KINDS: dict[str, type[LowRankLayer]] = {c.kind: c for c in (*_CLASSES, *_OTHERS)}

# A subclass may have another forward (quantised, parametrised, adapted): only exact types, and
# nn.MultiheadAttention's own projection class, whose forward is nn.Linear's.
_STAND_INS: dict[type[nn.Module], type[LowRankLayer]] = {
    **{c.dense_class: c for c in _CLASSES},
    nn.modules.linear.NonDynamicallyQuantizableLinear: LowRankLinear,
}


def low_rank_class(module: nn.Module, form: Form | None = None) -> type[LowRankLayer] | str:
    """The class that can stand for a dense layer in a form, or the reason why none can.

    Args:
        module: the dense layer.
        form: how layers are factorised; without it two factors in channel form.
    """
    form = form or Form()
    stand_in = _STAND_INS.get(type(module))
    if form.separable and stand_in is LowRankConv2d:
        stand_in = LowRankSeparableConv2d
    if LowRankTransposedLinear.stands_for(module):
        stand_in = LowRankTransposedLinear
    if stand_in is not None:
        return stand_in.obstacle(module, form) or stand_in
    if isinstance(module, tuple(_STAND_INS)):
        return f"{type(module).__name__} has a forward of its own"
    return f"{type(module).__name__} has no low-rank form here"
