"""Makes what a recipe names: method, model, optimizer, wrapper; reads what a run goes on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

import rankwise
from rankwise import accounting, checkpoint, data, distributed, models
from rankwise.errors import CheckpointError, OptionError, unknown
from rankwise.method import Method
from rankwise.methods import METHODS
from rankwise.options import build
from rankwise.training.recipe import Recipe
from rankwise.training.weights import begin_with


def method_classes(name: str) -> list[type[Method]]:
    """The classes of a method, or of several that work together: "pufferfish+factor-decay".

    Raises:
        OptionError: an unknown one, with the nearest name.
    """
    parts = [part.strip() for part in name.split("+")]
    for part in parts:
        if part not in METHODS:
            raise OptionError(unknown("method", part, METHODS))
    return [METHODS[part] for part in parts]


def build_methods(name: str, options: Mapping[str, Any]) -> list[Method]:
    """A recipe's methods; an option goes to every one that has it.

    Raises:
        OptionError: unknown method or option, with the nearest name, or a value out of range.
    """
    classes = method_classes(name)
    known = {cls: {f.name for f in dataclasses.fields(cast(Any, cls))} for cls in classes}
    every = set().union(*known.values())
    for option in options:
        if option.replace("-", "_") not in every:
            owners = " + ".join(cls.__name__ for cls in classes)
            raise OptionError(f"{owners}: {unknown('option', option, every)}")
    return [
        build(cls, {k: v for k, v in options.items() if k.replace("-", "_") in known[cls]})
        for cls in classes
    ]


# Fields of a recipe that the data follow from, and what was read for them last.
DATA_FIELDS = (
    *("data", "limit", "image_size", "augment", "stream", "loader_workers", "context", "tokens"),
    *("vocabulary", "tokenizer", "min_count", "tokens_per_epoch", "languages"),
)
_kept: ContextVar[dict[tuple[Any, ...], data.DataSet] | None] = ContextVar("kept", default=None)


@contextmanager
def keeping_data() -> Iterator[None]:
    """Read what a run has read only once, as long as the runs behind it want the same."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def load_data(recipe: Recipe, progress: Callable[[int, int], None] | None = None) -> data.DataSet:
    """The recipe's images, text, or text in pairs.

    Raises:
        OptionError: an unknown name, or options that the data cannot have.
        DataError: the data are missing or malformed.
    """
    kept, key = _kept.get(), tuple(getattr(recipe, name) for name in DATA_FIELDS)
    if kept is None:
        return _load_data(recipe, progress)
    if key not in kept:
        kept.clear()  # one data set in memory, not two
        kept[key] = _load_data(recipe, progress)
    return kept[key]


def _load_data(recipe: Recipe, progress: Callable[[int, int], None] | None) -> data.DataSet:
    pairs, streamed = data.is_pairs(recipe.data), data.is_stream(recipe.data)
    idle = {
        "languages": "no text in pairs" if not pairs else "",
        "tokens_per_epoch": "no stream of documents" if not streamed else "",
        "tokenizer": f"read as {recipe.tokens}, not bpe" if recipe.tokens != "bpe" else "",
        "limit": "a stream; tokens_per_epoch says how much a pass reads" if streamed else "",
    }
    for name, why in idle.items():
        if why and getattr(recipe, name) is not None:
            raise OptionError(f"{name}={getattr(recipe, name)}: {recipe.data} is {why}")
    whole: data.DataSet
    if pairs or data.is_text(recipe.data):
        whole = _load_text(recipe)
    else:
        whole = data.load(
            recipe.data,
            size=recipe.image_size,
            augment=recipe.augment,
            streamed=True if recipe.stream else None,
            workers=recipe.loader_workers,
            progress=progress,
        )
    return whole if recipe.limit is None else data.limited(whole, recipe.limit)


def _load_text(recipe: Recipe) -> data.DataSet:
    if recipe.augment != "none" or recipe.stream:
        raise OptionError(
            f"{recipe.data} is text: augment={recipe.augment!r} and stream={recipe.stream} are "
            "for images; leave them out"
        )
    reading: dict[str, Any] = {"context": recipe.context, "level": recipe.tokens}
    reading |= {"vocabulary": recipe.vocabulary, "tokenizer": recipe.tokenizer}
    if data.is_stream(recipe.data):
        if recipe.tokens_per_epoch is not None:
            reading["tokens_per_epoch"] = recipe.tokens_per_epoch
        return data.load_stream(recipe.data, **reading)
    reading["min_count"] = recipe.min_count
    if data.is_pairs(recipe.data):
        return data.load_pairs(recipe.data, languages=recipe.languages, **reading)
    return data.load_text(recipe.data, **reading)


