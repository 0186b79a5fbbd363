"""The zoo: architectures as users bring them, by the name of the full size and of a tiny one.

The tiny ones have all kinds of layers of the large, at the least depth and width, and no
randomness but dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankwise import models
from rankwise.models.vgg import POOL


@dataclass(frozen=True)
class Architecture:
    """One row of the zoo.

    Attributes:
        title: for people.
        full: name of the network at its usual size; empty for plain torch.
        tiny: name of the tiny one.
        shape: of the tiny one's input, if it is not the entry's own.
        make: called for a tiny one that has no name: the network and its inputs.
        refused: words of the reason if auto finds nothing to factorise.
    """

    title: str
    full: str = ""
    tiny: str = ""
    shape: tuple[int, ...] | None = None
    make: Callable[[], tuple[nn.Module, Any]] | None = None
    refused: str = ""

    @property
    def library(self) -> str:
        """Package that it needs beside torch, or empty."""
        if self.full in models.MODELS:
            return ""
        library, colon, _ = self.full.partition(":")
        return library if colon or not self.full else "transformers"

    def build(self) -> tuple[nn.Module, Any]:
        """The tiny network, and an input of two samples with numbers drawn at random."""
        if self.make is not None:
            return self.make()
        network = models.build(self.tiny, input_shape=self.shape)
        sample = models.sample(self.tiny, input_shape=self.shape)
        if isinstance(sample, Tensor):
            return network, _random(torch.cat([sample, sample]))
        sample.pop("use_cache", None)
        return network, {key: _random(torch.cat([v, v])) for key, v in sample.items()}


def _random(tensor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=generator)
    return torch.randint(3, 30, tensor.shape, generator=generator)


def _hf(title: str, kind: str, *tiny: str, size: str = "", **more: Any) -> Architecture:
    name = f"transformers:{kind}"
    return Architecture(title, size or name, f"{name}?{'&'.join(tiny)}", **more)


def _timm(title: str, full: str, *tiny: str, as_: str = "") -> Architecture:
    name = f"timm:{as_ or full}?{'&'.join(('num_classes=5', *tiny))}"
    return Architecture(title, f"timm:{full}", name, (3, 32, 32))


def _image(make: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, Tensor]]:
    return lambda: (make(), _random(torch.zeros(2, 3, 32, 32)))


def _llama(title: str, kind: str, *more: str) -> Architecture:
    heads = ("num_attention_heads=4", "num_key_value_heads=2")
    return _hf(title, kind, *_BERT[:3], *heads, "max_position_embeddings=12", *_NO_IDS, *more)


_BERT = ("hidden_size=16", "num_hidden_layers=2", "intermediate_size=24", "num_attention_heads=2")
_TEXT = ("vocab_size=40", "max_position_embeddings=12")
_NO_IDS = ("vocab_size=40", "pad_token_id=null", "bos_token_id=0", "eos_token_id=1")
_BART = tuple(
    f"{part}_{size}"
    for part in ("encoder", "decoder")
    for size in ("layers=1", "attention_heads=2", "ffn_dim=24")
)
_IMAGE = ("image_size=16", "patch_size=4", "num_labels=5")
_AUDIO = (
    "conv_dim=16,16",
    "conv_kernel=10,3",
    "conv_stride=5,2",
    "num_conv_pos_embeddings=16",
    "num_conv_pos_embedding_groups=2",
    "mask_time_prob=0.0",
    "layerdrop=0.0",
)

TRANSFORMERS = (
    _hf("GPT-2", "gpt2", "n_embd=16", "n_layer=2", "n_head=2", "n_positions=12", *_NO_IDS[:1]),
    _hf("GPT-Neo", "gpt_neo", "hidden_size=16", "num_layers=2", "num_heads=2",
        "attention_types=[[[\"global\",\"local\"],1]]", "max_position_embeddings=12",
        "window_size=4", *_NO_IDS),
    _hf("GPT-NeoX", "gpt_neox", *_BERT, "max_position_embeddings=12", *_NO_IDS),
    _hf("OPT", "opt", *_BERT[:2], "ffn_dim=24", "num_attention_heads=2", *_TEXT,
        "word_embed_proj_dim=16"),
    _hf("BLOOM", "bloom", "hidden_size=16", "n_layer=2", "n_head=2", *_NO_IDS, shape=(12,)),
    _hf("Falcon", "falcon", *_BERT[:2], "num_attention_heads=2", "max_position_embeddings=12",
        *_NO_IDS, refused="FalconLinear has a forward of its own"),
    _hf("Phi", "phi", *_BERT, "max_position_embeddings=12", *_NO_IDS),
    _llama("LLaMA", "llama"),
    _llama("Mistral", "mistral"),
    _llama("Qwen2", "qwen2"),
    _llama("Gemma", "gemma", "head_dim=4"),
    _llama("Mixtral", "mixtral", "num_local_experts=2"),
    _hf("Mamba", "mamba", "hidden_size=16", "state_size=4", "num_hidden_layers=2",
        "time_step_rank=2", *_NO_IDS, shape=(6,)),
    _hf("BERT", "bert", *_BERT, *_TEXT),
    _hf("DistilBERT", "distilbert", "dim=16", "n_layers=2", "n_heads=2", "hidden_dim=24", *_TEXT),
    _hf("RoBERTa", "roberta", *_BERT, *_TEXT),
    _hf("ALBERT", "albert", *_BERT, *_TEXT, "embedding_size=8"),
    _hf("ELECTRA", "electra", *_BERT, *_TEXT, "embedding_size=8"),
    _hf("DeBERTa", "deberta", *_BERT, *_TEXT, "relative_attention=true",
        "pos_att_type=c2p,p2c"),
    _hf("DeBERTa-v2", "deberta-v2", *_BERT, *_TEXT, "relative_attention=true",
        "pos_att_type=c2p,p2c"),
    _hf("T5", "t5", "d_model=16", "d_kv=8", "d_ff=24", "num_layers=2", "num_heads=2",
        "vocab_size=40", shape=(12,)),
    _hf("BART", "bart", "d_model=16", *_BART, *_TEXT),
    _hf("Whisper", "whisper", "d_model=16", *_BART, "vocab_size=40", "num_mel_bins=8",
        "max_source_positions=10", "max_target_positions=8", "pad_token_id=0"),
    _hf("wav2vec 2.0", "wav2vec2", *_BERT, *_AUDIO, shape=(400,)),
    _hf("HuBERT", "hubert", *_BERT, *_AUDIO, shape=(400,)),
    _hf("ViT", "vit", *_BERT, *_IMAGE),
    _hf("DeiT", "deit", *_BERT, *_IMAGE),
    _hf("Swin", "swin", "embed_dim=8", "depths=2,2", "num_heads=2,2", "window_size=2",
        "drop_path_rate=0.0", *_IMAGE),
    _hf("ConvNeXt", "convnext", "hidden_sizes=8,16", "depths=1,1", "num_stages=2",
        "image_size=16", "num_labels=5"),
    _hf("ResNet", "resnet", "embedding_size=8", "hidden_sizes=8,16", "depths=1,1",
        "num_labels=5", shape=(3, 32, 32)),
    _hf("CLIP", "clip", *(f"text_config.{key}" for key in (*_BERT, *_TEXT)),
        *(f"vision_config.{key}" for key in (*_BERT, *_IMAGE[:2])), "projection_dim=8"),
)  # fmt: skip


def _mixer(block: str) -> nn.Module:
    from timm.layers.mlp import GatedMlp
    from timm.models import mlp_mixer

    usual: dict[str, Any] = {"MixerBlock": {}, "ResBlock": {"mlp_ratio": 4}}
    gated = {"mlp_ratio": 4, "mlp_layer": GatedMlp}
    return mlp_mixer.MlpMixer(
        *(5, 32),
        num_blocks=2,
        embed_dim=16,
        block_layer=getattr(mlp_mixer, block),
        **usual.get(block, gated),
    )


def _vgg() -> nn.Module:
    from timm.models.vgg import VGG

    return VGG([8, "M", 16, "M", 16, "M", 16, "M", 16, "M"], num_classes=5, mlp_ratio=0.01)


def _poolformer() -> nn.Module:
    from timm.models.metaformer import MetaFormer

    return MetaFormer(num_classes=5, depths=(1, 1), dims=(8, 16))


def _resnet() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    class Narrow(Bottleneck):
        expansion = 1

    return ResNet(Narrow, [1, 1, 1, 1], num_classes=5, width_per_group=8)


def _densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(4, (1, 1, 1, 1), num_init_features=8, num_classes=5)


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, hidden_dim=16, mlp_dim=24, num_classes=5)


def _swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 8, [2, 2], [2, 2], [2, 2], num_classes=5)


def _shufflenet() -> nn.Module:
    from torchvision.models import ShuffleNetV2

    return ShuffleNetV2([1, 1, 1], [8, 16, 16, 16, 32], num_classes=5)


TIMM = (
    _timm("ResNet-50", "resnet50", "layers=1,1,1,1", "channels=8,8,16,16", "stem_width=8"),
    _timm("Wide ResNet-50-2", "wide_resnet50_2", "layers=1,1,1,1", "channels=4,4,8,8"),
    _timm("ResNeXt-50", "resnext50_32x4d", "layers=1,1,1,1", "channels=16,16,16,16",
          "cardinality=2", "base_width=32"),
    Architecture("VGG-16", "timm:vgg16", make=_image(_vgg)),
    _timm("DenseNet-121", "densenet121", "growth_rate=4", "block_config=2,2"),
    _timm("EfficientNet-B0", "efficientnet_b0", as_="test_efficientnet"),
    _timm("MobileNetV2", "mobilenetv2_100", as_="mobilenetv2_035"),
    _timm("MobileNetV3", "mobilenetv3_large_100", as_="mobilenetv3_small_050"),
    _timm("RegNetY", "regnety_016", as_="regnety_002"),
    _timm("ConvNeXt (timm)", "convnext_tiny", as_="test_convnext"),
    _timm("DeiT (timm)", "deit_small_patch16_224", "depth=1", "embed_dim=16", "num_heads=2"),
    _timm("Swin (timm)", "swin_tiny_patch4_window7_224", "depths=2,2", "embed_dim=8",
          "num_heads=2,2", "window_size=2"),
    _timm("BEiT", "beit_base_patch16_224", "depth=1", "embed_dim=16", "num_heads=2"),
    _timm("CaiT", "cait_xxs24_224", "depth=1", "embed_dim=16", "num_heads=2"),
    *(
        Architecture(title, f"timm:{full}", make=_image(partial(_mixer, block)))
        for title, full, block in (
            ("MLP-Mixer", "mixer_b16_224", "MixerBlock"),
            ("ResMLP", "resmlp_12_224", "ResBlock"),
            ("gMLP", "gmlp_s16_224", "SpatialGatingBlock"),
        )
    ),
    Architecture("PoolFormer", "timm:poolformer_s12", make=_image(_poolformer)),
)  # fmt: skip

TORCHVISION = (
    Architecture("ResNet-50 (torchvision)", "torchvision:resnet50", make=_image(_resnet)),
    Architecture("DenseNet-121 (torchvision)", "torchvision:densenet121", make=_image(_densenet)),
    Architecture("ViT-B/16 (torchvision)", "torchvision:vit_b_16", make=_image(_vit)),
    Architecture("Swin-T (torchvision)", "torchvision:swin_t", make=_image(_swin)),
    Architecture("ShuffleNetV2", "torchvision:shufflenet_v2_x1_0", make=_image(_shufflenet)),
    Architecture(
        "SqueezeNet",
        "torchvision:squeezenet1_1",
        "torchvision:squeezenet1_1?num_classes=5",
        (3, 32, 32),
    ),
)


def _transformer() -> tuple[nn.Module, dict[str, Tensor]]:
    network = nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, batch_first=True)
    return network, {"src": _random(torch.zeros(2, 5, 16)), "tgt": _random(torch.zeros(2, 4, 16))}


def _encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, "gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2), {"src": _random(torch.zeros(2, 5, 16))}


def _volume() -> tuple[nn.Module, dict[str, Tensor]]:
    network = nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 8, 3, groups=2, dilation=2, padding=2, padding_mode="circular"),
        nn.ConvTranspose3d(8, 8, 2, stride=2),
        nn.Conv3d(8, 2, 1),
    )
    return network, {"input": _random(torch.zeros(2, 2, 4, 4, 4))}


class _Recurrent(nn.Module):
    """Words through an LSTM, a GRU and a bilinear form: matrices in modules of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.long = nn.LSTM(16, 16, batch_first=True)
        self.gated = nn.GRU(16, 16, batch_first=True)
        self.pair = nn.Bilinear(16, 16, 16)
        self.hidden = nn.Linear(16, 16)
        self.output = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.gated(self.long(self.words(ids))[0])[0]
        return self.output(self.hidden(self.pair(x[:, 0], x[:, -1])).relu())


