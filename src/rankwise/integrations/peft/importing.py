"""Open the updates that an adapter of PEFT holds, with its values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from rankwise.candidates import Candidate, survey
from rankwise.errors import CheckpointError, PlanError, nearest, unknown
from rankwise.integrations.peft.config import CONFIG, PICKLE, WEIGHTS, AdapterConfig, read_config
from rankwise.integrations.peft.tensors import fill, obstacle, shapes_of
from rankwise.layers import AdaptedLayer, adapted_layers, low_rank_class
from rankwise.method import NO_CHANGE, Change
from rankwise.structure import impose_plan, read_plan
from rankwise.surgery import names_of, whole_or_not

_MAP = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save)\.")
_PREFIX = "base_model.model."

Pair = dict[str, Tensor]  # "A" and "B"


def import_peft(model: nn.Module, directory: str | Path) -> Change:
    """Open the updates that an adapter of PEFT holds, with its values; then the model is as there.

    Layers that have an open update already, of the same rank, take on the values: so a run that
    `rankwise.start(model, LoRA(...), optimizer)` began goes on from the adapter. Others are frozen
    and get an update of the adapter's rank, scale and dtype. What else the file holds (trained
    biases, `modules_to_save`) is copied into the model. Nothing of it is executed.

    Args:
        model: the base that the adapter was made from.
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        What `rebind` makes an optimizer follow.

    Raises:
        CheckpointError: no adapter there, a pickle, or a broken file.
        PlanError: an adapter of another model or kind; the model is then as before.
    """
    directory = Path(directory)
    config, tensors = read_config(_present(directory)), _read(directory / WEIGHTS)
    pairs: dict[str, Pair] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if found := _MAP.fullmatch(name):
            pairs.setdefault(found[1], {})[found[2]] = tensor
        elif ".original_module." not in name:  # what modules_to_save replaces
            rest[_WRAPPERS.sub(".", name)] = tensor
    present, candidates = adapted_layers(model), survey(model)
    specs = {
        name: _spec(model, name, pair, config, candidates)
        for name, pair in pairs.items()
        if name not in present
    }
    for name in (n for n in pairs if n in present):
        _check_open(name, pairs[name], config, present[name])
    targets = _targets(model, rest)
    change = impose_plan(model, read_plan(model) | specs) if specs else NO_CHANGE
    with whole_or_not(model, change):
        _fill_all(adapted_layers(model), pairs, config)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(rest[name])
    return change


def _present(directory: Path) -> Path:
    if not (directory / CONFIG).is_file():
        raise CheckpointError(
            f"{directory} holds no adapter of PEFT: there is no {CONFIG}; give the directory that "
            "save_pretrained wrote (of the Hub: the path that snapshot_download returns)"
        )
    if not (directory / WEIGHTS).is_file():
        pickled = (directory / PICKLE).is_file()
        raise CheckpointError(
            f"{directory / PICKLE} is a pickle, which can execute code when it is loaded: refused; "
            "load it with PEFT if you trust it, and save_pretrained(...) writes safetensors"
            if pickled
            else f"{directory} is no whole adapter: there is no {WEIGHTS}"
        )
    return directory / CONFIG


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no safetensors file: {error}") from error


def _spec(
    model: nn.Module,
    name: str,
    pair: Pair,
    config: AdapterConfig,
    candidates: Mapping[str, Candidate],
) -> dict[str, Any]:
    """The structure of an update with these maps, as `impose_plan` takes it."""
    foreign = "the adapter is of another model"
    if name not in candidates:
        module = dict(model.named_modules()).get(name)
        if isinstance(module, nn.MultiheadAttention):
            raise PlanError(
                f"{name}: PEFT adapts an nn.MultiheadAttention as one, which is not read here; "
                "merge the adapter by PEFT (merge_and_unload)"
            )
        known = nearest(name, candidates) or list(candidates)[:8]
        raise PlanError(f"{foreign}: {unknown('layer', name, known)}")
    dense: Any = candidates[name].module
    kind = low_rank_class(dense)
    if candidates[name].obstacle or not isinstance(kind, type):
        raise PlanError(f"{name} cannot be adapted: {candidates[name].obstacle or kind}")
    if reason := obstacle(dense, kind):
        raise PlanError(f"{name} cannot be adapted: {reason}")
    if len(places := names_of(model, dense)) > 1:
        raise PlanError(f"{' and '.join(places)} are one layer, but PEFT adapted the first alone")
    groups = kind.blocks_of(dense)
    rank = _checked_rank(name, pair, config, groups)
    wanted, found = shapes_of(dense, kind, rank), (tuple(pair["A"].shape), tuple(pair["B"].shape))
    if wanted != found:
        raise PlanError(f"{foreign}: the maps of {name} are {found} there, {wanted} here")
    # PEFT's rank may exceed the full one; heads side by side have room for it.
    heads = -(-rank // groups // min(kind.matrix_shape(dense)))
    return {
        "kind": AdaptedLayer.kind,
        "of": kind.kind,
        "shape": list(dense.weight.shape),
        "rank": -(-rank // groups // heads),
        "norm": False,
        "core": False,
        "blocks": groups,
        "heads": heads,
        "scale": config.scale_of(name) * heads,
        "anchored": False,
        "dropout": config.dropout,
        "dtype": str(pair["A"].dtype).removeprefix("torch."),
    }


def _checked_rank(name: str, pair: Pair, config: AdapterConfig, groups: int) -> int:
    if pair.keys() != {"A", "B"}:
        raise PlanError(f"{name} has only its map {', '.join(pair)} in the adapter")
    rank = pair["A"].shape[0]
    if rank != config.rank_of(name) or rank < 1 or rank % groups:
        raise PlanError(
            f"{name} has rank {rank} in the adapter, {config.rank_of(name)} in its {CONFIG}"
            + (f", and {groups} groups" if groups > 1 else "")
        )
    return rank


def _check_open(name: str, pair: Pair, config: AdapterConfig, layer: AdaptedLayer) -> None:
    head: Any = layer.heads[0]
    kind, groups = type(head), type(head).blocks_of(layer.base)
    rank = _checked_rank(name, pair, config, groups)
    own = (len(layer.heads), head.blocks, head.rank * groups, layer.merged is None)
    if own != (1, groups, rank, True):
        raise PlanError(
            f"{name} has an open update already, {layer.extra_repr()}, which cannot take on one of "
            f"rank {rank}; begin with LoRA(rank={rank // groups}), or import into the dense model"
        )
    wanted, found = shapes_of(layer.base, kind, rank), tuple(tuple(pair[m].shape) for m in "AB")
    if wanted != found:
        raise PlanError(f"the maps of {name} are {found} in the adapter, {wanted} here")


def _fill_all(
    layers: Mapping[str, AdaptedLayer], pairs: Mapping[str, Pair], config: AdapterConfig
) -> None:
    written: dict[nn.Parameter, tuple[str, Tensor]] = {}
    for name, pair in pairs.items():
        layer = layers[name]
        try:
            fill(layer, pair["A"], pair["B"], config.scale_of(name))
        except PlanError as error:
            raise PlanError(f"{name} cannot be adapted: {error}") from error
        for parameter in layer.new_parameters():
            twin, values = written.setdefault(parameter, (name, parameter.detach().clone()))
            if not torch.equal(values, parameter):
                raise PlanError(
                    f"{twin} and {name} share their weight, but the adapter has different updates "
                    "for them; untie the weights of the model first"
                )


def _targets(model: nn.Module, rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where the values go that are no maps: by the names of the dense model."""
    named: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    named.update(model.named_parameters(remove_duplicate=False))
    for layer in adapted_layers(model):
        inside = [n for n in named if n.startswith(f"{layer}.base.")]
        named |= {n.replace(f"{layer}.base.", f"{layer}.", 1): named[n] for n in inside}
    for name, tensor in rest.items():
        if name not in named:
            known = nearest(name, named) or list(named)[:8]
            wrong = unknown("tensor", name, known)
            raise PlanError(f"the adapter is of another model: {wrong}")
        if named[name].shape != tensor.shape:
            raise PlanError(
                f"the adapter is of another model: {name} is {tuple(tensor.shape)} there, "
                f"{tuple(named[name].shape)} here"
            )
    return {name: named[name] for name in rest}
