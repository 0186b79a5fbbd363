"""The encoder-decoder Transformer for translation (Vaswani et al., arXiv 1706.03762).

The form that the Pufferfish study trained (arXiv 2103.03936), 48.98 million parameters with its
vocabulary of 9,521: LayerNorm behind every sum and behind the embeddings, projections of the
attention without biases, sinusoidal positions, and one embedding, times sqrt(D), for source, target
and output. Matrices are drawn by Xavier's uniform rule, the embedding from a normal of deviation
1 / sqrt(D), so that both what it gives and the first scores have deviation 1.

Programs of this form often drop attention weights as well; here, as in the paper, only embeddings
and what each part adds are dropped.

Shapes: `B` pairs, `S` source tokens, `T` target tokens, `D` width, `H` heads.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import OptionError

EPSILON = 1e-6  # of LayerNorm
WAVELENGTH = 10_000.0


@runtime_checkable
class Translator(Protocol):
    """A network that writes a target token by token, having read the source once."""

    def encode(self, source: Tensor) -> Tensor:
        """What the decoder is to know of the source."""
        ...

    def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Scores of the token that follows each of the target's."""
        ...


class EncoderDecoder(nn.Module):
    """Predicts every next token of a target from those before it and from a source.

    Args:
        vocabulary: different tokens of source and target together, at least 1.
        width: D, a multiple of `heads` and even.
        layers: blocks of the encoder, and as many of the decoder; at least 1.
        heads: attention heads of each block.
        hidden: width of the feed-forward parts.
        dropout: share of the embeddings, and of what each part adds, that training drops.
        padding: the token that fills up sources shorter than the longest; it is not attended to.

    Raises:
        OptionError: sizes that do not fit each other.

    Example:
        >>> model = EncoderDecoder(vocabulary=50, width=16, layers=1, heads=2, hidden=32)
        >>> source = torch.ones(4, 7, dtype=torch.int64)
        >>> model(source, target=source[:, :5]).shape
        torch.Size([4, 5, 50])
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float = 0.1,
        padding: int = 0,
    ) -> None:
        super().__init__()
        _check(vocabulary, width, layers, heads, hidden, dropout)
        self.padding = padding
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.encoder_norm = nn.LayerNorm(width, eps=EPSILON)
        self.encoder = nn.ModuleList(
            EncoderBlock(width, heads, hidden, dropout) for _ in range(layers)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=EPSILON)
        self.decoder = nn.ModuleList(
            DecoderBlock(width, heads, hidden, dropout) for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._draw()
        self.head.weight = self.embedding.weight

    def _draw(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Scores of the token that follows each of the target's.

        Args:
            source: (B, S) int64, filled up with `padding`.
            target: (B, T) int64: what the decoder has written, a start token first.

        Returns:
            (B, T, vocabulary); position t depends on the tokens up to t alone.
        """
        return self.decode(self.encode(source), source, target)

    def encode(self, source: Tensor) -> Tensor:  # (B, S) -> (B, S, D)
        """What the encoder makes of every token of a source."""
        x = self.encoder_norm(self._embedded(source))
        seen = self._seen(source)
        for block in self.encoder:
            x = block(x, seen)
        return x

    def decode(self, memory: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Scores (B, T, vocabulary) from what `encode` returned (B, S, D) and the target so far."""
        x = self.decoder_norm(self._embedded(target))
        seen = self._seen(source)
        for block in self.decoder:
            x = block(x, memory, seen)
        return self.head(x)

    def _embedded(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        width = self.embedding.embedding_dim
        x = self.embedding(tokens) * math.sqrt(width)
        return self.dropout(x + _positions(tokens.shape[1], width, tokens.device).to(x.dtype))

    def _seen(self, source: Tensor) -> Tensor:  # (B, S) -> (B, 1, 1, S)
        # A source of padding alone would leave attention nothing to share out, which is no number
        # in some kernels: it sees its first token.
        first = torch.arange(source.shape[1], device=source.device) == 0
        return ((source != self.padding) | first)[:, None, None, :]


class Attention(nn.Module):
    """Scaled dot-product attention of several heads: queries of one sequence, keys of another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, memory: Tensor, seen: Tensor | None) -> Tensor:
        """Mix of the memory (B, S, D) for every position of x (B, T, D).

        Args:
            x: what asks.
            memory: what is asked.
            seen: (B, 1, 1, S), which positions of the memory count; None: those up to one's own.
        """
        query, key, value = (
            layer(read).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, read in ((self.q_proj, x), (self.k_proj, memory), (self.v_proj, memory))
        )
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None
        )
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D), same
        return self.down(F.relu(self.up(x)))