def _recurrent() -> tuple[nn.Module, dict[str, Tensor]]:
    return _Recurrent(), {"ids": _random(torch.zeros(2, 6, dtype=torch.int64))}


def _text_through(cell: str) -> tuple[nn.Module, Tensor]:
    sizes = {"vocabulary": 40, "width": 16, "hidden": 16, "layers": 2}
    network = models.RecurrentLanguageModel(**sizes, cell=cell, tied=cell == "lstm", dropout=0.1)
    return network, _random(torch.zeros(2, 6, dtype=torch.int64))


def _own_resnet() -> nn.Module:
    return models.ResNet(3, (16, 32), (1, 2), 5, stem=8, stem_stride=2, pool=True, inner=(8, 8))


def _own_vit() -> nn.Module:
    sizes = {"patch": 8, "width": 16, "layers": 2, "heads": 2, "hidden": 24, "classes": 5}
    return models.ViT(3, (32, 32), **sizes)


def _gpt2() -> tuple[nn.Module, Tensor]:
    sizes = {"vocabulary": 40, "width": 16, "layers": 2, "heads": 2, "hidden": 24, "context": 8}
    network = models.Transformer(**sizes, form="gpt2", tied=True)
    return network, _random(torch.zeros(2, 6, dtype=torch.int64))


