"""Where a model keeps its attention: projections by their usual names, and the number of heads."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import Parameter

from rankwise.errors import FactorizeError
from rankwise.layers import LowRankLayer
from rankwise.layers.attention import OpenAttention
from rankwise.optim.products import Part

# Children that hold queries, keys, values and outputs. A dot goes up to the parent first: BERT and
# ViT keep the output layer beside the module that holds the others.
_CHILDREN: tuple[tuple[tuple[str, str, str], tuple[str, ...]], ...] = (
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj")),
    (("q", "k", "v"), ("out_proj", "o")),
    (("query", "key", "value"), (".output.dense",)),
    (("q_lin", "k_lin", "v_lin"), ("out_lin",)),
)
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_QK_NORMS = ("q_norm", "k_norm", "query_norm", "key_norm", "q_layernorm", "k_layernorm", "qk_norm")
_OV_NORMS = ("norm", "inner_attn_ln", "sub_norm", "attn_sub_norm")
_TURNS = ("position_embeddings", "rotary_pos_emb", "rotary_emb", "rope", "cos", "freqs_cis")
_PLAIN = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


@dataclass(frozen=True, eq=False)
class Projection:
    """One projection of an attention module.

    Attributes:
        name: of the layer that holds it.
        weight: the rows of a parameter that are its matrix.
        biases: what is added to its outputs: its bias, a learned key or value.
        obstacle: why it is no plain matrix, or empty.
        low_rank: that reason is that it is a low-rank layer.
    """

    name: str
    weight: Part
    biases: tuple[Part, ...] = ()
    obstacle: str = ""
    low_rank: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Features out and in."""
        rows, columns = self.weight.of(self.weight.parameter).shape
        return rows, columns


@dataclass(frozen=True, eq=False)
class Attention:
    """The four projections of one attention module, and its number of heads."""

    name: str
    module: nn.Module
    heads: int
    q: Projection
    k: Projection
    v: Projection
    o: Projection


def attentions(model: nn.Module) -> list[Attention]:
    """Every attention module whose projections are known by name, in order of definition.

    Raises:
        FactorizeError: one whose number of heads cannot be read.
    """
    found = (_read(model, name, module) for name, module in model.named_modules())
    return [attention for attention in found if attention is not None]


def _read(model: nn.Module, name: str, module: nn.Module) -> Attention | None:
    if type(module) is nn.MultiheadAttention:
        return _packed(name, module)
    for inputs, outputs in _CHILDREN:
        layers = [module._modules.get(child) for child in inputs]
        out = _output(model, name, module, outputs)
        if out is not None and all(layer is not None for layer in layers):
            q, k, v = (
                _layer(f"{name}.{child}", layer, extra=_extra(module, child))
                for child, layer in zip(inputs, layers, strict=True)
            )
            return Attention(name, module, _heads(name, module), q, k, v, out)
    fused, outputs = (
        ("in_proj", "out_proj") if isinstance(module, OpenAttention) else ("qkv", "proj")
    )
    layer, out = module._modules.get(fused), _output(model, name, module, (outputs,))
    rows = getattr(layer, "out_features", 0)
    counted = any(hasattr(module, attribute) for attribute in _HEADS)
    if out is None or not rows or rows % 3 or not counted:
        return None
    third = rows // 3
    q, k, v = (
        _layer(
            f"{name}.{fused}",
            layer,
            (third * i, third * (i + 1)),
            _extra(module, child),
        )
        for i, child in enumerate("qkv")
    )
    return Attention(name, module, _heads(name, module), q, k, v, out)