class EncoderBlock(nn.Module):
    """Attention to the source itself, then the feed-forward part; LayerNorm behind each sum."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width, eps=EPSILON)
        self.feed = FeedForward(width, hidden)
        self.feed_norm = nn.LayerNorm(width, eps=EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:  # (B, S, D), same
        x = self.attention_norm(x + self.dropout(self.attention(x, x, seen)))
        return self.feed_norm(x + self.dropout(self.feed(x)))


class DecoderBlock(nn.Module):
    """Attention to the target so far, to the source, then the feed-forward part."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width, eps=EPSILON)
        self.cross = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width, eps=EPSILON)
        self.feed = FeedForward(width, hidden)
        self.feed_norm = nn.LayerNorm(width, eps=EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, seen: Tensor) -> Tensor:  # (B, T, D), same
        x = self.attention_norm(x + self.dropout(self.attention(x, x, None)))
        x = self.cross_norm(x + self.dropout(self.cross(x, memory, seen)))
        return self.feed_norm(x + self.dropout(self.feed(x)))


@torch.no_grad()
def greedy(model: Translator, source: Tensor, *, start: int, end: int, longest: int) -> Tensor:
    """The target that takes the most likely token at every step.

    Args:
        model: a network in eval mode.
        source: (B, S) int64.
        start: the token that every target begins with.
        end: the token that ends it.
        longest: tokens at most, `end` among them; at least 1.

    Returns:
        (B, T) int64 without `start`; behind its `end` a row goes on with `end`.

    The targets so far are read anew at every step: T^2 instead of T positions, without a cache
    that every network and every low-rank layer would have to know of.
    """
    memory = model.encode(source)
    written = torch.full((len(source), 1), start, dtype=source.dtype, device=source.device)
    ended = torch.zeros(len(source), dtype=torch.bool, device=source.device)
    for _ in range(longest):
        likeliest = model.decode(memory, source, written)[:, -1].argmax(-1)
        likeliest = likeliest.masked_fill(ended, end)
        written = torch.cat((written, likeliest[:, None]), dim=1)
        ended |= likeliest == end
        if bool(ended.all()):
            break
    return written[:, 1:]


def _positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines (T, D) of each position, of wavelengths from 2 pi to 10,000 times that.

    Computed at every forward, so that no length is built in and no model in half precision rounds
    them.
    """
    speed = WAVELENGTH ** (-torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(length, device=device)[:, None] * speed
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def _check(
    vocabulary: int, width: int, layers: int, heads: int, hidden: int, dropout: float
) -> None:
    sizes = {"vocabulary": vocabulary, "width": width, "layers": layers, "heads": heads}
    for name, size in {**sizes, "hidden": hidden}.items():
        if size < 1:
            raise OptionError(f"EncoderDecoder: {name}={size} must be at least 1")
    if width % heads or width % 2:
        raise OptionError(
            f"EncoderDecoder: width={width} must be even and shared out over heads={heads}; "
            "change one"
        )
    if not 0 <= dropout < 1:
        raise OptionError(f"EncoderDecoder: dropout={dropout} must be 0 or more, below 1")
