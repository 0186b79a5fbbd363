"""The layers that Cuttlefish (arXiv 2305.02538) makes low-rank in each kind of network, as data.

A family names layers by globs in every spelling that it has in torchvision, timm, transformers and
this package, and holds the numbers that the paper and its program set by hand. With measured gains
none of it is needed; it is for repeating the paper, and for fine-tuning, where nothing is measured.

Never low-rank in any family: stem or patch embedding, classifier, embeddings, biases and norms.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from rankwise.candidates import survey
from rankwise.errors import OptionError, SelectionError, unknown

_PAPER = "Cuttlefish, arXiv 2305.02538"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of network: which layers become low-rank, and the paper's numbers for it.

    Attributes:
        rule: the choice in words.
        layers: globs over layer names that become low-rank, of all spellings; or "auto" alone.
        marks: globs over layer names that tell the architecture, with how many layers each has to
            match, 0 for any number from 1; one of them has to hold.
        exclude: globs over layer names that stay dense, of all spellings.
        keep_first: first layers that stay dense (K); counts with "auto" only.
        keep_last: likewise the last.
        floor: least rank, as a ratio of the full rank, where ranks are measured; 0 for none.
        ratio: rank over full rank where the paper does not measure ranks; else None.
        constants: which set of the paper's detector constants: cifar, imagenet or transformer.
        warmup_epochs: dense epochs where the paper does not measure the switch; else None.
        lr: learning rate before the switch where the paper fixes one; else None.
        lr_factor: learning rate after the switch, times this.
        source: where the rule comes from.
    """

    rule: str
    layers: tuple[str, ...]
    marks: Mapping[str, int]
    exclude: tuple[str, ...] = ()
    keep_first: int = 0
    keep_last: int = 0
    floor: float = 0.0
    ratio: float | None = None
    constants: str = "cifar"
    warmup_epochs: float | None = None
    lr: float | None = None
    lr_factor: float = 1.0
    source: str = _PAPER

    def fits(self, model: nn.Module) -> bool:
        """Whether a model has the layers that tell this architecture."""
        names = list(survey(model))
        return any(_holds(count, names, glob) for glob, count in self.marks.items())

    def choice(self, model: nn.Module) -> dict[str, Any]:
        """The layers of a model, as methods and `rankwise.plan` take them.

        Args:
            model: any model that is still dense, also on the meta device.

        Returns:
            `layers` and `exclude`, the globs that match this model; `keep_first`, `keep_last`.

        Raises:
            SelectionError: the model is of another architecture, or none of the layers is there.

        Example:
            >>> from rankwise import models
            >>> FAMILIES["resnet-18"].choice(models.build("resnet-18"))["layers"]
            ['layer[2-4].*']
        """
        if not self.fits(model):
            raise SelectionError(
                f"{type(model).__name__} is not what this family is for ({self.rule}): "
                f"{self._missing(model)}; {_others(model)}choose layers by globs, or leave it to "
                "the measured gains"
            )
        chosen = self.layers if self.layers == ("auto",) else _matching(model, self.layers)
        if not chosen:
            raise SelectionError(
                f"no layer of {type(model).__name__} is one of {', '.join(self.layers)}; name "
                "its layers by globs"
            )
        return {
            "layers": "auto" if chosen == ("auto",) else list(chosen),
            "exclude": list(_matching(model, self.exclude)),
            "keep_first": self.keep_first,
            "keep_last": self.keep_last,
        }

    def _missing(self, model: nn.Module) -> str:
        names = list(survey(model))
        found = {glob: len(fnmatch.filter(names, glob)) for glob in self.marks}
        wanted = [
            f"{count or 'some'} layers {glob!r} (it has {found[glob]})"
            for glob, count in self.marks.items()
        ]
        return f"that has {' or '.join(wanted)}"


def family(name: str) -> Family:
    """A family by its name.

    Raises:
        OptionError: an unknown one, with the nearest.
    """
    if name not in FAMILIES:
        raise OptionError(unknown("family", name, FAMILIES))
    return FAMILIES[name]