def build_model(recipe: Recipe, splits: data.DataSet, device: torch.device) -> nn.Module:
    """The recipe's dense network, its weights drawn from the recipe's seed.

    Raises:
        OptionError: an unknown network, or one for another task than that of the data.
    """
    task = models.find(recipe.model).task
    if task != splits.task:
        suited = [name for name, entry in models.MODELS.items() if entry.task == splits.task]
        raise OptionError(
            f"{recipe.model} is a network for {task}, but "
            f"{recipe.data} is data for {splits.task}; choose another --data, or a --model among "
            f"{', '.join(suited)}"
        )
    torch.manual_seed(recipe.seed)
    shape = input_shape(splits)
    model = models.build(recipe.model, classes=len(splits.classes), input_shape=shape)
    layout = torch.channels_last if recipe.channels_last else torch.preserve_format
    return model.to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]


def begin(
    model: nn.Module, recipe: Recipe, saved: checkpoint.Checkpoint | None
) -> list[dict[str, Any]]:
    """Give a fresh network the recipe's weights; the events of it. A resumed run has its own.

    Raises:
        CheckpointError: they cannot be read, or are of another network.
    """
    if recipe.weights is None or saved is not None:
        return []
    return [begin_with(model, recipe.weights)]


def input_shape(splits: data.DataSet) -> tuple[int, ...]:
    """Shape of one input: of an image, a window of tokens, or a source."""
    inputs, _ = data.example(splits.train)
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    return tuple(first.shape[1:])


def make_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """The recipe's optimizer, fused where the device has such kernels.

    Without `decay_vectors` biases, norms and other parameters of one dimension are a group apart.
    """
    held = list(model.parameters())
    common: dict[str, Any] = {
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "fused": held[0].device.type in ("cpu", "cuda"),
    }
    groups: list[dict[str, Any]] = [{"params": held}]
    if not recipe.decay_vectors:
        vectors = [p for p in held if p.dim() < 2]
        groups = [{"params": [p for p in held if p.dim() >= 2]}]
        groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=recipe.nesterov, **common)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, betas=(recipe.momentum, recipe.beta2), eps=recipe.eps, **common)


def wrapper(recipe: Recipe, methods: Sequence[Method]) -> Callable[[nn.Module], nn.Module] | None:
    """What goes around the bare model: DDP, torch.compile, or nothing.

    Workers that train apart get no DDP.
    """
    apart = any(method.trains_apart for method in methods)
    if (distributed.workers() == 1 or apart) and not recipe.compile:
        return None
    if apart:
        return lambda model: torch.compile(model)  # pyright: ignore[reportReturnType]
    return lambda model: distributed.wrap(model, compile=recipe.compile)


def size(model: nn.Module, sample: data.Inputs, units: int) -> tuple[tuple[int, int], int]:
    """Parameters (stored, trainable) and forward FLOPs of one unit of the sample."""
    count = accounting.parameters(model)
    return (count.stored, count.trainable), accounting.flops(model, sample) // units


def state_bytes(run: rankwise.Run) -> int:
    """Bytes kept beside the weights from step to step: moments, and the methods' bases."""
    states = (*run.optimizer.state.values(), *(method.state_dict() for method in run.methods))
    kept = [leaf for leaf in tree_leaves(list(states)) if isinstance(leaf, Tensor)]
    return sum(t.numel() * t.element_size() for t in kept)


def load(resume: str | Path, recipe: Recipe, splits: data.DataSet) -> checkpoint.Checkpoint:
    """Read a checkpoint that this recipe and these data can go on from.

    Raises:
        CheckpointError: it cannot be read, or is of another recipe or other data.
    """
    saved = checkpoint.load(resume)
    if not isinstance(saved.extra.get("recipe"), Mapping):
        raise CheckpointError(
            f"{saved.path} holds no recipe, so `rankwise train` did not write it; resume it from "
            "the program that did, with rankwise.start(..., resume=...)"
        )
    changed = Recipe.from_mapping(saved.extra["recipe"]).difference(recipe)
    if changed:
        listed = ", ".join(f"{name}: {old!r} -> {new!r}" for name, (old, new) in changed.items())
        raise CheckpointError(
            f"{saved.path} was trained with another recipe ({listed}); a resumed run has to be the "
            "same run: leave these as they were, or start a new one without --resume"
        )
    if saved.extra["checksum"] != splits.checksum:
        raise CheckpointError(
            f"{saved.path} was trained on other {splits.train.unit}s: {splits.name} has the "
            f"checksum {splits.checksum}, then it was {saved.extra['checksum']}"
        )
    classes = saved.extra.get("classes", list(splits.classes))
    if classes != list(splits.classes):
        raise CheckpointError(
            f"{saved.path} was trained on the same {splits.train.unit}s, but with {len(classes):,} "
            f"classes or tokens that are not the {len(splits.classes):,} read here; resume it with "
            "the version that wrote it"
        )
    return saved
