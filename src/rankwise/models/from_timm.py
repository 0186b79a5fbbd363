"""Networks of timm by name (`timm:resnet50`), built from its code without any weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rankwise.models.entry import Model
from rankwise.models.reference import Reference, arguments, check_image, check_name, load


def names(reference: Reference) -> list[str]:
    """Every network that timm can build."""
    timm: Any = load(reference)
    return timm.list_models()


def find(reference: Reference) -> Model:
    """The entry of a timm network.

    Raises:
        OptionError: timm is missing, or knows no such network or argument.
    """
    timm: Any = load(reference)
    # A tag says whose weights (`resnet50.a1_in1k`); the network is the same.
    plain = reference.name.partition(".")[0]
    check_name(Reference("timm", plain, {}), timm.list_models())
    kind = _kind(reference.name)
    allowed = arguments(kind)
    if "img_size" in allowed:
        allowed["img_size"] = None  # a side, or height and width
    reference.check(allowed)
    asked, published = reference.overrides, timm.get_pretrained_cfg(plain)
    channels, height, width = published.input_size if published else (3, 224, 224)
    size = asked.get("img_size", (height, width))
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    usual = (asked.get("in_chans", channels), height, width)
    classes = asked.get("num_classes", published.num_classes if published else 1000)

    def make(outputs: int, shape: tuple[int, ...]) -> nn.Module:
        wanted: dict[str, Any] = {} if outputs == classes else {"num_classes": outputs}
        if shape != usual:
            check_image(reference, shape)
            if shape[0] != usual[0]:
                wanted["in_chans"] = shape[0]
            if shape[1:] != usual[1:] and "img_size" in allowed:
                wanted["img_size"] = shape[1:]
        return _build(reference, timm, reference.settle(wanted))

    return Model(
        description=f"{kind.__name__} of timm, {classes} classes",
        make=make,
        classes=classes,
        input_shape=usual,
    )


@functools.cache
def _kind(name: str) -> type[nn.Module]:
    """The class of a network; its arguments are what a name may set."""
    plain = Reference("timm", name, {})
    with torch.device("meta"):
        return type(_build(plain, load(plain), {}))


def _build(reference: Reference, timm: Any, given: Mapping[str, Any]) -> nn.Module:
    with reference.building(given):
        return timm.create_model(reference.name, pretrained=False, **given)
