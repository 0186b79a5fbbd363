"""The networks that a recipe can name. They are ordinary dense models and know nothing of rank.

Besides the own ones in `MODELS` there are published sizes of well-known networks (`SIZES`) and
everything that timm, torchvision and transformers can build: `timm:resnet50?num_classes=10`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import OptionError, unknown
from rankwise.models.encoder_decoder import EncoderDecoder, Translator, greedy
from rankwise.models.entry import CLASSIFICATION, LANGUAGE, OTHER, TRANSLATION, Model
from rankwise.models.mlp import MLP
from rankwise.models.networks import MODELS
from rankwise.models.recurrent import RecurrentLanguageModel, Stateful
from rankwise.models.reference import LIBRARIES, Reference, parse, parse_overrides
from rankwise.models.resnet import ResNet
from rankwise.models.sizes import SIZES
from rankwise.models.transformer import Transformer
from rankwise.models.vgg import VGG
from rankwise.models.vit import ViT
from rankwise.models.wide_resnet import WideResNet

__all__ = [
    "CLASSIFICATION",
    "LANGUAGE",
    "LIBRARIES",
    "MLP",
    "MODELS",
    "OTHER",
    "SIZES",
    "TRANSLATION",
    "VGG",
    "EncoderDecoder",
    "Model",
    "RecurrentLanguageModel",
    "ResNet",
    "Stateful",
    "Transformer",
    "Translator",
    "ViT",
    "WideResNet",
    "build",
    "find",
    "greedy",
    "listed",
    "sample",
]


def find(name: str) -> Model:
    """What is behind a name: a key of `MODELS` or `SIZES`, or LIBRARY:NAME.

    Names take overrides: `vit-cifar?dropout=0.1`, `llama-7b?num_hidden_layers=4`; see `reference`.

    Raises:
        OptionError: an unknown name or key, with the nearest; or a library that is missing.
    """
    if name in MODELS:
        return MODELS[name]
    size, _, overrides = name.partition("?")
    if size in SIZES:
        changed = _find(f"{SIZES[size].kind}?{overrides}", SIZES[size].config)
        return dataclasses.replace(changed, description=SIZES[size].description)
    if ":" in size:
        return _find(name)
    if size in MODELS:
        change = MODELS[size].change
        if change is None:
            raise OptionError(f"{name}: {size} takes no overrides")
        return change(Reference("", size, parse_overrides(name)))
    raise OptionError(unknown("model", name, (*MODELS, *SIZES)) + "; or LIBRARY:NAME")


def listed(pattern: str) -> list[str]:
    """The names of a library that match a glob, such as "timm:*resnet*".

    Raises:
        OptionError: an unknown or missing library.
    """
    reference = parse(pattern if pattern.partition(":")[2] else f"{pattern.rstrip(':')}:*")
    names = _module(reference.library).names(reference)
    return [f"{reference.library}:{n}" for n in names if fnmatch.fnmatch(n, reference.name)]


def _find(name: str, config: Mapping[str, Any] = MappingProxyType({})) -> Model:
    reference = parse(name)
    reference = dataclasses.replace(reference, overrides={**config, **reference.overrides})
    return _module(reference.library).find(reference)


def _module(library: str) -> Any:
    return importlib.import_module(f"rankwise.models.from_{library}")


def build(
    name: str, *, classes: int | None = None, input_shape: tuple[int, ...] | None = None
) -> nn.Module:
    """A freshly initialised network of the registry, drawn from torch's global generator.

    Args:
        name: as for `find`.
        classes: number of outputs, or of different tokens, at least 1; by default the entry's own.
        input_shape: shape of one input without the batch dimension; by default the entry's own.

    Raises:
        OptionError: an unknown name, or a shape or class count that the network cannot take.
    """
    entry = find(name)
    classes = entry.classes if classes is None else classes
    if classes < 1:
        least = "a classifier needs at least 1 class"
        if entry.task == LANGUAGE:
            least = "a vocabulary holds at least 1 token"
        raise OptionError(f"{name}: classes={classes}; {least}")
    return entry.make(classes, _shape(entry, name, input_shape))


def sample(name: str, *, input_shape: tuple[int, ...] | None = None) -> Tensor | dict[str, Any]:
    """An input that the network of this name can read: one image, one window of tokens, ...

    Args:
        name: as for `find`.
        input_shape: as for `build`.

    Returns:
        Zeros (1, *input_shape): float32, or int64 for a language model; for networks of
        transformers a dict of all that the forward takes.

    Raises:
        OptionError: an unknown name, or a shape without elements.
    """
    entry = find(name)
    shape = _shape(entry, name, input_shape)
    if entry.example is not None:
        return dict(entry.example(shape))
    kind = torch.int64 if entry.task == LANGUAGE else torch.float32
    return torch.zeros(1, *shape, dtype=kind)


def _shape(entry: Model, name: str, given: tuple[int, ...] | None) -> tuple[int, ...]:
    shape = entry.input_shape if given is None else tuple(given)
    if not shape or min(shape) < 1:
        raise OptionError(
            f"{name}: input_shape={shape} has no elements; give the shape of one input, "
            "such as (1, 28, 28)"
        )
    return shape
