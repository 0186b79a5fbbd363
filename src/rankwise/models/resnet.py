"""Residual networks for small images (He et al., arXiv 1512.03385), in the form used on CIFAR.

The stem is one 3x3 convolution without pooling, and a block whose shape changes has a 1x1
projection as its shortcut.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the first one carries the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(
                OrderedDict(conv=projection, norm=nn.BatchNorm2d(outputs))
            )

    def forward(self, x: Tensor) -> Tensor:  # (B, I, H, W) -> (B, O, H/stride, W/stride)
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, stages `layer1`, `layer2`, ... of basic blocks, global average pooling, a classifier.

    Args:
        channels: channels of the images.
        widths: channels of each stage; every stage but the first halves height and width.
        blocks: basic blocks in each stage.
        classes: number of outputs.
        stem_stride: stride of the first convolution.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        classes: int,
        *,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.stem = _conv3x3(channels, widths[0], stem_stride)
        self.stem_norm = nn.BatchNorm2d(widths[0])
        inputs, self._stages = widths[0], []
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            first = BasicBlock(inputs, width, stride=1 if stage == 1 else 2)
            rest = [BasicBlock(width, width, stride=1) for _ in range(count - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(first, *rest))
            self._stages.append(f"layer{stage}")
            inputs = width
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        x = F.relu(self.stem_norm(self.stem(x)))
        for stage in self._stages:
            x = getattr(self, stage)(x)
        return self.classifier(x.mean(dim=(2, 3)))


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
