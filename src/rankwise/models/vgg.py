"""VGG networks with batch normalisation (Simonyan and Zisserman, arXiv 1409.1556).

The form for small images that Pufferfish (2103.03936) and its successors train on CIFAR: every 3x3
convolution is followed by BatchNorm and ReLU, and the classifier is 512-512-classes with dropout in
place of the 4096-4096-1000 of ImageNet.

Weights start from He et al. (arXiv 1502.01852): normal with variance 2 / fan_out for convolutions
and 2 / fan_in for the layers of the classifier, the last one 1 / fan_in; biases from zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

POOL = 0
"""Marks max-pooling in a list of widths."""

# Configurations A, D and E of the paper's table 1.
VGG_11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
VGG_16 = (*(64, 64, POOL, 128, 128, POOL), *(256,) * 3, POOL, *((512,) * 3 + (POOL,)) * 2)
VGG_19 = (*(64, 64, POOL, 128, 128, POOL), *(256,) * 4, POOL, *((512,) * 4 + (POOL,)) * 2)


class VGG(nn.Module):
    """Convolutions in `features`, then the mean over what is left of the image, then `classifier`.

    Pooling rounds up, so that images of any size come through: 32x32 ends at 1x1 as published, and
    so do 28x28 and 16x16.

    Args:
        channels: channels of the images.
        widths: channels after each convolution in turn, with `POOL` where height and width halve.
        classes: number of outputs.
        hidden: width of the two hidden layers of the classifier.
        dropout: in front of each of these two, in training.
        bias: whether convolutions have a bias; BatchNorm takes it away again.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        classes: int,
        *,
        hidden: int = 512,
        dropout: float = 0.5,
        bias: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            if width == POOL:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
                continue
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=bias))
            layers += (nn.BatchNorm2d(width), nn.ReLU(inplace=True))
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(channels, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Linear):
                after = "linear" if module is self.classifier[-1] else "relu"
                nn.init.kaiming_normal_(module.weight, nonlinearity=after)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        return self.classifier(self.features(x).mean(dim=(2, 3)))
