"""Causal Transformers for language modelling, small ones and the shapes of published protocols.

Two forms of block: `llama` (RMSNorm, rotary positions, SwiGLU, no biases; Touvron et al., arXiv
2302.13971) and `gpt2` (LayerNorm, learned positions, GELU, one fused query-key-value layer with
bias; Radford et al., 2019). Weights start from a normal of deviation 0.02, in the gpt2 form the
layers that write into the residual stream from one smaller by sqrt(2 * layers).

Shapes: `B` sequences, `T` tokens, `D` width, `H` heads, `S` = D / H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import OptionError, unknown

FORMS = ("llama", "gpt2")
DEVIATION = 0.02
ROTARY_BASE = 10_000.0


class Transformer(nn.Module):
    """A decoder that predicts every next token from those before it.

    Args:
        vocabulary: number of different tokens, at least 1.
        width: D, a multiple of `heads`; with rotary positions D / heads must be even.
        layers: number of blocks, at least 1.
        heads: attention heads of each block.
        hidden: width of the feed-forward part.
        context: T at most; only learned positions need a bound, so `llama` reads longer ones too.
        form: "llama" or "gpt2".
        tied: use the embedding's weight as the head's as well.

    Raises:
        OptionError: sizes that do not fit each other, or an unknown form.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        context: int,
        form: str = "llama",
        tied: bool = False,
    ) -> None:
        super().__init__()
        _check(vocabulary, width, layers, heads, hidden, context, form)
        block = LlamaBlock if form == "llama" else GPT2Block
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width) if form == "gpt2" else None
        self.blocks = nn.ModuleList(block(width, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6) if form == "llama" else nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._draw(math.sqrt(2 * layers) if form == "gpt2" else 1.0)
        if tied:
            self.head.weight = self.embedding.weight
        self._rotated = width // heads if form == "llama" else 0

    def _draw(self, depth: float) -> None:
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                inward = name.endswith((".out", ".down"))
                nn.init.normal_(module.weight, std=DEVIATION / depth if inward else DEVIATION)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) int64 -> (B, T, vocabulary)
        """Scores of every token as the next one, at every position."""
        length = tokens.shape[1]
        x = self.embedding(tokens)
        turn = None
        if self.positions is None:
            turn = _rotation(length, self._rotated, tokens.device)
        else:
            if length > self.context:
                raise OptionError(
                    f"{length} tokens, but this network has learned positions for {self.context}; "
                    "shorten the windows, or build it with a longer context"
                )
            x = x + self.positions(torch.arange(length, device=tokens.device))
        for block in self.blocks:
            x = block(x, turn)
        return self.head(self.norm(x))


class LlamaBlock(nn.Module):
    """Attention with rotary positions, then a SwiGLU, each behind an RMSNorm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:  # (B, T, D), same
        assert turn is not None
        y = self.attention_norm(x)
        query, key, value = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, S)
            for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(_attend(_turned(query, turn), _turned(key, turn), value))
        y = self.feed_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class GPT2Block(nn.Module):
    """Attention from one fused query-key-value layer, then a GELU, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:  # (B, T, D), same
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, S)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        x = x + self.out(_attend(query, key, value))
        return x + self.down(F.gelu(self.up(self.feed_norm(x)), approximate="tanh"))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (B, H, T, S) -> (B, T, D)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return mixed.transpose(1, 2).flatten(2)


def _rotation(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, S / 2) of each position's angles (RoFormer, arXiv 2104.09864).

    Computed at every forward, in float32: kept as buffers, a model in half precision would round
    its positions.
    """
    speed = ROTARY_BASE ** (-torch.arange(0, size, 2, device=device) / size)
    angle = torch.arange(length, device=device)[:, None] * speed
    return angle.cos(), angle.sin()


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:  # (B, H, T, S), same
    cosine, sine = (part.to(x.dtype) for part in turn)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def _check(
    vocabulary: int, width: int, layers: int, heads: int, hidden: int, context: int, form: str
) -> None:
    if form not in FORMS:
        raise OptionError(unknown("form", form, FORMS))
    sizes = {"vocabulary": vocabulary, "width": width, "layers": layers, "heads": heads}
    for name, size in {**sizes, "hidden": hidden, "context": context}.items():
        if size < 1:
            raise OptionError(f"Transformer: {name}={size} must be at least 1")
    if width % heads or (form == "llama" and width // heads % 2):
        even = ", an even number each," if form == "llama" else ""
        raise OptionError(
            f"Transformer: width={width} cannot be shared out{even} over heads={heads}; change one"
        )
