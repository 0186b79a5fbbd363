"""Networks of torchvision by name (`torchvision:resnet50`), built without any weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rankwise.models.entry import Model
from rankwise.models.reference import Reference, arguments, check_image, check_name, load

# These return the scores of auxiliary classifiers beside their own unless they are told not to,
# and warn unless they are told how to initialise.
_INCEPTION: Mapping[str, Any] = {"aux_logits": False, "init_weights": True}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"googlenet": _INCEPTION, "inception_v3": _INCEPTION}
_SIDES = {"inception_v3": 299}


def names(reference: Reference) -> list[str]:
    """Every classifier of images that torchvision can build."""
    torchvision: Any = load(reference)
    return torchvision.models.list_models(module=torchvision.models)


def find(reference: Reference) -> Model:
    """The entry of a torchvision network.

    Raises:
        OptionError: torchvision is missing, or knows no such network or argument.
    """
    torchvision: Any = load(reference)
    check_name(reference, names(reference))
    kind = _kind(reference.name)
    allowed = arguments(kind)
    reference.check(allowed)
    classes = reference.overrides.get("num_classes", 1000)
    side = reference.overrides.get("image_size", _SIDES.get(reference.name, 224))

    def make(outputs: int, shape: tuple[int, ...]) -> nn.Module:
        wanted: dict[str, Any] = {} if outputs == classes else {"num_classes": outputs}
        if shape != (3, side, side):
            check_image(reference, shape)
            if shape[0] != 3:
                raise reference.error(
                    f"torchvision's networks read images of 3 channels, not {shape[0]}; timm's "
                    f"take any number of them (timm:{reference.name}, if it has that name)"
                )
            if "image_size" in allowed and shape[1:] != (side, side):
                wanted["image_size"] = shape[1]
        return _build(reference, torchvision, reference.settle(wanted))

    return Model(
        description=f"{kind.__name__} of torchvision, {classes} classes",
        make=make,
        classes=classes,
        input_shape=(3, side, side),
    )


@functools.cache
def _kind(name: str) -> type[nn.Module]:
    """The class of a network; its arguments are what a name may set."""
    plain = Reference("torchvision", name, {})
    with torch.device("meta"):
        return type(_build(plain, load(plain), {}))


def _build(reference: Reference, torchvision: Any, given: Mapping[str, Any]) -> nn.Module:
    given = {**_DEFAULTS.get(reference.name, {}), **given}
    with reference.building(given):
        return torchvision.models.get_model(reference.name, weights=None, **given)
