"""The networks that a recipe can name. They are ordinary dense models and know nothing of rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rankwise.errors import OptionError, unknown
from rankwise.models.mlp import MLP
from rankwise.models.resnet import ResNet

__all__ = ["MLP", "MODELS", "Model", "ResNet", "build"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """One entry of the registry: what the network is, in a line, and how to make it."""

    description: str
    make: Callable[[int, tuple[int, ...]], nn.Module]  # (classes, input_shape)


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
}


def build(name: str, *, classes: int = 10, input_shape: tuple[int, ...] = (1, 28, 28)) -> nn.Module:
    """A freshly initialised network of the registry, drawn from torch's global generator.

    Args:
        name: a key of `MODELS`.
        classes: number of outputs, at least 1.
        input_shape: shape of one input without the batch dimension.

    Raises:
        OptionError: an unknown name, or a shape or class count that the network cannot take.
    """
    if name not in MODELS:
        raise OptionError(unknown("model", name, MODELS))
    if classes < 1:
        raise OptionError(f"{name}: classes={classes}; a classifier needs at least 1 class")
    shape = tuple(input_shape)
    if not shape or min(shape) < 1:
        raise OptionError(
            f"{name}: input_shape={shape} has no elements; give the shape of one input, "
            "such as (1, 28, 28)"
        )
    return MODELS[name].make(classes, shape)
