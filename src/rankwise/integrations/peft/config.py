"""adapter_config.json: what of it is written, and what of it changes the function when read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.errors import CheckpointError, PlanError

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Fields that leave the function of a trained adapter as its tensors say. Any other one has to be
# empty: those of later versions of PEFT as well.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",  # the biases are among the tensors
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "modules_to_save",  # so are these
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "tie_weights",
}
_REASONS = {
    "use_dora": "DoRA scales every row of the adapted weight to a length of its own",
    "lora_bias": "its maps B have biases",
    "layer_replication": "it repeats layers of the model",
    "target_parameters": "it adapts parameters that belong to no layer",
    "trainable_token_indices": "it replaces single rows of an embedding",
    "alora_invocation_tokens": "it is active behind certain tokens alone",
}
# Of how the maps began, which is over; all others have changed the weights of the base as well.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """What the scale of each layer follows from.

    Attributes:
        rank: r, where no pattern says otherwise.
        alpha: likewise.
        stabilized: rsLoRA, scales by alpha / sqrt(r).
        dropout: of the updates' inputs.
        ranks: regular expression -> r.
        alphas: regular expression -> alpha.
    """

    rank: int
    alpha: float
    stabilized: bool = False
    dropout: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        """R of a layer."""
        return int(_looked_up(self.ranks, name, self.rank))

    def scale_of(self, name: str) -> float:
        """s of a layer."""
        rank = self.rank_of(name)
        return _looked_up(self.alphas, name, self.alpha) / (rank**0.5 if self.stabilized else rank)


def _looked_up(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """As PEFT does: the first pattern that matches the name, or its end behind a dot."""
    matching = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name))
    return next(matching, default)


def read_config(file: Path) -> AdapterConfig:
    """Read the configuration of an adapter; what would not be understood is refused.

    Raises:
        CheckpointError: not there, or no configuration of PEFT.
        PlanError: another kind of adapter than LoRA, or a variant of it.
    """
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(read, dict) or "peft_type" not in read:
            raise ValueError("it names no peft_type")
        kind = str(read["peft_type"])
        if kind != "LORA":
            raise PlanError(f"{file} describes {kind}; only LORA adapters can be read")
        _refuse_variants(file, read)
        return AdapterConfig(
            int(read["r"]),
            float(read["lora_alpha"]),
            bool(read.get("use_rslora")),
            float(read.get("lora_dropout") or 0.0),
            _patterns(read.get("rank_pattern"), int),
            _patterns(read.get("alpha_pattern"), float),
        )
    except PlanError:
        raise
    except (OSError, ValueError, TypeError, KeyError, re.error) as error:
        raise CheckpointError(f"{file} is no configuration of an adapter: {error!r}") from error


def _patterns(given: Any, number: type) -> dict[str, Any]:
    read = {str(pattern): number(value) for pattern, value in (given or {}).items()}
    for pattern in read:
        re.compile(pattern)
    return read


def _refuse_variants(file: Path, read: Mapping[str, Any]) -> None:
    known = {"r", "lora_alpha", "use_rslora", "lora_dropout", "rank_pattern", "alpha_pattern"}
    init = read.get("init_lora_weights", True)
    if not any(init is known or init == known for known in _INITS):
        raise PlanError(
            f"{file}: init_lora_weights={init!r} has changed the weights of the base as well, so "
            "the adapter does not fit the model it was made from; let PEFT convert it: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for name, value in read.items():
        if name in _HARMLESS or name in known or name == "init_lora_weights":
            continue
        if value not in (None, False, 0, "", [], {}):
            reason = _REASONS.get(name, "this variant of LoRA is not known here")
            raise PlanError(
                f"{file}: {name}={value!r}: {reason}; merge it by PEFT (merge_and_unload) and go "
                "on from the merged model"
            )


def describe(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    others: Iterable[str],
    *,
    saved: Iterable[str],
    transposed: bool,
    biases: bool,
    dropout: float,
    task_type: str | None,
    base_model: str | None,
) -> dict[str, Any]:
    """The configuration of an adapter, as PEFT reads it.

    Args:
        ranks: layer -> r.
        scales: layer -> s.
        others: names of the modules that are not adapted.
        saved: names of the modules whose values are in the file, too.
        transposed: whether weights are stored as (in, out).
        biases: whether those of adapted layers are in the file.
        dropout: of the updates' inputs.
        task_type: as PEFT calls it.
        base_model: where the weights come from.
    """
    rank, *more_ranks = dict.fromkeys(ranks.values())
    alphas = {name: scales[name] * r for name, r in ranks.items()}
    alpha, *more_alphas = dict.fromkeys(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": _targets(list(ranks), list(others)),
        "modules_to_save": sorted(saved) or None,
        "r": rank,
        "rank_pattern": _exact(ranks) if more_ranks else {},
        "lora_alpha": alpha,
        "alpha_pattern": _exact(alphas) if more_alphas else {},
        "lora_dropout": dropout,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": transposed,
        "bias": "lora_only" if biases else "none",
        "init_lora_weights": True,
    }


def _exact(values: Mapping[str, Any]) -> dict[str, Any]:
    # A pattern matches the end of longer names, too: those come first, and have their own.
    return {re.escape(n): values[n] for n in sorted(values, key=len, reverse=True)}


def _targets(adapted: list[str], others: list[str]) -> list[str] | str:
    """Names, of which PEFT takes every module that ends like one; a pattern where that is wrong."""
    ends = {name.rpartition(".")[2] for name in adapted}
    for names in (sorted(ends), sorted(adapted)):
        if not any(other == n or other.endswith(f".{n}") for other in others for n in names):
            return names
    return "|".join(map(re.escape, sorted(adapted)))
