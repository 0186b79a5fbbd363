"""The networks of this package by name: plain torch, no other package needed.

A name may change what its class takes: `wrn-28-10?dropout=0.3`, `vit-cifar?layers=3&patch=8`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from rankwise.errors import OptionError
from rankwise.models.encoder_decoder import EncoderDecoder
from rankwise.models.entry import LANGUAGE, TRANSLATION, Model
from rankwise.models.mlp import MLP
from rankwise.models.recurrent import RecurrentLanguageModel
from rankwise.models.reference import Reference, arguments
from rankwise.models.resnet import ResNet
from rankwise.models.transformer import Transformer
from rankwise.models.vgg import VGG, VGG_11, VGG_16, VGG_19
from rankwise.models.vit import ViT
from rankwise.models.wide_resnet import WideResNet

# Arguments that follow from (classes, input_shape), by class.
Fit = Callable[[int, tuple[int, ...]], dict[str, Any]]
_OF_THE_DATA = frozenset({"inputs", "channels", "size", "classes", "vocabulary", "context"})


def _entry(
    kind: Callable[..., nn.Module],
    fit: Fit,
    description: str,
    sizes: Mapping[str, Any],
    **usual: Any,
) -> Model:
    def make(classes: int, shape: tuple[int, ...]) -> nn.Module:
        return kind(**fit(classes, shape), **sizes)

    def change(reference: Reference) -> Model:
        taken = {k: v for k, v in arguments(kind).items() if k not in _OF_THE_DATA}
        reference.check({key: sizes.get(key, default) for key, default in taken.items()})
        changed = _entry(kind, fit, description, {**sizes, **reference.overrides}, **usual)
        return dataclasses.replace(changed, make=_guarded(changed.make, reference))

    return Model(description=description, make=make, change=change, **usual)


def _guarded(make: Callable[..., nn.Module], reference: Reference) -> Callable[..., nn.Module]:
    def guarded(classes: int, shape: tuple[int, ...]) -> nn.Module:
        with reference.building(reference.overrides):
            return make(classes, shape)

    return guarded


def _flat(classes: int, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"inputs": math.prod(shape), "classes": classes}


def _image(what: str, *, sized: bool = False) -> Fit:
    def fit(classes: int, shape: tuple[int, ...]) -> dict[str, Any]:
        if len(shape) != 3:
            raise OptionError(
                f"{what} reads images (channels, height, width), not inputs of shape {shape}; "
                "give input_shape three numbers or choose an MLP"
            )
        found = {"channels": shape[0], "classes": classes}
        return {**found, "size": shape[1:]} if sized else found

    return fit


def _text(classes: int, shape: tuple[int, ...]) -> dict[str, Any]:
    if len(shape) != 1:
        raise OptionError(
            f"a language model reads windows of (tokens,), not inputs of shape {shape}; give "
            "input_shape one number or choose a network for images"
        )
    return {"vocabulary": classes, "context": shape[0]}


def _stream(classes: int, shape: tuple[int, ...]) -> dict[str, Any]:
    # The state is handed over from window to window, so that no length is built in.
    return {"vocabulary": _text(classes, shape)["vocabulary"]}


_CIFAR: Mapping[str, Any] = {"input_shape": (3, 32, 32)}
_IMAGENET: Mapping[str, Any] = {"input_shape": (3, 224, 224), "classes": 1000}


def _mlp(description: str, *layers: int) -> Model:
    return _entry(MLP, _flat, description, {"layers": layers})


def _resnet(description: str, sizes: Mapping[str, Any], **usual: Any) -> Model:
    return _entry(ResNet, _image("a residual network"), description, sizes, **usual)


def _basic(*blocks: int) -> Model:
    return _resnet(
        f"ResNet-{2 * sum(blocks) + 2} in its CIFAR form: 3x3 stem, basic blocks",
        {"widths": (64, 128, 256, 512), "blocks": blocks},
    )


def _bottlenecks(*blocks: int, wide: int = 1, large: bool) -> Model:
    depth = 3 * sum(blocks) + 2
    name = f"Wide ResNet-{depth}-{wide}" if wide > 1 else f"ResNet-{depth}"
    sizes = {
        "widths": (256, 512, 1024, 2048),
        "inner": tuple(wide * width for width in (64, 128, 256, 512)),
        "blocks": blocks,
        "stem": 64,
    }
    if large:
        sizes |= {"stem_kernel": 7, "stem_stride": 2, "pool": True}
        return _resnet(f"{name} for 224x224 images: 7x7 stem, bottlenecks", sizes, **_IMAGENET)
    return _resnet(f"{name} for 32x32 images: 3x3 stem, bottlenecks", sizes, **_CIFAR)


def _wide(depth: int, wide: int) -> Model:
    return _entry(
        WideResNet,
        _image("a wide residual network"),
        f"Wide ResNet-{depth}-{wide} for 32x32 images: pre-activation (arXiv 1605.07146)",
        {"depth": depth, "wide": wide},
        **_CIFAR,
    )


def _vgg(description: str, sizes: Mapping[str, Any], **usual: Any) -> Model:
    return _entry(VGG, _image("a VGG network"), description, sizes, **usual)


def _vit(description: str, sizes: Mapping[str, Any], **usual: Any) -> Model:
    return _entry(ViT, _image("a vision Transformer", sized=True), description, sizes, **usual)


def _reads(
    kind: Callable[..., nn.Module], fit: Fit, description: str, sizes: dict[str, Any]
) -> Model:
    sizes = dict(sizes)
    vocabulary, tokens = sizes.pop("vocabulary"), sizes.pop("tokens")
    usual = {"task": LANGUAGE, "classes": vocabulary, "input_shape": (tokens,)}
    return _entry(kind, fit, description, sizes, **usual)


def _language(description: str, **sizes: Any) -> Model:
    return _reads(Transformer, _text, description, {"vocabulary": 32_000, "tokens": 256, **sizes})


def _recurrent(description: str, **sizes: Any) -> Model:
    return _reads(RecurrentLanguageModel, _stream, description, {"vocabulary": 256, **sizes})


def _translates(description: str, *, vocabulary: int, tokens: int = 32, **sizes: Any) -> Model:
    # Positions are sines, so that no length is built in; a plan is counted for one pair.
    return _entry(
        EncoderDecoder,
        lambda classes, _: {"vocabulary": classes},
        description,
        sizes,
        task=TRANSLATION,
        classes=vocabulary,
        input_shape=(tokens,),
        example=lambda shape: {
            side: torch.ones(1, *shape, dtype=torch.int64) for side in ("source", "target")
        },
    )


def _llama(width: int, layers: int, heads: int, hidden: int) -> Model:
    return _language(
        f"LLaMA of the GaLore protocol: width {width}, {layers} layers, {heads} heads",
        **{"width": width, "layers": layers, "heads": heads, "hidden": hidden},
    )


_TINY: dict[str, Any] = {"vocabulary": 256, "tokens": 128, "width": 128, "heads": 4}

MODELS: dict[str, Model] = {
    "mlp-512x2": _mlp("784-512-512-10 perceptron of the MNIST studies", 512, 512),
    "mlp-128x4": _mlp(
        "784-128 and four hidden 128-128 layers: the small FCN of the MNIST study",
        *[128] * 5,
    ),
    "mlp-512x8": _mlp(
        "784-512 and eight hidden 512-512 layers: the large FCN of the MNIST study",
        *[512] * 9,
    ),
    "resnet-small": _resnet(
        "residual CNN for small grey images, an epoch of 4,000 in seconds on two cores",
        {"widths": (64, 128, 256), "blocks": (1, 2, 2), "stem_stride": 2},
    ),
    "resnet-18": _basic(2, 2, 2, 2),
    "resnet-34": _basic(3, 4, 6, 3),
    "resnet-50-cifar": _bottlenecks(3, 4, 6, 3, large=False),
    "resnet-101-cifar": _bottlenecks(3, 4, 23, 3, large=False),
    "resnet-50": _bottlenecks(3, 4, 6, 3, large=True),
    "resnet-101": _bottlenecks(3, 4, 23, 3, large=True),
    "resnet-152": _bottlenecks(3, 8, 36, 3, large=True),
    "wrn-28-10": _wide(28, 10),
    "wrn-50-2": _bottlenecks(3, 4, 6, 3, wide=2, large=True),
    "vgg-small": _vgg(
        "VGG-11 with a quarter of its channels, an epoch of 10,000 images in seconds",
        {"widths": tuple(width // 4 for width in VGG_11), "hidden": 128, "dropout": 0.0},
    ),
    **{
        f"vgg-{depth}": _vgg(
            f"VGG-{depth} for 32x32 images: BatchNorm, classifier of two layers of 512",
            {"widths": widths},
            **_CIFAR,
        )
        for depth, widths in ((11, VGG_11), (16, VGG_16), (19, VGG_19))
    },
    "vit-mini": _vit(
        "ViT of 4x4 patches an image, width 128, 4 layers: 10,000 images in seconds",
        {"width": 128, "layers": 4, "heads": 4, "hidden": 256},
    ),
    "vit-cifar": _vit(
        "ViT for 32x32 images: 4x4 pixels a patch, width 512, 6 layers, 9.5 million",
        {"patch": 4, "width": 512, "layers": 6, "heads": 8, "hidden": 512},
        **_CIFAR,
    ),
    "llama-tiny": _language(
        "causal Transformer for small texts: LLaMA blocks, width 128, 4 layers",
        **_TINY,
        layers=4,
        hidden=344,
    ),
    "gpt2-tiny": _language(
        "causal Transformer for small texts: GPT-2 blocks, width 128, 3 layers, tied head",
        **_TINY,
        layers=3,
        hidden=512,
        form="gpt2",
        tied=True,
    ),
    "gpt2-wikitext2": _language(
        "causal Transformer of the FedLMT program: width 128, 3 layers, hidden 2048, 64 tokens",
        **{"vocabulary": 33_278, "tokens": 64, "width": 128, "layers": 3, "heads": 4},
        **{"hidden": 2048, "form": "gpt2"},
    ),
    "gpt2-124m": _language(
        "GPT-2 small: width 768, 12 layers, tied head, 1024 tokens (Radford et al., 2019)",
        **{"vocabulary": 50_257, "tokens": 1024, "width": 768, "layers": 12, "heads": 12},
        **{"hidden": 3072, "form": "gpt2", "tied": True},
    ),
    "lstm-char": _recurrent(
        "LSTM for characters or bytes: two layers of 256, an epoch of a small text in a minute",
        **{"tokens": 64, "width": 64, "hidden": 256, "layers": 2},
    ),
    "lstm-char-512": _recurrent(
        "LSTM for characters or bytes: two layers of 512, dropout 0.2",
        **{"tokens": 64, "width": 128, "hidden": 512, "layers": 2, "dropout": 0.2},
    ),
    "gru-char": _recurrent(
        "GRU for characters or bytes: two layers of 256",
        **{"tokens": 64, "width": 64, "hidden": 256, "layers": 2, "cell": "gru"},
    ),
    "lstm-word": _recurrent(
        "LSTM for words: two layers of 650, tied head, dropout 0.5 (arXiv 1409.2329, 1608.05859)",
        **{"vocabulary": 10_000, "tokens": 35, "width": 650, "hidden": 650, "layers": 2},
        **{"dropout": 0.5, "tied": True},
    ),
    "lstm-wikitext2": _recurrent(
        "LSTM of the Pufferfish study: two layers of 1500, tied head, dropout 0.65 (2103.03936)",
        **{"vocabulary": 33_278, "tokens": 35, "width": 1500, "hidden": 1500, "layers": 2},
        **{"dropout": 0.65, "tied": True},
    ),
    "transformer-base": _translates(
        "encoder-decoder of translation: width 512, 6 + 6 layers (1706.03762, 2103.03936)",
        **{"vocabulary": 9_521, "width": 512, "layers": 6, "heads": 8, "hidden": 2048},
    ),
    "transformer-tiny": _translates(
        "encoder-decoder for small texts in pairs: width 128, 2 + 2 layers",
        **{"vocabulary": 4_000, "width": 128, "layers": 2, "heads": 4, "hidden": 512},
    ),
    # Sizes of the common pre-training protocol (GaLore, arXiv 2403.03507, and its successors).
    "llama-60m": _llama(512, 8, 8, 1376),
    "llama-130m": _llama(768, 12, 12, 2048),
    "llama-350m": _llama(1024, 24, 16, 2736),
}
