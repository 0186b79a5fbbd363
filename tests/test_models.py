"""The networks of the registry: their size by hand, their names, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankwise.errors import OptionError
from rankwise.models import MLP, MODELS, build, sample

IMAGE = (1, 28, 28)
CLASSIFIERS = [name for name, entry in MODELS.items() if entry.task == "classification"]


def block(inputs: int, outputs: int) -> int:
    """Parameters of a basic block by hand: convolutions, norms, and a projection if it changes."""
    projection = 0 if inputs == outputs else inputs * outputs + 2 * outputs
    return 9 * inputs * outputs + 9 * outputs * outputs + 4 * outputs + projection


def stored(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("mlp-512x2", IMAGE, 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10),
        ("mlp-128x4", IMAGE, 167_818),
        ("mlp-512x8", IMAGE, 2_508_298),
        ("resnet-18", (3, 32, 32), 11_173_962),
        (
            "resnet-small",
            IMAGE,
            9 * 64
            + 2 * 64
            + block(64, 64)
            + block(64, 128)
            + block(128, 128)
            + block(128, 256)
            + block(256, 256)
            + 256 * 10
            + 10,
        ),
    ],
)
def test_each_model_stores_the_parameters_counted_by_hand(
    name: str, shape: tuple[int, ...], parameters: int
) -> None:
    assert stored(build(name, input_shape=shape)) == parameters


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize(("shape", "classes"), [(IMAGE, 10), ((3, 16, 32), 7)])
def test_every_model_maps_its_input_shape_to_one_score_a_class(
    name: str, shape: tuple[int, ...], classes: int
) -> None:
    with torch.device("meta"):
        model = build(name, classes=classes, input_shape=shape)
        assert model(torch.empty(2, *shape)).shape == (2, classes)
        usual = sample(name)
        assert isinstance(usual, torch.Tensor)
        assert build(name)(usual.to("meta")).shape == (1, MODELS[name].classes)


# One of each architecture.
SMALL = ("mlp-128x4", "resnet-small", "vgg-small", "vit-mini")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("shape", "classes"), [(IMAGE, 10), ((3, 16, 32), 1)])
def test_every_parameter_gets_a_gradient(name: str, shape: tuple[int, ...], classes: int) -> None:
    model = build(name, classes=classes, input_shape=shape)
    scores = model(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    scores.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_same_weights(name: str) -> None:
    weights = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            weights.append(build(name).state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=0)


def test_names_read_well_in_a_plan() -> None:
    small = [n for n, m in build("resnet-small").named_modules() if isinstance(m, nn.Conv2d)]
    assert small[:4] == ["stem", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1"]
    assert "layer2.0.shortcut.conv" in small
    assert "layer2.1.shortcut.conv" not in small
    linear = [n for n, m in build("mlp-128x4").named_modules() if isinstance(m, nn.Linear)]
    assert linear == ["input", "hidden.0", "hidden.1", "hidden.2", "hidden.3", "output"]


def test_convolutions_start_with_the_variance_of_kaiming_fan_out() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build("resnet-small")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            expected = torch.tensor((2 / fan_out) ** 0.5)
            torch.testing.assert_close(
                module.weight.detach().std(), expected, rtol=0.03, atol=0, msg=name
            )
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()


def test_mlp_is_its_matrix_products_and_relu() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MLP(6, (5, 4), 3)
    x = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(1))
    hidden = model.hidden[0]
    assert isinstance(hidden, nn.Linear)
    first = (x.reshape(7, 6) @ model.input.weight.T + model.input.bias).clamp(min=0)
    second = (first @ hidden.weight.T + hidden.bias).clamp(min=0)
    expected = second @ model.output.weight.T + model.output.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp-128x4", "resnet-small"])
def test_models_compile_without_a_graph_break(name: str) -> None:
    model = build(name).eval()
    x = torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_an_unknown_model_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(OptionError, match=r"unknown model 'resnet18'; did you mean 'resnet-18'"):
        build("resnet18")


@pytest.mark.parametrize("name", ["resnet-18", "resnet-small"])
def test_a_residual_network_refuses_what_is_not_an_image(name: str) -> None:
    with pytest.raises(OptionError, match=r"reads images .* not inputs of shape \(784,\)"):
        build(name, input_shape=(784,))


def test_a_shape_without_elements_and_no_class_are_refused() -> None:
    with pytest.raises(OptionError, match=r"input_shape=\(1, 0\) has no elements"):
        build("mlp-128x4", input_shape=(1, 0))
    with pytest.raises(OptionError, match="at least 1 class"):
        build("mlp-128x4", classes=0)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_described_in_one_line(name: str) -> None:
    description = MODELS[name].description
    assert description
    assert "\n" not in description
    assert len(description) < 90
