"""Vision Transformers (Dosovitskiy et al., arXiv 2010.11929) for small images.

Blocks normalise in front of each part; attention has one fused query-key-value layer without bias.
Attributes are named as in timm (`blocks.0.attn.qkv`, `blocks.0.mlp.fc1`).

Weights start as in the paper's program: Glorot's uniform in the blocks, with query, key and value
drawn each for itself; a normal with variance 1 / fan_in for the patches, of deviation 0.02 for
positions; class token and biases from zero. The classifier, zero there, starts from deviation 0.02
(DeiT, arXiv 2012.12877), so that gradients reach the blocks in the first step.

Shapes: `B` images, `T` tokens (patches and the class token), `D` width, `H` heads, `S` = D / H.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import OptionError

DEVIATION = 0.02


class ViT(nn.Module):
    """Square patches and a class token through a stack of encoder blocks; the token is classified.

    Args:
        channels: channels of the images.
        size: their height and width, both multiples of `patch`.
        patch: side of one patch; by default a quarter of the longer side of the images.
        width: D, a multiple of `heads`.
        layers: number of blocks, at least 1.
        heads: attention heads of each block.
        hidden: width of the hidden layer of each MLP.
        classes: number of outputs.
        dropout: after the embedding, each attention and each layer of an MLP, in training.

    Raises:
        OptionError: sizes that do not fit each other.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        *,
        patch: int | None = None,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        classes: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        patch = max(1, max(size) // 4) if patch is None else patch
        _check(size, patch, width, layers, heads)
        self.size = size
        self.patch_embed = nn.Conv2d(channels, width, patch, stride=patch)
        patches = (size[0] // patch) * (size[1] // patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + patches, width) * DEVIATION)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self._draw()

    def _draw(self) -> None:
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                parts = module.weight.chunk(3) if name.endswith(".qkv") else (module.weight,)
                for part in parts:
                    nn.init.xavier_uniform_(part)
        nn.init.kaiming_normal_(self.patch_embed.weight, nonlinearity="linear")
        nn.init.normal_(self.head.weight, std=DEVIATION)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, height, width) -> (B, classes)
        if tuple(x.shape[-2:]) != self.size:
            raise OptionError(
                f"images of {x.shape[-2]}x{x.shape[-1]}, but this network has positions for "
                f"{self.size[0]}x{self.size[1]}; resize them, or build it with their input_shape"
            )
        x = self.patch_embed(x).flatten(2).mT  # (B, T - 1, D)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = self.drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class Block(nn.Module):
    """Attention, then an MLP with GELU, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, hidden),
                act=nn.GELU(),
                drop=nn.Dropout(dropout),
                fc2=nn.Linear(hidden, width),
            )
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D), same
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Every token attends to all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D), same
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, S)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def _check(size: tuple[int, int], patch: int, width: int, layers: int, heads: int) -> None:
    if patch < 1 or any(side % patch for side in size):
        raise OptionError(
            f"ViT: images of {size[0]}x{size[1]} cannot be cut into patches of {patch}x{patch}; "
            f"height and width must be multiples of {patch}: resize or pad the images, or choose "
            "a convolutional network"
        )
    if layers < 1:
        raise OptionError(f"ViT: layers={layers} must be at least 1")
    if heads < 1 or width % heads:
        raise OptionError(f"ViT: width={width} cannot be shared out over heads={heads}; change one")
