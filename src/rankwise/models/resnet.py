"""Residual networks (He et al., arXiv 1512.03385), for small images and for those of 224x224.

On CIFAR the stem is one 3x3 convolution without pooling, on ImageNet a 7x7 one with stride 2 and
max-pooling. A block whose shape changes has a 1x1 projection as its shortcut. In bottlenecks the
3x3 convolution carries the stride, as programs do since Goyal et al. (1706.02677); in the paper it
was the first 1x1. Wide ResNet-50-2 doubles the channels of these 3x3 (1605.07146).

Convolutions start from He et al. (1502.01852): normal with variance 2 / fan_out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import OptionError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the first one carries the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:  # (B, I, H, W) -> (B, O, H/stride, W/stride)
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 3x3 convolution of fewer channels between two of 1x1, beside a shortcut."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv3x3(inner, inner, stride)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:  # (B, I, H, W) -> (B, O, H/stride, W/stride)
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, stages `layer1`, `layer2`, ... of blocks, global average pooling, a classifier.

    Args:
        channels: channels of the images.
        widths: channels of each stage; every stage but the first halves height and width.
        blocks: blocks in each stage.
        classes: number of outputs.
        stem: channels of the first convolution; by default the first of `widths`.
        stem_kernel: its size, an odd number.
        stem_stride: its stride.
        pool: whether 3x3 max-pooling with stride 2 follows the stem.
        inner: channels of the 3x3 convolutions of each stage where the blocks are bottlenecks; None
            for basic blocks.

    Raises:
        OptionError: lists of different lengths, or a number below 1 in them.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        classes: int,
        *,
        stem: int | None = None,
        stem_kernel: int = 3,
        stem_stride: int = 1,
        pool: bool = False,
        inner: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        _check({"widths": widths, "blocks": blocks, "inner": inner or widths})
        inputs = stem or widths[0]
        self.stem = nn.Conv2d(
            channels, inputs, stem_kernel, stem_stride, padding=stem_kernel // 2, bias=False
        )
        self.stem_norm = nn.BatchNorm2d(inputs)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()
        self._stages = []
        narrow = inner or [None] * len(widths)
        for stage, (width, count, within) in enumerate(zip(widths, blocks, narrow, strict=True), 1):
            made = [
                _block(width if index else inputs, within, width, 2 if stage > 1 > index else 1)
                for index in range(count)
            ]
            self.add_module(f"layer{stage}", nn.Sequential(*made))
            self._stages.append(f"layer{stage}")
            inputs = width
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        x = self.pool(F.relu(self.stem_norm(self.stem(x))))
        for stage in self._stages:
            x = getattr(self, stage)(x)
        return self.classifier(x.mean(dim=(2, 3)))


def _check(lists: Mapping[str, Sequence[int]]) -> None:
    if len(set(map(len, lists.values()))) > 1 or min(map(min, lists.values()), default=0) < 1:
        said = ", ".join(f"{name}={list(each)}" for name, each in lists.items())
        raise OptionError(f"ResNet: {said}; each needs one whole number for every stage, from 1")


def _block(inputs: int, inner: int | None, outputs: int, stride: int) -> nn.Module:
    if inner is None:
        return BasicBlock(inputs, outputs, stride)
    return Bottleneck(inputs, inner, outputs, stride)


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
    return nn.Sequential(OrderedDict(conv=projection, norm=nn.BatchNorm2d(outputs)))
