"""The published tables that published_counts.py counts again: networks, ranks, figures.

Sources: Pufferfish (Wang et al., arXiv 2103.03936), tables of its sections 4.2 and 4.3; the results
table of the FedLMT authors' program for training low-rank models from scratch (ratio 0.2, no hybrid
layers; its "Size(MB)" is millions of numbers, its "FLOPs(M)" millions of multiply-adds); the
low-rank perceptrons of the MNIST study; and the papers of the dense networks themselves.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import rankwise
from rankwise import models
from rankwise.models.vgg import VGG_11, VGG_16

Difference = tuple[str, Callable[[nn.Module, Any], int]]


@dataclass(frozen=True)
class Network:
    """A network of a table.

    Attributes:
        title: for people; the name in this package where it has one.
        build: the network and one input.
        hybrid: globs of the layers that are low-rank in a hybrid, as Pufferfish published it; where
            it did not, of all but the first and the last.
        dense: globs of the layers that the FedLMT program leaves dense.
        split: whether parts of fused matrices (gates; query, key, value) are factorised apart.
    """

    title: str
    build: Callable[[], tuple[nn.Module, Any]]
    hybrid: Sequence[str]
    dense: Sequence[str]
    split: bool = False


@dataclass(frozen=True)
class Row:
    """A network in one form, and what was published of it.

    Attributes:
        network: as it is when dense.
        form: in words.
        make: makes it low-rank in place; None leaves it dense.
        published: "parameters" and "MACs" as printed, with their unit.
        differs: what the published counts hold besides ours: quantity -> (words, amount) each; the
            amount is called with the dense network and its input.
    """

    network: Network
    form: str
    make: Callable[[nn.Module], object] | None = None
    published: Mapping[str, str] = field(default_factory=dict)
    differs: Mapping[str, Sequence[Difference]] = field(default_factory=dict)


def _matrices(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Layer -> outputs, inputs, kernel; of an LSTM, the outputs of one gate."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            found[name] = (*layer.weight.shape, 1)
        elif isinstance(layer, nn.Conv2d):
            found[name] = (*layer.weight.shape[:2], layer.kernel_size[0])
        elif isinstance(layer, nn.LSTM):
            for i in range(layer.num_layers):
                inputs = layer.hidden_size if i else layer.input_size
                found[f"{name}.ih_l{i}"] = (layer.hidden_size, inputs, 1)
                found[f"{name}.hh_l{i}"] = (layer.hidden_size, layer.hidden_size, 1)
    return found


def _any(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def hybrid(network: Network, ratio: float, model: nn.Module) -> None:
    """Low-rank as Pufferfish does it: ratio of the (outputs, inputs x k x k) matrix."""
    ranks = {
        name: int(ratio * min(outputs, inputs * kernel**2))
        for name, (outputs, inputs, kernel) in _matrices(model).items()
        if _any(name, network.hybrid)
    }
    rankwise.factorize(model, ranks, init="variance", split=network.split)


def separable(network: Network, ratio: float, model: nn.Module) -> None:
    """Low-rank as the FedLMT program does it: ratio of the (k x outputs, k x inputs) matrix."""
    ranks = {
        name: max(1, int(ratio * kernel * min(outputs, inputs)))
        for name, (outputs, inputs, kernel) in _matrices(model).items()
        if not _any(name, network.dense)
    }
    # There, query, key and value are apart where the network has them apart; gates never are.
    split = network.split and not any(name.endswith("hh_l0") for name in ranks)
    rankwise.factorize(model, ranks, init="variance", separable=True, split=split)


MEANINGS: Mapping[str, Callable[[Network, float, nn.Module], None]] = {
    "hybrid": hybrid,
    "separable": separable,
}


# What published counters see besides the matrix products.


def _normed(model: nn.Module, sample: Any) -> int:
    """Numbers that BatchNorm and LayerNorm read in one forward."""
    seen: list[int] = []
    kinds = (nn.BatchNorm2d, nn.LayerNorm)
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    model(sample)
    for handle in handles:
        handle.remove()
    return sum(seen)


def _five_a_norm(model: nn.Module, sample: Any) -> int:
    return 5 * _normed(model, sample)


def _running_statistics(model: nn.Module, *_: Any, counters: bool) -> int:
    named = model.named_buffers()
    return sum(b.numel() for name, b in named if counters or "num_batches" not in name)


def _always(amount: int) -> Callable[[nn.Module, Any], int]:
    return lambda *_: amount


_NORMS = ("5 for each number that a norm reads", _five_a_norm)
_POOL = ("1 for each number that is averaged at the end", _always(512 * 4 * 4))
_EXTRA = "as much as one more dense 512x512 layer in its low-rank classifier"


# Networks.


def _named(name: str, *, hybrid: Sequence[str], dense: Sequence[str], **more: Any) -> Network:
    def build() -> tuple[nn.Module, Any]:
        colour = name in ("resnet-18", "resnet-34")  # their usual input is grey
        shape = (3, 32, 32) if colour else None
        sample = models.sample(name, input_shape=shape)
        moved = sample.to("meta") if isinstance(sample, Tensor) else sample
        return models.build(name, input_shape=shape), moved

    return Network(name, build, hybrid, dense, **more)


def _image(title: str, make: Callable[[], nn.Module], dense: Sequence[str]) -> Network:
    return Network(title, lambda: (make(), torch.empty(1, 3, 32, 32)), (), dense)


_RESIDUAL = ("stem", "*shortcut.conv", "classifier")
# Those after the ninth convolution, which is features.27.
_AFTER_NINE = tuple(f"features.{i}" for i in (30, 33, 36, 40, 43, 46, 49))
# Without a hybrid of its own every layer but the first and the classifier.
_INNER = ("layer*", "features.[!0]*", "features.0?", "classifier.[14]")

RESNET_18 = _named(
    "resnet-18",
    # Stem and first block are dense, and the 1x1 shortcuts.
    hybrid=("layer1.1.*", "layer[2-4].?.conv?"),
    dense=_RESIDUAL,
)
VGG_19 = _named("vgg-19", hybrid=(*_AFTER_NINE, "classifier.[14]"), dense=("classifier.6",))
RESNET_50 = _named("resnet-50", hybrid=("layer4.*",), dense=_RESIDUAL)
WRN_50_2 = _named("wrn-50-2", hybrid=("layer4.*",), dense=_RESIDUAL)
VIT = _named(
    "vit-cifar", hybrid=("blocks.*.qkv", "blocks.*.mlp.fc?"), dense=("patch_embed", "head")
)
GPT2 = _named("gpt2-wikitext2", hybrid=("blocks.[12].*",), dense=("head",), split=True)
LSTM = _named("lstm-wikitext2", hybrid=("lstm.*",), dense=("head",), split=True)
TRANSFORMER = _named("transformer-base", hybrid=("*coder.[1-5].*",), dense=("head",))

NETWORKS: Sequence[Network] = (
    *(_named(name, hybrid=_INNER, dense=("classifier.6",)) for name in ("vgg-11", "vgg-16")),
    VGG_19,
    RESNET_18,
    *(_named(f"resnet-{n}-cifar", hybrid=("layer4.*",), dense=_RESIDUAL) for n in (50, 101)),
    _named("wrn-28-10", hybrid=("layer[23].*",), dense=("stem", "*shortcut", "classifier")),
    RESNET_50,
    WRN_50_2,
    VIT,
    GPT2,
    LSTM,
    TRANSFORMER,
)

# As the FedLMT program has them.
_VGG_11 = _image("VGG-11, with biases", lambda: models.VGG(3, VGG_11, 10, bias=True), ("*.6",))
_VGG_16 = _image("VGG-16, with biases", lambda: models.VGG(3, VGG_16, 10, bias=True), ("*.6",))
_BASIC_101 = _image(
    "ResNet of 101's depths, basic blocks",
    lambda: models.ResNet(3, (64, 128, 256, 512), (3, 4, 23, 3), 10),
    _RESIDUAL,
)
_SHAKESPEARE = Network(
    "LSTM 8-256-256, 100 characters",
    lambda: (
        models.RecurrentLanguageModel(vocabulary=100, width=8, hidden=256, layers=2),
        torch.zeros(1, 64, dtype=torch.int64),
    ),
    ("lstm.*",),
    ("head",),
)
# 128 x 128 with a bias in front of the output, whose layer has a bias too.
_HIDDEN = ("a hidden layer in front of the output", _always(128 * 128 + 128))
_HIDDEN_LOW = ("a hidden layer in front of the output, rank 25", _always(25 * 256 + 128))
_OUTPUT_BIAS = ("the output's bias", _always(33_278))


def _fedlmt(
    network: Network,
    dense: tuple[str, str],
    low: tuple[str, str],
    *,
    both: Mapping[str, Sequence[Difference]],
    only_low: Mapping[str, Sequence[Difference]] | None = None,
    only_dense: Mapping[str, Sequence[Difference]] | None = None,
) -> list[Row]:
    quantities = ("parameters", "MACs")

    def differs(more: Mapping[str, Sequence[Difference]] | None) -> dict[str, list[Difference]]:
        return {q: [*both.get(q, ()), *(more or {}).get(q, ())] for q in quantities}

    def printed(figures: tuple[str, str]) -> dict[str, str]:
        return {q: f"{figure} M" for q, figure in zip(quantities, figures, strict=True)}

    make = partial(separable, network, 0.2)
    return [
        Row(network, "dense", None, printed(dense), differs(only_dense)),
        Row(network, "separable, 0.2", make, printed(low), differs(only_low)),
    ]


_EXTRA_LAYER = {
    "parameters": [(_EXTRA, _always(512 * 512 + 512))],
    "MACs": [(_EXTRA, _always(512 * 512))],
}
_COUNTED = {"MACs": [_NORMS]}
_COUNTED_POOL = {"MACs": [_NORMS, _POOL]}


def _pufferfish(
    network: Network,
    dense: Mapping[str, str],
    low: Mapping[str, str],
    differs: Mapping[str, Sequence[Difference]] | None = None,
    *,
    low_too: bool = False,
) -> list[Row]:
    differs = differs or {}
    make = partial(hybrid, network, 0.25)
    return [
        Row(network, "dense", None, dense, differs),
        Row(network, "hybrid, 1/4", make, low, differs if low_too else {}),
    ]


def _mnist(name: str, rank: int, stored: Sequence[str]) -> list[Row]:
    network = _named(name, hybrid=("hidden.*",), dense=("output",))

    def make(model: nn.Module) -> None:
        ranks = {layer: rank for layer in _matrices(model) if layer.startswith("hidden.")}
        rankwise.factorize(model, ranks, init="variance")

    return [
        Row(network, "dense", None, {"parameters": stored[0]}),
        Row(network, f"rank {rank}", make, {"parameters": stored[1]}),
    ]


def _dense(name: str, stored: str, macs: str = "") -> Row:
    published = {"parameters": stored, "MACs": macs}
    return Row(_named(name, hybrid=(), dense=()), "dense", None, published)


ROWS: Sequence[Row] = (
    *_pufferfish(
        RESNET_18,
        {"parameters": "11,173,834", "MACs": "0.56 G"},
        {"parameters": "3,336,138", "MACs": "0.22 G"},
        {"parameters": [("as much as one BatchNorm of 64 channels less", _always(-128))]},
        low_too=True,
    ),
    *_pufferfish(
        VGG_19,
        {"parameters": "20,560,330", "MACs": "0.4 G"},
        {"parameters": "8,370,634", "MACs": "0.29 G"},
    ),
    *_pufferfish(
        RESNET_50,
        {"parameters": "25,610,205"},
        {"parameters": "15,202,344"},
        {
            "parameters": [
                ("running statistics and counters", partial(_running_statistics, counters=True))
            ]
        },
    ),
    *_pufferfish(
        WRN_50_2,
        {"parameters": "68,951,464"},
        {"parameters": "40,047,400"},
        {"parameters": [("running statistics", partial(_running_statistics, counters=False))]},
    ),
    *_pufferfish(
        LSTM,
        {"parameters": "85,962,278"},
        {"parameters": "67,962,278"},
        {"parameters": [("one bias a layer instead of torch's two", _always(-2 * 6000))]},
        low_too=True,
    ),
    *_pufferfish(TRANSFORMER, {"parameters": "48,978,432"}, {"parameters": "26,696,192"}),
    *_fedlmt(
        GPT2,
        ("10.36", "390"),
        ("8.98", "302"),
        both={"parameters": [_OUTPUT_BIAS], "MACs": [_NORMS]},
        only_dense={
            "parameters": [_HIDDEN],
            "MACs": [(_HIDDEN[0], _always(64 * 128 * 128))],
        },
        only_low={
            "parameters": [_HIDDEN_LOW],
            "MACs": [(_HIDDEN_LOW[0], _always(64 * 25 * 256))],
        },
    ),
    *_fedlmt(VIT, ("9.52", "643"), ("3.22", "233"), both=_COUNTED),
    *_fedlmt(_VGG_11, ("9.76", "154"), ("4.01", "55.96"), both=_COUNTED, only_low=_EXTRA_LAYER),
    *_fedlmt(_VGG_16, ("15.25", "315"), ("6.21", "120"), both=_COUNTED, only_low=_EXTRA_LAYER),
    *_fedlmt(RESNET_18, ("11.17", "559"), ("4.42", "229"), both=_COUNTED_POOL),
    *_fedlmt(_BASIC_101, ("41.35", "2451"), ("16.46", "985"), both=_COUNTED_POOL),
    Row(
        _SHAKESPEARE,
        "dense",
        None,
        {"parameters": "0.825 M", "MACs": "1.638 M"},
        {"MACs": [("the LSTM itself is not seen", _always(-64 * 1024 * (8 + 3 * 256)))]},
    ),
    Row(_SHAKESPEARE, "all gates together, 0.2", partial(separable, _SHAKESPEARE, 0.2)),
    *_mnist("mlp-128x4", 16, ("167,818", "118,666")),
    *_mnist("mlp-512x8", 64, ("2,508,298", "935,434")),
    _dense("wrn-28-10", "36.5 M"),
    _dense("gpt2-124m", "124 M"),
)
