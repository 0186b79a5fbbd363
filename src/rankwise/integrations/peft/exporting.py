"""Write the open updates of a model as an adapter that PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from rankwise.errors import PlanError
from rankwise.integrations.peft.config import CONFIG, WEIGHTS, describe
from rankwise.integrations.peft.tensors import pair_of, scale_of
from rankwise.layers import (
    AdaptedLayer,
    LowRankEmbedding,
    OpenAttention,
    adapted_layers,
)
from rankwise.layers.transposed_linear import LowRankTransposedLinear
from rankwise.surgery import names_of

_PREFIX = "base_model.model."


def export_peft(
    model: nn.Module,
    directory: str | Path,
    *,
    task_type: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Write a model's open updates as `adapter_config.json` and `adapter_model.safetensors`.

    `peft.PeftModel.from_pretrained(base, directory)` then has the outputs of the model. The base is
    the model as it was before the updates were opened; where updates were merged since (ReLoRA,
    LTE), it is the model with its updates left out. Heads become one update of rank H r, which
    holds what is not merged yet. Modules outside the updates that learned, a new classifier, say,
    are written as `modules_to_save`, biases of adapted layers as `bias="lora_only"`. PEFT itself is
    not needed.

    Args:
        model: with open updates: before `finish`, or behind `LoRA(..., merge=False)`.
        directory: made if missing.
        task_type: as PEFT calls it ("CAUSAL_LM", "SEQ_CLS"): for its Auto classes.
        base_model: name or path of the base; without it that of a transformers model.

    Returns:
        The directory.

    Raises:
        PlanError: no updates are open, or PEFT has no form for one, named.
    """
    layers = adapted_layers(model)
    if not layers:
        raise PlanError(
            f"no update is open in this {type(model).__name__}, so there is nothing to export; "
            "export before run.finish(), or train with LoRA(..., merge=False)"
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in layers.items():
        a, b = _pair(model, name, layer)
        ranks[name] = a.shape[0]
        tensors |= _keyed(f"{_PREFIX}{name}", a, b, isinstance(layer.heads[0], LowRankEmbedding))
    biases = any(p.requires_grad for p in map(_bias, layers.values()) if p is not None)
    if biases:
        own = {name: _bias(layer) for name, layer in layers.items()}
        tensors |= {f"{_PREFIX}{n}.base_layer.bias": p for n, p in own.items() if p is not None}
    others = _outside(model, layers)
    saved = _saved(others, layers)
    for name in saved:
        tensors |= {f"{_PREFIX}{name}.{k}": t for k, t in others[name].state_dict().items()}
    config: Any = getattr(model, "config", None)
    content = describe(
        ranks,
        {name: scale_of(layer) for name, layer in layers.items()},
        others,
        saved=saved,
        transposed=any(isinstance(v.heads[0], LowRankTransposedLinear) for v in layers.values()),
        biases=biases,
        dropout=max(layer.dropout for layer in layers.values()),
        task_type=task_type,
        base_model=base_model or getattr(config, "_name_or_path", None) or None,
    )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    whole = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    safetensors.torch.save_file(whole, directory / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(content, indent=2) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")
    return directory


def _pair(model: nn.Module, name: str, layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
    home = name.rpartition(".")[0]
    if not name:
        raise PlanError("the model itself is the adapted layer; wrap it, e.g. nn.Sequential(layer)")
    if isinstance(model.get_submodule(home), OpenAttention):
        raise PlanError(
            f"{name} is a projection of an nn.MultiheadAttention, which PEFT adapts as one, input "
            "and output projections at one rank; exclude it, or merge it by rankwise.to_dense"
        )
    if len(places := names_of(model, layer)) > 1:
        raise PlanError(
            f"{' and '.join(places)} are one layer, of which PEFT adapts the first place alone; "
            "exclude it"
        )
    try:
        return pair_of(layer)
    except PlanError as error:
        raise PlanError(f"{name} cannot be exported: {error}; exclude the layer") from error


def _keyed(name: str, a: Tensor, b: Tensor, embedding: bool) -> dict[str, Tensor]:
    if embedding:
        return {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def _bias(layer: AdaptedLayer) -> nn.Parameter | None:
    return getattr(layer.base, "bias", None)


def _outside(model: nn.Module, layers: dict[str, AdaptedLayer]) -> dict[str, nn.Module]:
    """Modules of the base that are not adapted, under every name."""
    inside = tuple(f"{name}." for name in layers)
    adapted = set(layers.values())
    named = model.named_modules(remove_duplicate=False)
    return {n: m for n, m in named if n and m not in adapted and not n.startswith(inside)}


def _saved(others: dict[str, nn.Module], layers: dict[str, AdaptedLayer]) -> list[str]:
    """Modules outside the updates that learn parameters of their own, and what PEFT adds to them.

    Raises:
        PlanError: such a module holds others, or an adapted one is called like it.
    """
    learning = [
        n for n, m in others.items() if any(p.requires_grad for p in m.parameters(recurse=False))
    ]
    # PEFT takes every module whose name ends like one of these.
    names = [n for n in others if n.endswith(tuple(learning))] if learning else []
    for name in names:
        # Its patterns also keep these from being adapted.
        clash = [n for n in layers if n.endswith(name) or f".{name}." in f".{n}."]
        clash += [n for n in others if n.startswith(f"{name}.")]
        if clash:
            raise PlanError(
                f"{name} learns parameters of its own, and PEFT, which saves modules as a whole "
                f"and by the end of their names, cannot tell it from {clash[0]}; freeze those "
                "parameters, or fold the updates in by rankwise.to_dense and save the model"
            )
    return names
