"""Bytes of images become numbers of mean 0 and deviation 1, channel by channel.

Shapes: `N` or `B` images, `C` channels, `H` height, `W` width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Normalise:
    """From bytes to numbers: (byte - mean) / deviation, both (C, 1, 1) float32."""

    mean: Tensor
    deviation: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> float32, in the same memory format."""
        if pixels.movedim(1, -1).is_contiguous():
            # Whole rows at once: a loop over the three colours of each pixel is many times slower.
            rows = pixels.movedim(1, -1).flatten(2).float()  # (B, H, W * C)
            mean, deviation = (
                t.flatten().repeat(pixels.shape[3]) for t in (self.mean, self.deviation)
            )
            made = rows.sub_(mean).div_(deviation)
            return made.unflatten(2, (pixels.shape[3], -1)).movedim(-1, 1)
        return pixels.float().sub_(self.mean).div_(self.deviation)


def statistics(images: np.ndarray) -> Normalise:
    """Mean and deviation of each channel of images (N, H, W, C) uint8.

    They are exact, whatever the number of threads. The deviation of a constant channel is 1.
    """
    values = np.arange(256, dtype=np.float64)
    means, deviations = [], []
    for channel in range(images.shape[-1]):
        counts = np.bincount(images[..., channel].reshape(-1), minlength=256)
        mean = float(counts @ values) / counts.sum()
        variance = float(counts @ (values - mean) ** 2) / counts.sum()
        means.append(mean)
        deviations.append(variance**0.5 or 1.0)
    shape = (-1, 1, 1)
    return Normalise(
        torch.tensor(means, dtype=torch.float32).view(shape),
        torch.tensor(deviations, dtype=torch.float32).view(shape),
    )
