"""Attention heads of published architectures: found, balanced without a change, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.errors import FactorizeError, SelectionError
from rankwise.optim.heads import balance_heads, head_products

transformers: Any = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
WORDS = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ENCODER_DECODER = {
    **WORDS,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
}
GROUPED = {**SMALL, **WORDS, "num_key_value_heads": 2}
IMAGE = {"image_size": 16, "patch_size": 8}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}

# Model, configuration, number of QK products or why there are none, number of OV products.
ZOO: tuple[tuple[str, dict[str, Any], int | str, int], ...] = (
    ("Bert", {**SMALL, **WORDS}, 2, 2),
    ("Roberta", {**SMALL, **WORDS}, 2, 2),
    (
        "DistilBert",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, **WORDS},
        2,
        2,
    ),
    ("ViT", {**SMALL, **IMAGE}, 2, 2),
    ("DeiT", {**SMALL, **IMAGE}, 2, 2),
    ("Swin", {**SWIN, "window_size": 4}, 2, 2),
    ("Swinv2", {**SWIN, "window_size": 4}, "cosine attention", 2),
    ("CLIPText", {**SMALL, **WORDS, "projection_dim": 16}, 2, 2),
    ("T5Encoder", {**T5, **WORDS, "decoder_start_token_id": 0}, 2, 2),
    ("Bart", ENCODER_DECODER, 3, 3),
    ("Llama", GROUPED, "rotary embeddings", 2),
    ("Mistral", GROUPED, "rotary embeddings", 2),
    ("Qwen3", {**GROUPED, "head_dim": 8}, "rotary embeddings", 2),
    ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, **WORDS}, "rotary", 2),
)


def build(name: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name.removesuffix('Encoder')}Config")(**options)
    return getattr(transformers, f"{name}Model")(config).eval().double()


def output(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = getattr(model.config, "image_size", None)
    if size is None:
        return model(torch.randint(3, 50, (2, 6), generator=generator)).last_hidden_state
    images = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    return model(images).last_hidden_state


@pytest.mark.parametrize(("name", "options", "scores", "outputs"), ZOO, ids=[z[0] for z in ZOO])
def test_heads_are_found_and_balanced_or_refused(
    name: str, options: dict[str, Any], scores: int | str, outputs: int
) -> None:
    model = build(name, options)
    forms = "qk+ov"
    if isinstance(scores, str):
        forms = "ov"
        with pytest.raises(FactorizeError, match=f"its scores are no product .*{scores}"):
            head_products(model, "qk")
    else:
        assert len(head_products(model, "qk")) == scores
    assert len(head_products(model, "ov")) == outputs
    with torch.no_grad():
        before = output(model)
        assert balance_heads(model, forms).rewritten
        # Some of them normalise in float32 whatever their weights are.
        torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-5)


FUSED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 4, **WORDS}),
    ("GPTNeoX", {**SMALL, **WORDS}),
    ("DebertaV2", {**SMALL, **WORDS}),
)


@pytest.mark.parametrize(("name", "options"), FUSED, ids=[f[0] for f in FUSED])
def test_attention_of_other_layouts_is_not_taken_for_one_of_these(
    name: str, options: dict[str, Any]
) -> None:
    with pytest.raises(SelectionError, match=f"{name}.* has no attention with projections known"):
        head_products(build(name, options), "ov")


MAKE: dict[str, Callable[[], nn.Module]] = {
    "vit_tiny_patch16_224": lambda: _timm("vit_tiny_patch16_224", embed_dim=32, num_heads=4),
    "deit_tiny_patch16_224": lambda: _timm("deit_tiny_patch16_224", embed_dim=32, num_heads=4),
}


def _timm(name: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(name, depth=2, img_size=32, **options).eval().double()


@pytest.mark.parametrize("name", MAKE)
def test_heads_of_timms_fused_projections_are_balanced(name: str) -> None:
    model = MAKE[name]()
    assert len(head_products(model, "qk+ov")) == 4
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float64).view(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        balance_heads(model, "qk+ov")
        torch.testing.assert_close(model(images), before, rtol=1e-6, atol=1e-7)
