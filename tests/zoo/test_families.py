"""Every family selects the layers that its paper names, in each library's spelling, and nothing of
another architecture. The expected layers are written out here, by hand, from the papers' words.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankwise
from rankwise import models
from rankwise.errors import OptionError, SelectionError
from rankwise.ranks.automatic.families import FAMILIES, family

NAMES = {
    "resnet-18": [
        "resnet-18",
        "timm:resnet18",
        "torchvision:resnet18",
        "transformers:resnet?layer_type=basic&depths=2,2,2,2&hidden_sizes=64,128,256,512",
    ],
    "resnet-50": [
        "resnet-50",
        "resnet-50-cifar",
        "wrn-50-2",
        "timm:resnet50",
        "timm:wide_resnet50_2",
        "torchvision:resnet50",
        "torchvision:wide_resnet50_2",
        "transformers:resnet",
    ],
    "vgg-19": [
        "vgg-19",
        "timm:vgg19",
        "timm:vgg19_bn",
        "torchvision:vgg19",
        "torchvision:vgg19_bn",
    ],
    "deit": [
        "vit-cifar",
        "deit-small",
        "timm:deit_tiny_patch16_224",
        "timm:deit_base_patch16_224",
        "torchvision:vit_b_16",
        "transformers:deit",
        "transformers:vit",
        "transformers:DeiTForImageClassificationWithTeacher",
    ],
    "resmlp": ["resmlp-s12", "timm:resmlp_12_224", "timm:resmlp_36_224"],
    "bert": [
        "transformers:BertForSequenceClassification",
        "transformers:RobertaForSequenceClassification",
        "transformers:DistilBertForSequenceClassification",
        "transformers:ElectraForSequenceClassification",
        "transformers:MPNetForSequenceClassification",
        "transformers:BertModel",
    ],
}


def built(name: str) -> nn.Module:
    reference = models.SIZES[name].kind if name in models.SIZES else name
    pytest.importorskip(reference.partition(":")[0] if ":" in reference else "torch")
    with torch.device("meta"):
        return models.build(name)


def selected(name: str, kind: str) -> set[str]:
    """What a plan makes low-rank, at a ratio at which every layer gains."""
    model = built(name)
    return set(rankwise.plan(model, 1 / 16, **family(kind).choice(model)).ranks)


def stages(*numbers: int, form: str, blocks: int, parts: int) -> set[str]:
    """Convolutions of the main path of a residual network's stages, counted from 1."""
    if form == "transformers":
        return {
            f"resnet.encoder.stages.{stage - 1}.layers.{block}.layer.{part}.convolution"
            for stage in numbers
            for block in range(blocks)
            for part in range(parts)
        }
    return {
        f"layer{stage}.{block}.conv{part}"
        for stage in numbers
        for block in range(blocks)
        for part in range(1, parts + 1)
    }


@pytest.mark.parametrize("name", NAMES["resnet-18"])
def test_resnet_18_keeps_stem_first_stage_and_shortcuts(name: str) -> None:
    expected = stages(2, 3, 4, form=name.partition(":")[0], blocks=2, parts=2)
    assert len(expected) == 12
    assert selected(name, "resnet-18") == expected


@pytest.mark.parametrize("name", NAMES["resnet-50"])
def test_resnet_50_has_its_last_stage_low_rank_with_the_shortcut(name: str) -> None:
    library = name.partition(":")[0]
    shortcut = {
        "transformers": "resnet.encoder.stages.3.layers.0.shortcut.convolution",
        "timm": "layer4.0.downsample.0",
        "torchvision": "layer4.0.downsample.0",
    }.get(library, "layer4.0.shortcut.conv")
    expected = stages(4, form=library, blocks=3, parts=3) | {shortcut}
    assert len(expected) == 10
    assert selected(name, "resnet-50") == expected


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [
        ("vgg19", (10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)),
        ("vgg19_bn", (14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49)),
    ],
)
@pytest.mark.parametrize(
    ("library", "hidden"),
    [
        ("torchvision", {"classifier.0", "classifier.3"}),
        ("timm", {"pre_logits.fc1", "pre_logits.fc2"}),
    ],
)
def test_vgg_19_keeps_its_first_four_convolutions_and_the_classifier(
    library: str, hidden: set[str], name: str, convolutions: tuple[int, ...]
) -> None:
    expected = {f"features.{index}" for index in convolutions} | hidden
    assert selected(f"{library}:{name}", "vgg-19") == expected


def test_our_vgg_19_keeps_its_first_four_convolutions_and_the_last_layer() -> None:
    # Without a bias, but with a BatchNorm: as torchvision's vgg19_bn counts them.
    expected = {f"features.{index}" for index in (14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49)}
    assert selected("vgg-19", "vgg-19") == expected | {"classifier.1", "classifier.4"}


@pytest.mark.parametrize("name", NAMES["deit"])
def test_deit_keeps_the_output_of_its_attention(name: str) -> None:
    # The own ViT has timm's names, and half of DeiT's depth.
    library, depth = name.partition(":")[0], 6 if name == "vit-cifar" else 12
    if library == name:
        library = "timm"
    block, parts = {
        "timm": ("blocks.{}", ("attn.qkv", "mlp.fc1", "mlp.fc2")),
        "torchvision": (
            "encoder.layers.encoder_layer_{}",
            ("self_attention.in_proj", "mlp.0", "mlp.3"),
        ),
        "transformers": (
            ("vit" if name.endswith(":vit") else "deit") + ".layers.{}",
            *[(*(f"attention.{p}_proj" for p in "qkv"), "mlp.fc1", "mlp.fc2")],
        ),
    }[library]
    expected = {f"{block.format(index)}.{part}" for index in range(depth) for part in parts}
    assert selected(name, "deit") == expected


