"""Adapters of PEFT, against PEFT itself: the same outputs there and here, both ways."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankwise
from rankwise.errors import CheckpointError, PlanError
from rankwise.layers import adapted_layers
from rankwise.models.from_transformers import hide_broken_torchvision
from rankwise.updates import Opening

hide_broken_torchvision()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    peft: Any = pytest.importorskip("peft")
transformers: Any = pytest.importorskip("transformers")

# What it says of convolutions with groups, of Conv1D, and of embeddings outside transformers.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


class Net(nn.Module):
    """Every kind of layer that both can adapt, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, 8, 3, stride=2, groups=2, bias=False)
        self.norm = nn.LayerNorm(8)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 10), "out": nn.Linear(10, 6)})
        self.fc = nn.Linear(6, 5)  # its name ends that of the other

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mT
        x = self.grouped(self.conv(x).tanh()).mT
        x = self.block["out"](self.block["fc"](self.norm(x)).tanh())
        return self.fc(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


TOKENS = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(2))
ALL = ("embed", "conv", "grouped", "block.fc", "block.out")


def trained_(model: nn.Module, seed: int = 1) -> None:
    """Every update as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for parameter in layer.heads.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


def adapted(opening: Opening, layers: Any, model: Any = None) -> Any:
    """With open updates as after some training, and nothing else that learns."""
    model = net() if model is None else model
    model.requires_grad_(False)
    rankwise.adapt(model, opening, layers)
    trained_(model)
    return model


def in_peft(base: nn.Module, directory: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, str(directory)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=12, n_head=2, vocab_size=20, n_positions=16, n_inner=20
    )
    return transformers.GPT2LMHeadModel(config).eval()


# rank 3 of the groups of a convolution is 6 in PEFT: it needs rank_pattern, alpha_pattern
@pytest.mark.parametrize(
    "opening",
    [
        Opening(rank=3, scale=0.7),
        Opening(rank=2, heads=3),
        Opening(rank=3, scale=4.0, diagonal=True),
    ],
)
def test_an_exported_adapter_has_the_same_outputs_in_peft(opening: Opening, tmp_path: Path) -> None:
    model = adapted(opening, ALL)
    rankwise.export_peft(model, tmp_path)
    there = in_peft(net(), tmp_path)
    assert (there(TOKENS) - net()(TOKENS)).abs().max() > 0.1
    torch.testing.assert_close(there(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)
    assert not hasattr(there.base_model.model.fc, "lora_A")
    back = net()
    rankwise.import_peft(back, tmp_path)
    torch.testing.assert_close(back(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_half_precision(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """Equal to its rounding in PEFT, which computes updates in float32; exactly the same here."""
    model = adapted(Opening(rank=2, dtype=dtype), ["block.*", "conv"], net().bfloat16())
    rankwise.export_peft(model, tmp_path)
    there = in_peft(net().bfloat16(), tmp_path)
    torch.testing.assert_close(there(TOKENS), model(TOKENS), rtol=0.02, atol=0.01)
    back = net().bfloat16()
    rankwise.import_peft(back, tmp_path)
    torch.testing.assert_close(back(TOKENS), model(TOKENS), rtol=0, atol=0)


def test_an_update_that_was_merged_in_part_is_exported_without_that_part(tmp_path: Path) -> None:
    model = adapted(Opening(rank=2, heads=2, anchored=True), ["block.*"])
    for layer in adapted_layers(model).values():
        layer.anchor_()
    trained_(model, 2)
    rankwise.export_peft(model, tmp_path)
    torch.testing.assert_close(
        in_peft(net(), tmp_path)(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("split", [False, True])
def test_gpt2_with_fused_parts_and_a_tied_head(split: bool, tmp_path: Path) -> None:
    layers = ["*.c_attn", "*.c_fc", "transformer.wte", "lm_head"]
    model = adapted(Opening(rank=2, scale=2.0, split=split), layers, gpt2())
    rankwise.export_peft(model, tmp_path, task_type="CAUSAL_LM", base_model="tiny")
    tokens = TOKENS + 3
    there = in_peft(gpt2(), tmp_path)
    assert isinstance(there, peft.PeftModelForCausalLM)
    torch.testing.assert_close(
        there(input_ids=tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5
    )
    back = gpt2()
    rankwise.import_peft(back, tmp_path)
    torch.testing.assert_close(back(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    assert back.lm_head.heads[0].u.weight is back.transformer.wte.heads[0].u.weight


def test_what_else_learned_goes_along(tmp_path: Path) -> None:
    model = adapted(Opening(rank=2), ["block.out"])
    with torch.no_grad():
        for name in ("norm.weight", "norm.bias", "fc.weight", "fc.bias", "block.out.base.bias"):
            model.get_parameter(name).requires_grad_(True).add_(0.5)
    rankwise.export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["bias"] == "lora_only"
    # PEFT takes all whose name ends with "fc", so the values of both are there.
    assert config["modules_to_save"] == ["block.fc", "fc", "norm"]
    torch.testing.assert_close(in_peft(net(), tmp_path)(TOKENS), model(TOKENS))
    back = net()
    rankwise.import_peft(back, tmp_path)
    torch.testing.assert_close(back(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "init_lora_weights": "gaussian"},
        {"r": 4, "rank_pattern": {"conv": 2, "block.fc": 9}, "alpha_pattern": {"fc": 3, "out": 1}},
        {"r": 2, "modules_to_save": ["norm"], "bias": "all", "lora_dropout": 0.1},
    ],
    ids=["rslora", "patterns", "others"],
)
def test_an_adapter_of_peft_has_the_same_outputs_here(
    options: dict[str, Any], tmp_path: Path
) -> None:
    targets = ["embed", "conv", "block.fc", "out"]
    there = peft.get_peft_model(net(), peft.LoraConfig(target_modules=targets, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in there.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    there.eval().save_pretrained(str(tmp_path), save_embedding_layers=False)
    model = net().eval()
    change = rankwise.import_peft(model, tmp_path)
    assert set(adapted_layers(model)) == {"embed", "conv", "block.fc", "block.out"}
    torch.testing.assert_close(model(TOKENS), there(TOKENS), rtol=1e-5, atol=1e-5)
    assert {p for s in change.added.values() for p in s.parameters} == {
        p for layer in adapted_layers(model).values() for p in layer.heads.parameters()
    }
    rankwise.to_dense(model)
    torch.testing.assert_close(model(TOKENS), there(TOKENS), rtol=1e-5, atol=1e-5)


def test_a_run_goes_on_from_an_adapter(tmp_path: Path) -> None:
    """Layers that are open already take on the values, at their own scale."""
    source = adapted(Opening(rank=2, scale=3.0), ["block.*"])
    rankwise.export_peft(source, tmp_path)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = rankwise.LoRA(rank=2, alpha=4, layers=["block.*", "conv"])
    run = rankwise.start(model, method, optimizer)
    rankwise.import_peft(model, tmp_path)
    torch.testing.assert_close(model(TOKENS), source(TOKENS), rtol=1e-5, atol=1e-5)
    before = adapted_layers(model)["block.fc"].open_update()
    model(TOKENS).square().mean().backward()
    optimizer.step()
    assert not torch.equal(adapted_layers(model)["block.fc"].open_update(), before)
    with pytest.raises(PlanError, match=r"block\.\w+ has an open update already, rank=2, heads=1"):
        rankwise.import_peft(model, changed(tmp_path, rank=3))
    run.finish()


def changed(directory: Path, rank: int) -> Path:
    """The same adapter at another rank."""
    model = adapted(Opening(rank=rank), ["block.*"])
    return rankwise.export_peft(model, directory / "changed")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = adapted(Opening(rank=2), ["block.fc", "grouped"])
    return rankwise.export_peft(model, tmp_path)


def with_config(adapter: Path, **fields: Any) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return adapter


def with_tensors(adapter: Path, rename: dict[str, str], **more: Tensor) -> Path:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for old, new in rename.items():
        tensors = {k.replace(old, new): v for k, v in tensors.items()}
    save_file(tensors | more, file)
    return adapter


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "describes IA3; only LORA"),
        ({"use_dora": True}, "use_dora=True: DoRA scales every row"),
        ({"some_new_variant": {"a": 1}}, "some_new_variant=.*not known here"),
        ({"init_lora_weights": "pissa_niter_4"}, "has changed the weights of the base"),
        ({"rank_pattern": {}, "r": 5}, "has rank 2 in the adapter, 5 in its adapter_config.json"),
    ],
)
def test_other_kinds_are_refused(adapter: Path, fields: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(PlanError, match=message):
        rankwise.import_peft(model, with_config(adapter, **fields))
    assert not adapted_layers(model)


def test_adapters_of_other_models_are_refused(adapter: Path) -> None:
    narrow = net()
    narrow.block["fc"] = nn.Linear(8, 12)
    with pytest.raises(PlanError, match=r"another model: the maps of block.fc are \(\(2, 8\), \("):
        rankwise.import_peft(narrow, adapter)
    prefix = "base_model.model.block.fc."
    tangled = with_tensors(adapter, {}, **{f"{prefix}magnitude": torch.zeros(1)})
    with pytest.raises(PlanError, match=r"unknown tensor 'block.fc.magnitude'.*block.fc.weight"):
        rankwise.import_peft(net(), tangled)
    with pytest.raises(PlanError, match=r"unknown layer 'block.fcc'; did you mean 'block.fc'"):
        rankwise.import_peft(net(), with_tensors(adapter, {"block.fc": "block.fcc"}))


def test_a_convolution_that_mixes_groups_is_refused(adapter: Path) -> None:
    key = "base_model.model.grouped.lora_A.weight"
    mixed = with_tensors(adapter, {}, **{key: torch.ones(4, 6, 3)})
    model = net()
    with pytest.raises(PlanError, match=r"grouped cannot be adapted: its map A lets each of the 2"):
        rankwise.import_peft(model, mixed)
    assert not adapted_layers(model)


def test_pickles_and_broken_files_are_refused(adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        rankwise.import_peft(net(), adapter)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"there is no adapter_model\.safetensors"):
        rankwise.import_peft(net(), adapter)
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"\.bin is a pickle, which can execute code"):
        rankwise.import_peft(net(), adapter)
    (adapter / "adapter_config.json").write_text("{")
    torch.save({}, weights)
    with pytest.raises(CheckpointError, match="is no configuration of an adapter"):
        rankwise.import_peft(net(), adapter)
    with pytest.raises(CheckpointError, match=r"holds no adapter of PEFT: there is no adapter_con"):
        rankwise.import_peft(net(), tmp_path / "nowhere")


def test_what_peft_has_no_form_for_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no update is open in this Net"):
        rankwise.export_peft(net(), tmp_path)
    cases: list[tuple[nn.Module, str]] = [
        (nn.Conv2d(3, 4, 3, dilation=2), r"0 cannot be exported: .*neither dilation \(\(2, 2\)\)"),
        (nn.ConvTranspose1d(3, 4, 3), "convolutions, not conv_transpose1d"),
        (nn.MultiheadAttention(8, 2), r"0\.q is a projection of an nn\.MultiheadAttention"),
    ]
    for layer, message in cases:
        model = nn.Sequential(layer)
        rankwise.adapt(model, 2, ["0.q", "0.k"] if "Multi" in message else ["0"])
        with pytest.raises(PlanError, match=message):
            rankwise.export_peft(model, tmp_path)


def test_a_layer_in_two_places_goes_neither_way(tmp_path: Path) -> None:
    """PEFT would adapt one of them."""
    layer, twin = nn.Linear(4, 4), nn.Linear(4, 4)
    shared = adapted(Opening(rank=2), ["0"], nn.Sequential(layer, nn.Tanh(), layer))
    with pytest.raises(PlanError, match="0 and 2 are one layer, of which PEFT adapts the first"):
        rankwise.export_peft(shared, tmp_path)
    rankwise.export_peft(adapted(Opening(rank=2), ["0"], nn.Sequential(layer, twin)), tmp_path)
    with pytest.raises(PlanError, match="0 and 2 are one layer, but PEFT adapted the first alone"):
        rankwise.import_peft(nn.Sequential(twin, nn.Tanh(), twin), tmp_path)


def test_what_learns_beside_the_updates_may_have_no_form_either(tmp_path: Path) -> None:
    model = nn.Sequential(net())
    model[0].register_parameter("token", nn.Parameter(torch.zeros(3)))
    rankwise.adapt(model, 2, ["0.conv"])
    with pytest.raises(PlanError, match=r"0 learns parameters of its own, .* cannot tell it from"):
        rankwise.export_peft(model, tmp_path)
    twins = adapted(Opening(rank=2), ["block.fc"])
    twins.fc.requires_grad_(True)
    with pytest.raises(PlanError, match=r"fc learns .* cannot tell it from block\.fc; freeze"):
        rankwise.export_peft(twins, tmp_path)
