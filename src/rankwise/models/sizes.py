"""Published sizes of well-known networks: their numbers, where those stand, and how to build them.

Each is a network of transformers or timm (`pip install 'rankwise[transformers]'`, `[timm]`), with
fresh weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """A network of another package at one published size.

    Attributes:
        kind: its name, without overrides.
        description: one line, with the source of the numbers.
        config: what differs from that type's usual configuration, or is worth reading.
    """

    kind: str
    description: str
    config: Mapping[str, Any]


def _bert(width: int, layers: int, heads: int) -> Size:
    return Size(
        "transformers:BertForMaskedLM",
        f"BERT with its masked-language head: width {width}, {layers} layers (arXiv 1810.04805)",
        {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "vocab_size": 30_522,
            "max_position_embeddings": 512,
        },
    )


def _gpt2(width: int, layers: int, heads: int) -> Size:
    # Table 2 of "Language Models are Unsupervised Multitask Learners"; heads are 64 wide.
    return Size(
        "transformers:GPT2LMHeadModel",
        f"GPT-2: width {width}, {layers} layers (Radford et al., 2019)",
        {
            "n_embd": width,
            "n_layer": layers,
            "n_head": heads,
            "vocab_size": 50_257,
            "n_positions": 1024,
        },
    )


def _llama(
    source: str,
    width: int,
    layers: int,
    heads: int,
    hidden: int,
    *,
    groups: int | None = None,
    vocabulary: int = 32_000,
    context: int = 2048,
    kind: str = "LlamaForCausalLM",
) -> Size:
    return Size(
        f"transformers:{kind}",
        f"{kind.removesuffix('ForCausalLM')} at width {width}, {layers} layers ({source})",
        {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups or heads,
            "intermediate_size": hidden,
            "vocab_size": vocabulary,
            "max_position_embeddings": context,
        },
    )


def _vit(width: int, layers: int, heads: int, patch: int = 16) -> Size:
    return Size(
        "transformers:ViTForImageClassification",
        f"ViT with {patch}x{patch} patches: width {width}, {layers} layers (arXiv 2010.11929)",
        {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "patch_size": patch,
            "image_size": 224,
            "num_labels": 1000,
        },
    )


def _timm(name: str, what: str) -> Size:
    return Size(f"timm:{name}", what, {})


SIZES: Mapping[str, Size] = {
    "vit-base": _vit(768, 12, 12),
    "vit-large": _vit(1024, 24, 16),
    "vit-huge": _vit(1280, 32, 16, patch=14),
    **{
        f"deit-{size}": _timm(
            f"deit_{size}_patch16_224",
            f"DeiT with 16x16 patches: width {width}, 12 layers (arXiv 2012.12877)",
        )
        for size, width in (("tiny", 192), ("small", 384), ("base", 768))
    },
    **{
        f"resmlp-{size}": _timm(
            f"resmlp_{name}_224", f"ResMLP: width {width}, {layers} layers (arXiv 2105.03404)"
        )
        for size, name, width, layers in (
            ("s12", "12", 384, 12),
            ("s24", "24", 384, 24),
            ("s36", "36", 384, 36),
            ("b24", "big_24", 768, 24),
        )
    },
    "bert-base": _bert(768, 12, 12),
    "bert-large": _bert(1024, 24, 16),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "llama-7b": _llama("arXiv 2302.13971", 4096, 32, 32, 11_008),
    "llama-13b": _llama("arXiv 2302.13971", 5120, 40, 40, 13_824),
    "llama-65b": _llama("arXiv 2302.13971", 8192, 80, 64, 22_016),
    "llama-3-8b": _llama(
        "arXiv 2407.21783", 4096, 32, 32, 14_336, groups=8, vocabulary=128_256, context=8192
    ),
    "mistral-7b": _llama(
        "arXiv 2310.06825",
        *(4096, 32, 32, 14_336),
        groups=8,
        context=32_768,
        kind="MistralForCausalLM",
    ),
}
