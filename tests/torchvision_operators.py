"""torchvision's wheels are built for CUDA: beside a torch without it their import fails for two
missing operators. Nothing here calls them, so their schemas are enough.
"""

from __future__ import annotations

import importlib.util

import torch

_KEPT = []  # a library that is collected takes its operators along


def stub_operators() -> None:
    """Declare torchvision's two operators of detection if this build of torch has no such code."""
    if importlib.util.find_spec("torchvision") is None or _KEPT:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
