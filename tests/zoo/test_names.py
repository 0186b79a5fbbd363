"""Networks of timm and torchvision by name: what they read, and what a name may change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankwise import models
from rankwise.errors import OptionError


@pytest.fixture(autouse=True)
def libraries() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")


def stored(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "shape"),
    [
        # The tables of torchvision and timm: 25.557 M, 304.3 M, 7.98 M, 86.6 M, 27.2 M.
        ("timm:resnet50", 25_557_032, (3, 224, 224)),
        ("timm:resnet50.a1_in1k", 25_557_032, (3, 224, 224)),
        ("timm:vit_large_patch16_224", 304_326_632, (3, 224, 224)),
        ("torchvision:resnet50", 25_557_032, (3, 224, 224)),
        ("torchvision:vit_l_16", 304_326_632, (3, 224, 224)),
        ("torchvision:densenet121", 7_978_856, (3, 224, 224)),
        ("torchvision:inception_v3", 23_834_568, (3, 299, 299)),
    ],
)
def test_a_name_builds_the_published_network(name, parameters, shape):
    entry = models.find(name)
    assert (entry.task, entry.classes, entry.input_shape) == ("classification", 1000, shape)
    with torch.device("meta"):
        assert stored(models.build(name)) == parameters
    sample = models.sample(name)
    assert isinstance(sample, torch.Tensor)
    assert sample.shape == (1, *shape)


@pytest.mark.parametrize(
    "name",
    [
        "timm:deit_tiny_patch16_224?depth=1&embed_dim=16&num_heads=2&patch_size=4",
        "timm:test_resnet",
        "timm:test_efficientnet",
    ],
)
def test_timm_takes_the_shape_and_classes_of_the_data(name):
    model = models.build(name, classes=7, input_shape=(1, 28, 28))
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert model(noise).shape == (2, 7)


def test_torchvision_takes_the_size_and_classes_of_the_data_but_reads_colours():
    model = models.build("torchvision:squeezenet1_1", classes=7, input_shape=(3, 32, 32))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    model = models.build("torchvision:vit_b_16", classes=7, input_shape=(3, 32, 32))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    with pytest.raises(OptionError, match="3 channels, not 1; timm's take any number"):
        models.build("torchvision:squeezenet1_1", input_shape=(1, 32, 32))


def test_an_auxiliary_classifier_is_off_so_that_training_sees_one_output():
    model = models.build("torchvision:googlenet", classes=3, input_shape=(3, 64, 64)).train()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:resnet51", "the closest are resnet51q, resnet50"),
        ("timm:resnet50?drop_rat=0.1", "unknown key 'drop_rat'; the closest are drop_rate"),
        ("timm:resnet50?pretrained=true", "unknown key 'pretrained'"),
        ("timm:resnet50?block=x", "unknown key 'block'"),
        ("timm:resnet50?num_classes=ten", "num_classes='ten' must be a whole number"),
        ("timm:resnet50?layers=true", "cannot be built with"),
        ("torchvision:resnt50", "the closest are resnet50"),
        ("torchvision:resnet50?weights=DEFAULT", "unknown key 'weights'"),
        ("torchvision:resnet50?num_classes=[3]", "num_classes=[3] must be a whole number"),
        ("torchvision:fasterrcnn_resnet50_fpn", "unknown torchvision network"),
    ],
)
def test_a_mistake_is_answered_in_one_line(name, words):
    with pytest.raises(OptionError) as caught:
        models.build(name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_name_and_the_data_must_not_disagree():
    with pytest.raises(OptionError, match=r"its name says num_classes=3, but 7 is asked for"):
        models.build("timm:test_resnet?num_classes=3", classes=7)
    with pytest.raises(OptionError, match="reads images"):
        models.build("timm:test_resnet", input_shape=(10,))


def test_lists_are_filtered_by_a_glob():
    assert "timm:resnet50" in models.listed("timm:resnet5*")
    assert "torchvision:vit_l_16" in models.listed("torchvision:")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("timm:resnet50?layers=1,2,1,1", {}),
        ("timm:wide_resnet50_2?layers=1,2,1,1", {"inner": (128, 256, 512, 1024)}),
        ("timm:resnet18?layers=1,2,1,1", {"widths": (64, 128, 256, 512), "inner": None}),
    ],
)
def test_our_residual_networks_give_the_scores_of_timm(name, changes):
    sizes = {"widths": (256, 512, 1024, 2048), "inner": (64, 128, 256, 512), **changes}
    large = {"stem": 64, "stem_kernel": 7, "stem_stride": 2, "pool": True}
    ours = models.ResNet(3, blocks=(1, 2, 1, 1), classes=7, **sizes, **large).eval()
    theirs = models.build(name, classes=7).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in theirs.state_dict().values():  # running statistics too; variances above zero
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=generator).div_(max(1, tensor[0].numel()) ** 0.5)
    # Both register their layers in the order of the forward, shortcuts last.
    pairs = zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True)
    ours.load_state_dict({key: value for (key, _), value in pairs})
    x = torch.randn(2, 3, 65, 64, generator=generator)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
