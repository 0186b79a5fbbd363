"""The networks that a recipe can name. They are ordinary dense models and know nothing of rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import OptionError, unknown
from rankwise.models.mlp import MLP
from rankwise.models.resnet import ResNet
from rankwise.models.transformer import Transformer

__all__ = ["MLP", "MODELS", "Model", "ResNet", "Transformer", "build", "sample"]

CLASSIFICATION, LANGUAGE = "classification", "language modelling"


@dataclass(frozen=True, kw_only=True)
class Model:
    """One entry of the registry: what the network is, in a line, and how to make it.

    Attributes:
        description: one line.
        make: called with (classes, input_shape): outputs or vocabulary, and the shape of one input:
            channels, height, width of an image, or the number of tokens of a text.
        task: "classification", or "language modelling": tokens (B, T) -> scores (B, T, classes).
        classes: what `make` is given when nothing else is known.
        input_shape: likewise.
    """

    description: str
    make: Callable[[int, tuple[int, ...]], nn.Module]
    task: str = CLASSIFICATION
    classes: int = 10
    input_shape: tuple[int, ...] = (1, 28, 28)


def _mlp(*layers: int) -> Callable[[int, tuple[int, ...]], nn.Module]:
    return lambda classes, shape: MLP(math.prod(shape), layers, classes)


def _resnet(
    *, widths: tuple[int, ...], blocks: tuple[int, ...], stem_stride: int = 1
) -> Callable[[int, tuple[int, ...]], nn.Module]:
    def make(classes: int, shape: tuple[int, ...]) -> nn.Module:
        if len(shape) != 3:
            raise OptionError(
                f"a residual network reads images (channels, height, width), not inputs of shape "
                f"{shape}; give input_shape three numbers or choose an MLP"
            )
        return ResNet(shape[0], widths, blocks, classes, stem_stride=stem_stride)

    return make


def _language(
    description: str, *, vocabulary: int = 32_000, tokens: int = 256, **sizes: Any
) -> Model:
    def make(classes: int, shape: tuple[int, ...]) -> nn.Module:
        if len(shape) != 1:
            raise OptionError(
                f"a language model reads windows of (tokens,), not inputs of shape {shape}; give "
                "input_shape one number or choose a network for images"
            )
        return Transformer(vocabulary=classes, context=shape[0], **sizes)

    return Model(
        description=description,
        make=make,
        task=LANGUAGE,
        classes=vocabulary,
        input_shape=(tokens,),
    )


def _llama(width: int, layers: int, heads: int, hidden: int) -> Model:
    return _language(
        f"LLaMA of the GaLore protocol: width {width}, {layers} layers, {heads} heads",
        **{"width": width, "layers": layers, "heads": heads, "hidden": hidden},
    )


_TINY: dict[str, Any] = {"vocabulary": 256, "tokens": 128, "width": 128, "heads": 4}

MODELS: dict[str, Model] = {
    "mlp-512x2": Model(
        description="784-512-512-10 perceptron of the MNIST studies",
        make=_mlp(512, 512),
    ),
    "mlp-128x4": Model(
        description="784-128 and four hidden 128-128 layers: the small FCN of the MNIST study",
        make=_mlp(128, *[128] * 4),
    ),
    "mlp-512x8": Model(
        description="784-512 and eight hidden 512-512 layers: the large FCN of the MNIST study",
        make=_mlp(512, *[512] * 8),
    ),
    "resnet-small": Model(
        description="residual CNN for small grey images, an epoch of 4,000 in seconds on two cores",
        make=_resnet(widths=(64, 128, 256), blocks=(1, 2, 2), stem_stride=2),
    ),
    "resnet-18": Model(
        description="ResNet-18 in its CIFAR form: 3x3 stem, 11.2 million parameters",
        make=_resnet(widths=(64, 128, 256, 512), blocks=(2, 2, 2, 2)),
    ),
    "llama-tiny": _language(
        "causal Transformer for small texts: LLaMA blocks, width 128, 4 layers",
        **_TINY,
        layers=4,
        hidden=344,
    ),
    "gpt2-tiny": _language(
        "causal Transformer for small texts: GPT-2 blocks, width 128, 3 layers, tied head",
        **_TINY,
        layers=3,
        hidden=512,
        form="gpt2",
        tied=True,
    ),
    # Sizes of the common pre-training protocol (GaLore, arXiv 2403.03507, and its successors).
    "llama-60m": _llama(512, 8, 8, 1376),
    "llama-130m": _llama(768, 12, 12, 2048),
    "llama-350m": _llama(1024, 24, 16, 2736),
}


def build(
    name: str, *, classes: int | None = None, input_shape: tuple[int, ...] | None = None
) -> nn.Module:
    """A freshly initialised network of the registry, drawn from torch's global generator.

    Args:
        name: a key of `MODELS`.
        classes: number of outputs, or of different tokens, at least 1; by default the entry's own.
        input_shape: shape of one input without the batch dimension; by default the entry's own.

    Raises:
        OptionError: an unknown name, or a shape or class count that the network cannot take.
    """
    entry = _entry(name)
    classes = entry.classes if classes is None else classes
    if classes < 1:
        least = "a classifier needs at least 1 class"
        if entry.task == LANGUAGE:
            least = "a vocabulary holds at least 1 token"
        raise OptionError(f"{name}: classes={classes}; {least}")
    return entry.make(classes, _shape(name, input_shape))


def sample(name: str, *, input_shape: tuple[int, ...] | None = None) -> Tensor:
    """An input that the network of this name can read: one image, or one window of tokens.

    Args:
        name: a key of `MODELS`.
        input_shape: as for `build`.

    Returns:
        Zeros (1, *input_shape): float32, or int64 for a language model.

    Raises:
        OptionError: an unknown name, or a shape without elements.
    """
    kind = torch.int64 if _entry(name).task == LANGUAGE else torch.float32
    return torch.zeros(1, *_shape(name, input_shape), dtype=kind)


def _entry(name: str) -> Model:
    if name not in MODELS:
        raise OptionError(unknown("model", name, MODELS))
    return MODELS[name]


def _shape(name: str, given: tuple[int, ...] | None) -> tuple[int, ...]:
    shape = _entry(name).input_shape if given is None else tuple(given)
    if not shape or min(shape) < 1:
        raise OptionError(
            f"{name}: input_shape={shape} has no elements; give the shape of one input, "
            "such as (1, 28, 28)"
        )
    return shape
