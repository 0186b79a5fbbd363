"""The networks of this package by name: plain torch, no other package needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rankwise.errors import OptionError
from rankwise.models.encoder_decoder import EncoderDecoder
from rankwise.models.entry import LANGUAGE, TRANSLATION, Model
from rankwise.models.mlp import MLP
from rankwise.models.recurrent import RecurrentLanguageModel
from rankwise.models.resnet import ResNet
from rankwise.models.transformer import Transformer
from rankwise.models.vgg import VGG, VGG_11, VGG_16, VGG_19
from rankwise.models.vit import ViT
from rankwise.models.wide_resnet import WideResNet


def _mlp(*layers: int) -> Callable[[int, tuple[int, ...]], nn.Module]:
    return lambda classes, shape: MLP(math.prod(shape), layers, classes)


def _image(
    what: str,
    description: str,
    build: Callable[[int, tuple[int, int], int], nn.Module],
    *,
    input_shape: tuple[int, ...] = (1, 28, 28),
    outputs: int = 10,
) -> Model:
    """A network that is built from channels, (height, width) and a number of classes."""

    def make(classes: int, shape: tuple[int, ...]) -> nn.Module:
        if len(shape) != 3:
            raise OptionError(
                f"{what} reads images (channels, height, width), not inputs of shape {shape}; "
                "give input_shape three numbers or choose an MLP"
            )
        return build(shape[0], (shape[1], shape[2]), classes)

    return Model(description=description, make=make, classes=outputs, input_shape=input_shape)


_CIFAR: Mapping[str, Any] = {"input_shape": (3, 32, 32)}
_IMAGENET: Mapping[str, Any] = {"input_shape": (3, 224, 224), "outputs": 1000}


def _resnet(description: str, sizes: Mapping[str, Any], **usual: Any) -> Model:
    return _image(
        "a residual network",
        description,
        lambda channels, _, classes: ResNet(channels, classes=classes, **sizes),
        **usual,
    )


def _basic(*blocks: int) -> Model:
    return _resnet(
        f"ResNet-{2 * sum(blocks) + 2} in its CIFAR form: 3x3 stem, basic blocks",
        {"widths": (64, 128, 256, 512), "blocks": blocks},
    )


def _bottlenecks(*blocks: int, wide: int = 1, large: bool) -> Model:
    name = (
        f"Wide ResNet-{3 * sum(blocks) + 2}-{wide}" if wide > 1 else f"ResNet-{3 * sum(blocks) + 2}"
    )
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
    return _image(
        "a wide residual network",
        f"Wide ResNet-{depth}-{wide} for 32x32 images: pre-activation (arXiv 1605.07146)",
        lambda channels, _, classes: WideResNet(channels, depth=depth, wide=wide, classes=classes),
        **_CIFAR,
    )


def _vgg(description: str, widths: Sequence[int], usual: Mapping[str, Any], **sizes: Any) -> Model:
    return _image(
        "a VGG network",
        description,
        lambda channels, _, classes: VGG(channels, widths, classes, **sizes),
        **usual,
    )


def _vit(
    description: str, usual: Mapping[str, Any], *, patch: int | None = None, **sizes: Any
) -> Model:
    """Without `patch`, a quarter of an image's longer side."""
    return _image(
        "a vision Transformer",
        description,
        lambda channels, size, classes: ViT(
            channels, size, patch=patch or max(1, max(size) // 4), classes=classes, **sizes
        ),
        **usual,
    )


def _language(
    description: str, *, vocabulary: int = 32_000, tokens: int = 256, **sizes: Any
) -> Model:
    return _reads_text(
        description,
        lambda classes, context: Transformer(vocabulary=classes, context=context, **sizes),
        vocabulary,
        tokens,
    )


def _recurrent(description: str, *, vocabulary: int = 256, tokens: int, **sizes: Any) -> Model:
    # The state is handed over from window to window, so that no length is built in.
    return _reads_text(
        description,
        lambda classes, _: RecurrentLanguageModel(vocabulary=classes, **sizes),
        vocabulary,
        tokens,
    )


def _reads_text(
    description: str, build: Callable[[int, int], nn.Module], vocabulary: int, tokens: int
) -> Model:
    def make(classes: int, shape: tuple[int, ...]) -> nn.Module:
        if len(shape) != 1:
            raise OptionError(
                f"a language model reads windows of (tokens,), not inputs of shape {shape}; give "
                "input_shape one number or choose a network for images"
            )
        return build(classes, shape[0])

    return Model(
        description=description,
        make=make,
        task=LANGUAGE,
        classes=vocabulary,
        input_shape=(tokens,),
    )


def _translates(description: str, *, vocabulary: int, tokens: int = 32, **sizes: Any) -> Model:
    # Positions are sines, so that no length is built in; a plan is counted for one pair.
    return Model(
        description=description,
        make=lambda classes, _: EncoderDecoder(vocabulary=classes, **sizes),
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
    "mlp-512x2": Model(
        description="784-512-512-10 perceptron of the MNIST studies",
        make=_mlp(512, 512),
    ),
    "mlp-128x4": Model(
        description="784-128 and four hidden 128-128 layers: the small FCN of the MNIST study",
        make=_mlp(128, *[128] * 4),
    ),
    "mlp-512x8": Model(
        description="784-512 and eight hidden 512-512 layers: the large FCN of the MNIST study",
        make=_mlp(512, *[512] * 8),
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
        tuple(width // 4 for width in VGG_11),
        {},
        hidden=128,
        dropout=0.0,
    ),
    **{
        f"vgg-{depth}": _vgg(
            f"VGG-{depth} for 32x32 images: BatchNorm, classifier of two layers of 512",
            widths,
            _CIFAR,
        )
        for depth, widths in ((11, VGG_11), (16, VGG_16), (19, VGG_19))
    },
    "vit-mini": _vit(
        "ViT of 4x4 patches an image, width 128, 4 layers: 10,000 images in seconds",
        {},
        **{"width": 128, "layers": 4, "heads": 4, "hidden": 256},
    ),
    "vit-cifar": _vit(
        "ViT for 32x32 images: 4x4 pixels a patch, width 512, 6 layers, 9.5 million",
        _CIFAR,
        patch=4,
        **{"width": 512, "layers": 6, "heads": 8, "hidden": 512},
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