OWN = (
    Architecture("ResNet-50 (own)", "resnet-50", make=_image(_own_resnet)),
    Architecture(
        "Wide ResNet-28-10",
        "wrn-28-10",
        make=_image(lambda: models.WideResNet(3, depth=10, wide=1, classes=5)),
    ),
    Architecture(
        "VGG-19 for 32x32",
        "vgg-19",
        make=_image(lambda: models.VGG(3, (8, POOL, 16, 16, POOL), 5, hidden=16, dropout=0.0)),
    ),
    Architecture("ViT for 32x32", "vit-cifar", make=_image(_own_vit)),
    Architecture("GPT-2 (own)", "gpt2-124m", make=_gpt2),
)

TORCH = (
    Architecture(
        "LSTM, two layers of 1500, tied", "lstm-wikitext2", make=lambda: _text_through("lstm")
    ),
    Architecture("GRU, two layers of 256", "gru-char", make=lambda: _text_through("gru")),
    Architecture("nn.Transformer", make=_transformer),
    Architecture("nn.TransformerEncoder", make=_encoder),
    Architecture("3-D convolutions", make=_volume),
    Architecture("LSTM, GRU, Bilinear", make=_recurrent),
)

ZOO = (*TRANSFORMERS, *TIMM, *TORCHVISION, *OWN, *TORCH)
