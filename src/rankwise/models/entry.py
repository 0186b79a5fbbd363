"""What the registry holds of one network: what it is, how to make it, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from rankwise.models.reference import Reference

CLASSIFICATION, LANGUAGE = "classification", "language modelling"
TRANSLATION, OTHER = "translation", "another task"


@dataclass(frozen=True, kw_only=True)
class Model:
    """One entry of the registry: what the network is, in a line, and how to make it.

    Attributes:
        description: one line.
        make: called with (classes, input_shape): outputs or vocabulary, and the shape of one input:
            channels, height, width of an image, or the number of tokens of a text.
        task: "classification"; "language modelling": tokens (B, T) -> scores (B, T, classes);
            "translation": source (B, S) and target (B, T) -> scores (B, T, classes); or "another
            task", which can be planned but not trained from a recipe.
        classes: what `make` is given when nothing else is known.
        input_shape: likewise.
        example: called with input_shape: what the network's forward takes by keyword, one of each;
            None if that is one tensor of this shape, float32 or, for language, int64.
        change: called with a parsed name: the same network with other sizes; None if it takes none.
    """

    description: str
    make: Callable[[int, tuple[int, ...]], nn.Module]
    task: str = CLASSIFICATION
    classes: int = 10
    input_shape: tuple[int, ...] = (1, 28, 28)
    example: Callable[[tuple[int, ...]], Mapping[str, Any]] | None = None
    change: Callable[[Reference], Model] | None = None
