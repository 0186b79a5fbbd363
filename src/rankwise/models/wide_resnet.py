"""Wide residual networks for small images (Zagoruyko and Komodakis, arXiv 1605.07146).

Few, wide blocks, normalised and activated in front of each convolution, with dropout between the
two on request (0.3 on CIFAR in the paper). WRN-28-10 is depth 28, width 10.

Convolutions start from He et al. (1502.01852): normal with variance 2 / fan_out, as theirs.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import OptionError


class WideResNet(nn.Module):
    """A 3x3 stem of 16 channels, stages `layer1` to `layer3`, global average pooling, a classifier.

    Args:
        channels: channels of the images.
        depth: convolutions along the main path, shortcuts as one: 6 n + 4 for n blocks a stage.
        wide: the stages have 16, 32 and 64 times as many channels; the last two halve the image.
        classes: number of outputs.
        dropout: between the two convolutions of a block, in training.

    Raises:
        OptionError: a depth that is not 10, 16, 22, ..., or a width below 1.
    """

    def __init__(
        self, channels: int, *, depth: int, wide: int, classes: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        count, rest = divmod(depth - 4, 6)
        if rest or count < 1 or wide < 1:
            raise OptionError(
                f"WideResNet: depth={depth}, wide={wide}; the depth is 6 n + 4 for n blocks in "
                "each of three stages (10, 16, 22, 28, ...) and the width at least 1"
            )
        self.stem = _conv3x3(channels, 16)
        inputs = 16
        for stage, width in enumerate((16 * wide, 32 * wide, 64 * wide), start=1):
            blocks = [
                Block(width if index else inputs, width, 2 if stage > 1 > index else 1, dropout)
                for index in range(count)
            ]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            inputs = width
        self.norm = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        x = self.stem(x)
        for stage in ("layer1", "layer2", "layer3"):
            x = getattr(self, stage)(x)
        return self.classifier(F.relu(self.norm(x)).mean(dim=(2, 3)))


class Block(nn.Module):
    """Twice norm, ReLU and 3x3 convolution, beside a shortcut; the first one carries the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.drop = nn.Dropout(dropout)
        self.conv2 = _conv3x3(outputs, outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, I, H, W) -> (B, O, H/stride, W/stride)
        y = F.relu(self.norm1(x))
        # A projection sees the activated input, as in the authors' program; else it is passed on.
        beside = x if self.shortcut is None else self.shortcut(y)
        y = F.relu(self.norm2(self.conv1(y)))
        return beside + self.conv2(self.drop(y))


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
