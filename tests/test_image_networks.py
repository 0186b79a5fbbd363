"""VGG, residual networks and vision Transformers: their arithmetic, sizes and first weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import rankwise
from rankwise import models
from rankwise.errors import OptionError
from rankwise.models.vgg import POOL, VGG
from rankwise.models.vit import ViT
from rankwise.models.wide_resnet import WideResNet

COLOUR = (3, 32, 32)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def built(name: str, **how: Any) -> Any:  # modules by attribute
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.build(name, **how)


def stored(name: str, **how: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in built(name, **how).parameters())


def vgg_parameters(*widths: int) -> int:
    """Convolutions without bias, two numbers of BatchNorm a channel, a classifier of 512."""
    pairs = zip((3, *widths), widths, strict=False)
    convolutions = sum(9 * before * after + 2 * after for before, after in pairs)
    return convolutions + 2 * (512 * 512 + 512) + 512 * 10 + 10


def wide_parameters(depth: int, wide: int) -> int:
    """Norms before each convolution, projections without a norm of their own."""
    count, inputs, total = (depth - 4) // 6, 16, 27 * 16
    for width in (16 * wide, 32 * wide, 64 * wide):
        total += 9 * inputs * width + 9 * width**2 + 2 * inputs + 2 * width + inputs * width
        total += (count - 1) * (18 * width**2 + 4 * width)
        inputs = width
    return total + 2 * inputs + 10 * inputs + 10


VGG_19_WIDTHS = (64, 64, 128, 128, *(256,) * 4, *(512,) * 8)


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("vgg-11", vgg_parameters(64, 128, 256, 256, *(512,) * 4)),
        ("vgg-16", vgg_parameters(64, 64, 128, 128, *(256,) * 3, *(512,) * 6)),
        ("vgg-19", vgg_parameters(*VGG_19_WIDTHS)),
        # As published: 36.5 million (1605.07146, table 4).
        ("wrn-28-10", wide_parameters(28, 10)),
        (
            "vit-cifar",
            # Patches, positions, class token; six blocks; last norm and classifier.
            (48 * 512 + 512)
            + (65 + 1) * 512
            + 6 * (4 * 512**2 + 512 + 2 * (512**2 + 512) + 4 * 512)
            + (2 * 512 + 5130),
        ),
    ],
)
def test_each_network_stores_the_parameters_counted_by_hand(name: str, by_hand: int) -> None:
    assert stored(name, input_shape=COLOUR) == by_hand


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # torchvision's tables: 25,557,032 and so on, at 1000 classes.
        ("resnet-50", 25_557_032),
        ("resnet-101", 44_549_160),
        ("resnet-152", 60_192_808),
        ("wrn-50-2", 68_883_240),
        ("gpt2-124m", 124_439_808),
    ],
)
def test_networks_at_their_usual_size_store_the_published_parameters(
    name: str, published: int
) -> None:
    assert stored(name) == published


def test_the_cifar_form_of_a_bottleneck_network_differs_in_stem_and_classifier_alone() -> None:
    small, large = stored("resnet-50-cifar"), stored("resnet-50")
    assert small - large == (9 - 49) * 3 * 64 + (10 - 1000) * (2048 + 1)
    assert stored("resnet-101-cifar") == 42_512_970
    assert stored("resnet-34", input_shape=COLOUR) == 21_282_122


@pytest.mark.parametrize("shape", [(1, 7, 9), (3, 16, 16), (1, 28, 28), (2, 33, 32)])
@pytest.mark.parametrize("name", ["vgg-small", "resnet-small", "resnet-50", "wrn-28-10"])
def test_convolutional_networks_read_images_of_any_size(name: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = built(name, classes=1, input_shape=shape)
        assert model(torch.empty(2, *shape)).shape == (2, 1)


def test_a_wide_block_normalises_first_and_projects_the_activated_input() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = WideResNet(2, depth=16, wide=1, classes=3, dropout=0.5).eval()

    def active(norm: nn.BatchNorm2d, y: torch.Tensor) -> torch.Tensor:
        # Running statistics are those of the start: mean 0, variance 1.
        return F.relu(y / (1 + norm.eps) ** 0.5 * norm.weight[:, None, None])

    x = y = noise(2, 2, 9, 8)
    y = F.conv2d(y, model.stem.weight, padding=1)
    for stage, stride in ((model.layer1, 1), (model.layer2, 2), (model.layer3, 2)):
        for index, block in enumerate(stage):
            step = stride if index == 0 else 1
            inside = active(block.norm1, y)
            beside = y
            if block.shortcut is not None:
                beside = F.conv2d(inside, block.shortcut.weight, stride=step)
            inside = F.conv2d(inside, block.conv1.weight, stride=step, padding=1)
            inside = F.conv2d(active(block.norm2, inside), block.conv2.weight, padding=1)
            y = beside + inside
    assert [block.shortcut is None for block in model.layer1] == [True, True]
    assert model.layer2[0].shortcut is not None
    y = model.classifier(active(model.norm, y).mean(dim=(2, 3)))
    assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.train()(x), model(x))  # dropout


@pytest.mark.parametrize("depth", [4, 27, 3])
def test_a_depth_that_no_wide_network_has_is_refused(depth: int) -> None:
    with pytest.raises(OptionError, match=f"depth={depth}, wide=1; the depth is 6 n"):
        WideResNet(3, depth=depth, wide=1, classes=2)


def test_vgg_is_convolution_norm_relu_pool_mean_and_classifier() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = VGG(2, (4, POOL, 6, POOL), 3, hidden=5, bias=True).eval()
    conv1, norm1, _, _, conv2, norm2, *_ = model.features
    nn.init.uniform_(norm1.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    x = noise(2, 2, 8, 8)
    y = x
    for conv, norm in ((conv1, norm1), (conv2, norm2)):
        y = F.conv2d(y, conv.weight, conv.bias, padding=1) / (1 + 1e-5) ** 0.5
        y = F.relu(y * norm.weight[:, None, None] + norm.bias[:, None, None])
        y = y.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax(dim=(3, 5))
    y = y.mean(dim=(2, 3))
    first, second, last = (m for m in model.classifier if isinstance(m, nn.Linear))
    y = last(F.relu(second(F.relu(first(y)))))
    assert_close(model(x), y, rtol=1e-4, atol=1e-5)


def test_a_vision_transformer_is_torchs_encoder_with_these_weights() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"patch": 4, "width": 12, "layers": 2, "heads": 3, "hidden": 20, "classes": 5}
        model: Any = ViT(2, (8, 12), **sizes).eval()
        layer = nn.TransformerEncoderLayer(
            12, 3, 20, activation="gelu", norm_first=True, batch_first=True, dropout=0.0
        )
        encoder: Any = nn.TransformerEncoder(
            layer, 2, norm=nn.LayerNorm(12), enable_nested_tensor=False
        )
        for parameter in model.parameters():  # biases and norms too
            nn.init.normal_(parameter, std=0.2)
    for block, other in zip(model.blocks, encoder.layers, strict=True):
        state = {
            "self_attn.in_proj_weight": block.attn.qkv.weight,
            "self_attn.in_proj_bias": torch.zeros(36),
            "self_attn.out_proj": block.attn.proj,
            "linear1": block.mlp.fc1,
            "linear2": block.mlp.fc2,
            "norm1": block.norm1,
            "norm2": block.norm2,
        }
        flat = {
            f"{name}.{key}" if key else name: value
            for name, held in state.items()
            for key, value in (
                held.state_dict().items() if isinstance(held, nn.Module) else [("", held)]
            )
        }
        other.load_state_dict(flat)
    encoder.norm.load_state_dict(model.norm.state_dict())
    x = noise(2, 2, 8, 12)
    # Patches row by row, each flattened as a kernel is: channel, row, column.
    patches = x.unflatten(2, (2, 4)).unflatten(4, (3, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    kernel = model.patch_embed.weight.flatten(1)
    tokens = patches.flatten(1, 2) @ kernel.T + model.patch_embed.bias
    tokens = torch.cat((model.cls_token.expand(2, -1, -1), tokens), dim=1) + model.pos_embed
    expected = model.head(encoder(tokens)[:, 0])
    assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("vit-cifar", (3, 30, 32), "images of 30x32 cannot be cut into patches of 4x4"),
        ("vit-mini", (1, 28, 27), "images of 28x27 cannot be cut into patches of 7x7"),
        ("vit-cifar", (784,), r"a vision Transformer reads images .* not inputs of shape \(784,\)"),
        ("vgg-16", (28, 28), r"a VGG network reads images .* not inputs of shape \(28, 28\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        models.build(name, input_shape=shape)


def test_a_vision_transformer_refuses_images_of_another_size_than_it_was_built_for() -> None:
    model = built("vit-mini", input_shape=(1, 28, 28))
    with pytest.raises(OptionError, match=r"images of 32x32, but .* positions for 28x28"):
        model(noise(1, 1, 32, 32))


def test_sizes_that_do_not_fit_each_other_are_refused() -> None:
    usual = {"patch": 4, "width": 8, "layers": 1, "heads": 2, "hidden": 8, "classes": 2}
    for change, words in (
        ({"heads": 3}, "width=8 cannot be shared out over heads=3"),
        ({"heads": 0}, "heads=0"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"patch": 0}, "patches of 0x0"),
    ):
        with pytest.raises(OptionError, match=words):
            ViT(1, (8, 8), **{**usual, **change})


def test_the_first_weights_have_the_variances_of_their_papers() -> None:
    vgg, vit = built("vgg-11"), built("vit-cifar")
    wide = WideResNet(3, depth=10, wide=4, classes=10)
    expected = {
        (vgg, "features.8"): (2 / (256 * 9)) ** 0.5,  # 2 / fan_out
        (vgg, "classifier.1"): (2 / 512) ** 0.5,
        (vgg, "classifier.6"): (1 / 512) ** 0.5,
        # Glorot: 2 / (fan_in + fan_out), each of query, key and value for itself.
        (wide, "layer3.0.conv2"): (2 / (256 * 9)) ** 0.5,
        (vit, "blocks.3.attn.qkv"): (2 / 1024) ** 0.5,
        (vit, "blocks.5.mlp.fc2"): (2 / 1024) ** 0.5,
        (vit, "patch_embed"): (1 / 48) ** 0.5,
        (vit, "head"): 0.02,
    }
    for (model, name), deviation in expected.items():
        weight = model.get_parameter(f"{name}.weight")
        assert_close(weight.std(), torch.tensor(deviation), rtol=0.03, atol=0, msg=name)
    for model in (vgg, vit):
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
    for model in (vgg, vit):
        scores = model(noise(8, *COLOUR))
        assert 0.05 < float(scores.detach().std()) < 5  # neither vanishes nor explodes on the way


@pytest.mark.parametrize("name", ["vgg-small", "vit-mini"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_channels_last_give_the_same_scores(
    name: str, dtype: torch.dtype
) -> None:
    model = built(name, input_shape=(3, 16, 16)).eval()
    x = noise(2, 3, 16, 16)
    expected = model(x).detach()
    last = model.to(memory_format=torch.channels_last)
    assert_close(last(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
    assert_close(model.to(dtype)(x.to(dtype)).float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["vgg-small", "vit-mini"])
def test_full_rank_is_dense_and_the_way_back_too(name: str) -> None:
    model = built(name, input_shape=(3, 16, 16)).eval()
    x = noise(2, 3, 16, 16)
    expected, shapes = model(x).detach(), {n: p.shape for n, p in model.named_parameters()}
    full = {
        name: min(len(module.weight), module.weight[0].numel())
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    rankwise.factorize(model, full)
    assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    rankwise.to_dense(model)
    assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