def _holds(count: int, names: list[str], glob: str) -> bool:
    found = len(fnmatch.filter(names, glob))
    return found == count if count else found > 0


def _matching(model: nn.Module, globs: Iterable[str]) -> tuple[str, ...]:
    """The globs that match a layer; an attention is asked for each spelling on its own."""
    return tuple(glob for glob in globs if fnmatch.filter(survey(model, layers=[glob]), glob))


def _others(model: nn.Module) -> str:
    fitting = [name for name, entry in FAMILIES.items() if entry.fits(model)]
    return f"it is one for {', '.join(fitting)}; " if fitting else ""


# Names of torchvision, timm and this package first, then those of transformers.
FAMILIES: Mapping[str, Family] = {
    "resnet-18": Family(
        rule="ResNet-18 for CIFAR and SVHN: the 3x3 convolutions of stages 2 to 4; dense are stem, "
        "stage 1 and every 1x1 shortcut",
        layers=("layer[2-4].*", "*encoder.stages.[1-3].*"),
        exclude=("layer?.0.downsample.0", "layer?.0.shortcut.conv", "*.shortcut.convolution"),
        marks={"layer?.*.conv?": 16, "*encoder.stages.?.layers.?.layer.?.convolution": 16},
        constants="cifar",
    ),
    "vgg-19": Family(
        rule="VGG-19: all convolutions but the first four, and the hidden layers of the "
        "classifier (the published sizes hold them low-rank); its last layer is dense",
        layers=("auto",),
        marks={"features.*": 16},
        keep_first=4,
        keep_last=1,
        constants="cifar",
    ),
    "resnet-50": Family(
        rule="ResNet-50 and Wide ResNet-50-2 for ImageNet: stage 4 whole, with its 1x1 "
        "convolutions and its shortcut; everything before is dense",
        layers=("layer4.*", "*encoder.stages.3.*"),
        marks={"layer?.*.conv?": 48, "*encoder.stages.?.layers.?.layer.?.convolution": 48},
        floor=1 / 5,
        constants="imagenet",
    ),
    "deit": Family(
        rule="DeiT and ViT: query, key and value (one matrix where the model holds them as one) "
        "and both layers of every MLP; the attention's output is dense",
        layers=(
            "blocks.*.attn.qkv",
            "blocks.*.mlp.fc[12]",
            "encoder.layers.*.self_attention.in_proj",
            "encoder.layers.*.mlp.[03]",
            "*it.layers.*.attention.[qkv]_proj",
            "*it.layers.*.mlp.fc[12]",
        ),
        marks={
            "blocks.*.attn.qkv": 0,
            "encoder.layers.*.self_attention.q": 0,
            "vit.layers.*.attention.q_proj": 0,
            "deit.layers.*.attention.q_proj": 0,
        },
        floor=1 / 2,
        constants="transformer",
        lr_factor=1 / 3,
    ),
    "resmlp": Family(
        rule="ResMLP: both layers of every channel MLP; the mixing of tokens is dense",
        layers=("blocks.*.mlp_channels.fc[12]",),
        marks={"blocks.*.linear_tokens": 0},
        floor=1 / 2,
        constants="transformer",
        lr_factor=1 / 3,
    ),
    "bert": Family(
        rule="BERT and its kin, fine-tuned: query, key, value and output of every attention at "
        "ratio 0.45 after one dense epoch; the learning rate doubles then",
        layers=(
            "*encoder.layer.*.attention.self.query",
            "*encoder.layer.*.attention.self.key",
            "*encoder.layer.*.attention.self.value",
            "*encoder.layer.*.attention.output.dense",
            "*transformer.layer.*.attention.*_lin",
            "*encoder.layer.*.attention.attn.[qkvo]",
        ),
        marks={
            "*encoder.layer.*.attention.self.query": 0,
            "*transformer.layer.*.attention.q_lin": 0,
            "*encoder.layer.*.attention.attn.q": 0,
        },
        ratio=0.45,
        constants="transformer",
        warmup_epochs=1.0,
        lr=2e-5,
        lr_factor=2.0,
    ),
}
