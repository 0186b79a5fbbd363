"""Labelled images in three parts, whole in memory; how bytes are cut and scaled into them.

Shapes: `N` images, `C` channels, `H` height, `W` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from rankwise.data.images.augment import Augment
from rankwise.data.images.normalise import Normalise, statistics
from rankwise.data.parts import SPLIT_SEED, DataSet
from rankwise.errors import DataError
from rankwise.images.variation import draws


@dataclass(frozen=True, eq=False, kw_only=True)
class OfImages:
    """Labelled images, which a pass may vary.

    Attributes:
        augment: varies images in a pass over them; what is taken outside one stays as it is.
        draw: the number of the pass.
    """

    unit = "image"  # it has one label
    noun = "image"
    units = 1
    augment: Augment | None = None
    draw: int | None = None

    def for_epoch(self, draw: int, streams: int = 0) -> Self:
        """The same images in every pass, or each as that pass varies it."""
        return self if self.augment is None else replace(self, draw=draw)

    def drawn(self, chosen: Tensor) -> np.ndarray | None:
        """What varies these images (B,) in this pass: (B, D) random numbers, or nothing."""
        if self.augment is None or self.draw is None:
            return None
        return draws(self.draw, chosen.numpy())


@dataclass(frozen=True, eq=False)
class Split(OfImages):
    """One part of a data set of images, whole in memory.

    Attributes:
        pixels: (N, C, H, W) float32 as it is read, or uint8, a quarter of the memory, which
            `normalise` turns into float32 batch by batch.
        labels: (N,) int64.
        normalise: of bytes.
    """

    pixels: Tensor
    labels: Tensor
    normalise: Normalise | None = None

    @property
    def images(self) -> Tensor:
        """All images as they are read, (N, C, H, W) float32; of bytes a copy, made anew."""
        if self.normalise is None:
            return self.pixels
        return self.normalise(self.pixels.contiguous())

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B,) by number."""
        if self.normalise is None:
            taken = self.pixels[chosen]
        else:  # along the last dimension lie the colours of a pixel: an image is copied as a piece
            taken = self.pixels.movedim(1, -1).index_select(0, chosen).movedim(-1, 1)
        drawn = self.drawn(chosen)
        if self.augment is not None and drawn is not None:
            taken = self.augment(taken, drawn)
        return taken if self.normalise is None else self.normalise(taken), self.labels[chosen]


@dataclass(frozen=True, eq=False, kw_only=True)
class Splits(DataSet):
    """Images in three parts, in memory."""

    task: ClassVar[str] = "classification"
    train: Split
    validation: Split
    test: Split


def stratified(
    labels: np.ndarray, fractions: Sequence[float], classes: Sequence[str]
) -> list[np.ndarray]:
    """Cut indices into a first part and one part for each fraction, alike in every class.

    Args:
        labels: (N,) class of each image.
        fractions: share of each class that goes to the parts after the first; a part gets at
            least one image of each class.
        classes: the name of each label.

    Returns:
        Sorted indices: the rest, then one array for each fraction.

    Raises:
        DataError: a class has fewer images than there are parts.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    parts: list[list[np.ndarray]] = [[] for _ in range(len(fractions) + 1)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < len(parts):
            raise DataError(
                f"class '{classes[label]}' has {len(members)} image(s), too few to give each of "
                f"{len(parts)} splits one; add images or make the splits yourself"
            )
        total = len(members)
        members = members[torch.randperm(len(members), generator=generator).numpy()]
        for part, fraction in enumerate(fractions, start=1):
            count = max(1, round(fraction * total))
            parts[part].append(members[:count])
            members = members[count:]
        parts[0].append(members)
    return [np.sort(np.concatenate(part)) for part in parts]


def normalised(
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[Split, Split, Split]:
    """Turn bytes into training, validation and test splits, scaled by the first one.

    Args:
        parts: training, validation, test: images (N, H, W, C) uint8 and labels (N,).

    Returns:
        The splits: in the training split every channel has mean 0 and standard deviation 1; a
        channel that is constant there is only shifted.
    """
    normalise = statistics(parts[0][0])
    train, validation, test = (
        Split(
            torch.from_numpy(images).movedim(-1, 1),
            torch.from_numpy(labels).long(),
            normalise,
        )
        for images, labels in parts
    )
    return train, validation, test