def _packed(name: str, module: nn.MultiheadAttention) -> Attention:
    """nn.MultiheadAttention itself: one weight of three parts, or three weights."""
    size, bias = module.embed_dim, module.in_proj_bias
    cut = [(size * i, size * (i + 1)) for i in range(3)]
    if module.in_proj_weight is not None:
        weights = [Part(module.in_proj_weight, rows) for rows in cut]
    else:
        separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        weights = [Part(weight) for weight in separate]
    q, k, v = (
        Projection(
            f"{name}.{child}",
            weight,
            (*_extra(module, child), *([] if bias is None else [Part(bias, rows)])),
        )
        for child, weight, rows in zip("qkv", weights, cut, strict=True)
    )
    return Attention(
        name, module, module.num_heads, q, k, v, _layer(f"{name}.out_proj", module.out_proj)
    )


def _layer(
    name: str, layer: Any, rows: tuple[int, int] | None = None, extra: tuple[Part, ...] = ()
) -> Projection:
    obstacle = ""
    if isinstance(layer, LowRankLayer):
        obstacle = (
            f"{name} is low-rank itself, so a head is a product of more than two factors; exclude "
            "it from the low-rank layers"
        )
    elif type(layer) not in _PLAIN or "weight" not in layer._parameters:
        obstacle = f"{name} is a {type(layer).__name__}, whose forward is not that of nn.Linear"
    if obstacle:
        low_rank = isinstance(layer, LowRankLayer)
        return Projection(name, Part(Parameter()), (), obstacle, low_rank)
    weight: Any = layer._parameters["weight"]
    bias = layer._parameters.get("bias")
    biases = () if bias is None else (Part(bias, rows),)
    return Projection(name.lstrip("."), Part(weight, rows), (*extra, *biases))


def _extra(module: nn.Module, child: str) -> tuple[Part, ...]:
    learned = module._parameters.get(f"bias_{child}")
    return () if learned is None else (Part(learned),)


def _output(
    model: nn.Module, name: str, module: nn.Module, places: tuple[str, ...]
) -> Projection | None:
    for place in places:
        above = place.startswith(".")
        holder = model.get_submodule(name.rpartition(".")[0]) if above else module
        path = place.lstrip(".")
        layer: Any = holder
        for step in path.split("."):
            layer = None if layer is None else layer._modules.get(step)
        if layer is not None:
            base = name.rpartition(".")[0] if above else name
            return _layer(f"{base}.{path}", layer)
    return None


def _heads(name: str, module: Any) -> int:
    for holder in (module, getattr(module, "config", None)):
        for attribute in _HEADS:
            count = getattr(holder, attribute, None)
            if isinstance(count, int) and count > 0:
                return count
    raise FactorizeError(
        f"{name} ({type(module).__name__}) does not say how many heads it has; set one of "
        f"{', '.join(_HEADS)} on it"
    )


def qk_obstacle(attention: Attention) -> str:
    """Why scores are no product of W_Q and W_K alone, or empty."""
    module = attention.module
    for name, child in module.named_modules():
        if "rotary" in f"{name} {type(child).__name__}".lower():
            return f"rotary embeddings ({name or type(child).__name__}) turn them by position"
    named = [n for n in vars(module) if "rotary" in n.lower() or n.lower().startswith("rope")]
    taken = [n for n in inspect.signature(module.forward).parameters if n in _TURNS]
    if named or taken or "rotary" in _source(module):
        where = f" ({(named + taken)[0]})" if named or taken else ""
        return f"rotary embeddings{where} turn them by position"
    if "logit_scale" in module._parameters:
        return "cosine attention normalises queries and keys"
    return _normed(module, _QK_NORMS)


def ov_obstacle(attention: Attention) -> str:
    """Why outputs are no product of W_O and W_V alone, or empty."""
    return _normed(attention.module, _OV_NORMS)


def _source(module: nn.Module) -> str:
    try:
        return inspect.getsource(type(module).forward)
    except (OSError, TypeError):  # compiled, or typed in at a prompt
        return ""


def _normed(module: nn.Module, names: Sequence[str]) -> str:
    for name in names:
        child = module._modules.get(name)
        if child is not None and not isinstance(child, nn.Identity):
            return f"{name} ({type(child).__name__}) normalises in between"
    return ""