@pytest.mark.parametrize("name", NAMES["resmlp"])
def test_resmlp_keeps_the_mixing_of_tokens(name: str) -> None:
    depth = int(name.split("_")[1]) if ":" in name else int(name.removeprefix("resmlp-s"))
    expected = {
        f"blocks.{block}.mlp_channels.fc{part}" for block in range(depth) for part in (1, 2)
    }
    assert selected(name, "resmlp") == expected


@pytest.mark.parametrize("name", NAMES["bert"])
def test_bert_has_its_four_attention_matrices_low_rank_and_no_other(name: str) -> None:
    usual = tuple(f"attention.self.{part}" for part in ("query", "key", "value"))
    prefix, depth, parts = {
        "DistilBert": (
            "distilbert.transformer.layer",
            6,
            tuple(f"attention.{part}_lin" for part in ("q", "k", "v", "out")),
        ),
        "MPNet": ("mpnet.encoder.layer", 12, tuple(f"attention.attn.{part}" for part in "qkvo")),
        "Roberta": ("roberta.encoder.layer", 12, (*usual, "attention.output.dense")),
        "Electra": ("electra.encoder.layer", 12, (*usual, "attention.output.dense")),
        "Bert": ("bert.encoder.layer", 12, (*usual, "attention.output.dense")),
        "BertModel": ("encoder.layer", 12, (*usual, "attention.output.dense")),
    }[name.partition(":")[2].removesuffix("ForSequenceClassification")]
    expected = {f"{prefix}.{block}.{part}" for block in range(depth) for part in parts}
    assert selected(name, "bert") == expected


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, other) for kind in NAMES for other in ("mlp-512x2", "llama-tiny")),
        ("resnet-18", "timm:resnet50"),
        ("resnet-18", "torchvision:resnet34"),
        ("resnet-18", "transformers:resnet"),
        ("resnet-18", "resnet-34"),
        ("resnet-18", "wrn-28-10"),
        ("vgg-19", "vgg-16"),
        ("resnet-50", "resnet-18"),
        ("resnet-50", "timm:resnet18"),
        ("vgg-19", "torchvision:vgg16"),
        ("vgg-19", "torchvision:densenet121"),
        ("vgg-19", "timm:mobilenetv2_100"),
        ("deit", "timm:swin_tiny_patch4_window7_224"),
        ("deit", "timm:resmlp_12_224"),
        ("deit", "transformers:wav2vec2"),
        ("deit", "transformers:clip"),
        ("resmlp", "timm:mixer_b16_224"),
        ("resmlp", "timm:deit_tiny_patch16_224"),
        ("bert", "transformers:gpt2"),
        ("bert", "transformers:swin"),
        ("bert", "transformers:vit"),
    ],
)
def test_a_family_refuses_another_architecture(kind: str, name: str) -> None:
    model = built(name)
    assert not family(kind).fits(model)
    with pytest.raises(SelectionError, match=type(model).__name__):
        family(kind).choice(model)


def test_the_refusal_names_the_family_that_fits() -> None:
    with pytest.raises(SelectionError) as caught:
        family("resnet-50").choice(built("resnet-18"))
    message = str(caught.value)
    assert "48 layers 'layer?.*.conv?' (it has 16)" in message
    assert "it is one for resnet-18" in message


@pytest.mark.parametrize(("name", "kind"), [("vgg-19", "vgg-19"), ("vit-cifar", "deit")])
def test_cuttlefish_as_published_watches_the_layers_of_the_family(name: str, kind: str) -> None:
    model = models.build(name)
    method = rankwise.Cuttlefish(compat=kind, gains="none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rankwise.start(
        model, method, optimizer, steps_per_epoch=10, total_steps=100, sample=models.sample(name)
    )
    assert method.plan is not None
    watched = {
        layer.name for layer in method.plan.layers if layer.reason == method.plan.provisional
    }
    assert watched == selected(name, kind)


def test_the_numbers_of_the_papers() -> None:
    numbers = {
        name: (entry.floor, entry.constants, entry.lr_factor) for name, entry in FAMILIES.items()
    }
    assert numbers == {
        "resnet-18": (0, "cifar", 1),
        "vgg-19": (0, "cifar", 1),
        "resnet-50": (1 / 5, "imagenet", 1),
        "deit": (1 / 2, "transformer", 1 / 3),
        "resmlp": (1 / 2, "transformer", 1 / 3),
        "bert": (0, "transformer", 2),
    }
    bert = family("bert")
    assert (bert.ratio, bert.warmup_epochs, bert.lr) == (0.45, 1, 2e-5)
    assert all(entry.ratio is None for name, entry in FAMILIES.items() if name != "bert")
    assert set(NAMES) == set(FAMILIES)


def test_bert_at_ratio_0_45_is_as_large_as_by_hand() -> None:
    # 12 layers of four 768 x 768 matrices at rank 0.45 * 768 = 345.6, to a multiple of 8.
    model = built("transformers:BertForSequenceClassification")
    ratio = family("bert").ratio
    assert ratio is not None
    plan = rankwise.plan(model, ratio, **family("bert").choice(model))
    assert set(plan.ranks.values()) == {344}
    dense = sum(p.numel() for p in model.parameters())
    assert plan.parameters[1] == dense - 12 * 4 * (768 * 768 - 2 * 768 * 344)


def test_an_unknown_family_is_answered_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="unknown family 'resnet18'; did you mean 'resnet-18'"):
        family("resnet18")


def test_a_model_of_a_family_that_is_low_rank_already_is_refused() -> None:
    model = models.build("resnet-18")
    rankwise.factorize(model, 0.25, **family("resnet-18").choice(model))
    with pytest.raises(SelectionError, match="it has 4"):
        family("resnet-18").choice(model)
