"""nn.MultiheadAttention with its four projections as layers of their own, so each can be low-rank.

B: batch, L: queries, S: keys, E: embed_dim, H: heads, D = E / H: width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import OptionError


@dataclass(frozen=True, eq=False)
class RowCarry:
    """Moments of stacked rows for the parts they are cut into: exact, for first and second ones.

    `rows` are the numbers of rows of the parts, in order.
    """

    rows: tuple[int, ...]

    def first(self, moment: Tensor) -> tuple[Tensor | None, ...]:
        return moment.split(self.rows)

    def second(self, moment: Tensor, first: Tensor | None) -> tuple[Tensor | None, ...]:
        return moment.split(self.rows)


class OpenAttention(nn.Module):
    """The function of nn.MultiheadAttention, with projections that are called instead of read.

    nn.MultiheadAttention multiplies by slices of one packed weight and by the weight of its
    `out_proj`; factors in their place would be multiplied out at every forward. Here `q`, `k`, `v`
    and `out_proj` are real nn.Linear children, or low-rank stand-ins for them. Same signature,
    same results and same random draws as the module it stands for; without attention weights
    through scaled_dot_product_attention.

    Args:
        embed_dim: E.
        num_heads: H.
        dropout: of the attention weights, in training mode.
        bias: whether the four projections add a bias.
        add_bias_kv: learned key and value, appended to all sequences.
        add_zero_attn: a key and value of zeros, appended.
        kdim: features of the keys; E without it.
        vdim: features of the values; E without it.
        batch_first: inputs are (B, L, E) instead of (L, B, E).
        fused: one layer `in_proj` (3E from E) instead of `q`, `k` and `v`. It is called once where
            query, key and value are one tensor, else once for each of them that differs.
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> attention = OpenAttention(16, 4, batch_first=True)
        >>> x = torch.zeros(2, 5, 16)
        >>> attention(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 5, 16])
    """

    kind: ClassVar[str] = "attention"

    q: Any  # nn.Linear or a low-rank layer; `in_proj` in place of q, k, v where it is fused
    k: Any
    v: Any
    in_proj: Any
    out_proj: Any
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    # As in an nn.MultiheadAttention of separate projections: no packed weight. This also keeps
    # torch's fused encoder kernel, which reads weights instead of calling layers, away.
    _qkv_same_embed_dim: ClassVar[bool] = False
    in_proj_weight: ClassVar[None] = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        fused: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        self.fused = fused
        if self.head_dim * num_heads != embed_dim:
            raise OptionError(f"embed_dim={embed_dim} is not divisible by num_heads={num_heads}")
        if fused and not self.kdim == self.vdim == embed_dim:
            raise OptionError(
                f"kdim={self.kdim} and vdim={self.vdim} are not embed_dim={embed_dim}: such "
                "projections cannot be one matrix; leave out fused"
            )
        options: Any = {"bias": bias, "device": device, "dtype": dtype}
        if fused:
            self.in_proj = nn.Linear(embed_dim, 3 * embed_dim, **options)
        else:
            self.q = nn.Linear(embed_dim, embed_dim, **options)
            self.k = nn.Linear(self.kdim, embed_dim, **options)
            self.v = nn.Linear(self.vdim, embed_dim, **options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, **options)
        for name in ("bias_k", "bias_v"):
            extra = torch.empty(1, 1, embed_dim, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(extra) if add_bias_kv else None)
            if add_bias_kv:
                nn.init.xavier_normal_(extra)

    @classmethod
    def like(cls, attention: Any, *, fused: bool = False) -> Self:
        """An attention of the same shape, on the meta device."""
        return cls(
            attention.embed_dim,
            attention.num_heads,
            attention.dropout,
            attention.in_proj_bias is not None,
            kdim=attention.kdim,
            vdim=attention.vdim,
            batch_first=attention.batch_first,
            add_zero_attn=attention.add_zero_attn,
            fused=fused,
            device="meta",
        )

    @classmethod
    def of(cls, attention: Any, *, fused: bool = False, view: bool = False) -> Self:
        """An attention opened: its packed weight and bias cut by rows, all else shared with it.

        Args:
            attention: left as it is.
            fused: keep the three input projections as one layer `in_proj`.
            view: the parts are views of the packed weight, for looking at; otherwise copies.

        Raises:
            OptionError: `fused` for projections of different widths.
        """
        opened = cls.like(attention, fused=fused)
        if fused:
            opened.in_proj.weight = attention.in_proj_weight
            opened.in_proj.bias = attention.in_proj_bias
        else:
            opened._cut(attention, view)
        opened.out_proj = attention.out_proj
        opened.bias_k, opened.bias_v = attention.bias_k, attention.bias_v
        opened.training = attention.training
        for name in ("in_proj",) if fused else ("q", "k", "v"):
            getattr(opened, name).train(attention.training)
        return opened

    def _cut(self, attention: Any, view: bool) -> None:
        layers = (self.q, self.k, self.v)
        if attention.in_proj_weight is None:
            separate = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            for layer, weight in zip(layers, separate, strict=True):
                layer.weight = weight
        for name in ("weight", "bias"):
            packed = getattr(attention, f"in_proj_{name}")
            if packed is None:
                continue
            for layer, part in zip(layers, packed.detach().chunk(3), strict=True):
                own = part if view else part.clone()
                setattr(layer, name, nn.Parameter(own, requires_grad=packed.requires_grad))

    def parts(self, attention: Any) -> dict[nn.Parameter, tuple[nn.Parameter, ...]]:
        """Which parameters took the places of which, after `of(attention)`: rows cut in three."""
        if self.fused:
            return {}
        layers = (self.q, self.k, self.v)
        found: dict[nn.Parameter, tuple[nn.Parameter, ...]] = {}
        if attention.in_proj_weight is not None:
            found[attention.in_proj_weight] = tuple(layer.weight for layer in layers)
        if attention.in_proj_bias is not None:
            found[attention.in_proj_bias] = tuple(layer.bias for layer in layers)
        return found

    @torch.no_grad()
    def close(self) -> nn.MultiheadAttention:
        """The nn.MultiheadAttention of the same function; packed parameters are new ones.

        All projections have to be dense layers. Parameters that need no packing stay shared.
        """
        same = self.kdim == self.vdim == self.embed_dim
        closed: Any = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            self.out_proj.bias is not None,
            add_zero_attn=self.add_zero_attn,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device="meta",
        )
        if self.fused:
            closed.in_proj_weight, closed.in_proj_bias = self.in_proj.weight, self.in_proj.bias
        else:
            layers = (self.q, self.k, self.v)
            for name in ("weight", "bias"):
                held = [getattr(layer, name) for layer in layers]
                if name == "weight" and not same:
                    closed.q_proj_weight, closed.k_proj_weight, closed.v_proj_weight = held
                elif held[0] is not None:
                    learns = any(p.requires_grad for p in held)
                    packed = nn.Parameter(torch.cat(held), requires_grad=learns)
                    setattr(closed, f"in_proj_{name}", packed)
        closed.out_proj.weight, closed.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        closed.bias_k, closed.bias_v = self.bias_k, self.bias_v
        return closed.train(self.training)

    def spec(self) -> dict[str, Any]:
        """Everything needed to open the attention of another copy of the model alike."""
        return {
            "kind": self.kind,
            "shape": [self.embed_dim, self.kdim, self.vdim],
            "heads": self.num_heads,
            "fused": self.fused,
        }

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward: the output, and the attention weights or None."""
        if is_causal and attn_mask is None:
            raise OptionError(
                "is_causal=True is a hint about attn_mask, which is missing; pass "
                "nn.Transformer.generate_square_subsequent_mask(length)"
            )
        batched = query.dim() == 3
        q, k, v = (self._heads(x, batched) for x in self._project(query, key, value))
        sizes = (q.shape[0], q.shape[2], k.shape[2])
        if self.bias_k is not None and self.bias_v is not None:
            extra = (self.bias_k, self.bias_v)
            one_k, one_v = (self._heads(b.expand(1, q.shape[0], -1), True, False) for b in extra)
            k, v = torch.cat([k, one_k], 2), torch.cat([v, one_v], 2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        hinted = is_causal and key_padding_mask is None and not need_weights
        given = None if hinted else attn_mask
        mask = self._mask(given, key_padding_mask, sizes, k.shape[2] - sizes[2], query.dtype)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            out, weights = _attend(q, k, v, mask, dropout)
        else:
            out, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout, hinted), None
        out = out.transpose(1, 2).flatten(2)
        out = out[0] if not batched else out if self.batch_first else out.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        return self.out_proj(out), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        if not self.fused:
            return self.q(query), self.k(key), self.v(value)
        if query is key and key is value:
            return self.in_proj(query).chunk(3, -1)
        of_key = self.in_proj(key).chunk(3, -1)
        of_value = of_key if value is key else self.in_proj(value).chunk(3, -1)
        of_query = of_key if query is key else self.in_proj(query).chunk(3, -1)
        return of_query[0], of_key[1], of_value[2]

    def _heads(self, x: Tensor, batched: bool, batch_first: bool | None = None) -> Tensor:
        """To (B, H, L, D), from (L, E), (B, L, E) or (L, B, E)."""
        first = self.batch_first if batch_first is None else batch_first
        x = x[None] if not batched else x if first else x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        sizes: tuple[int, int, int],
        extra: int,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Both masks as one to be added to the scores; `extra` keys at the end are never masked."""
        batch, length, keys = sizes
        total: Tensor | None = None
        if attn_mask is not None:
            allowed = ((length, keys), (batch * self.num_heads, length, keys))
            _check_mask("attn_mask", attn_mask, allowed)
            total = _additive(attn_mask, dtype)
            # (1, 1, L, S), or (B, H, L, S).
            total = total[None, None] if total.dim() == 2 else total.unflatten(0, (batch, -1))
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, ((batch, keys),))
            padding = _additive(key_padding_mask, dtype)[:, None, None]
            total = padding if total is None else total + padding
        return total if total is None or not extra else F.pad(total, (0, extra))

    @property
    def q_proj_weight(self) -> Tensor:
        """The dense weight of the queries, for parents that read it."""
        return self._read(0)

    @property
    def k_proj_weight(self) -> Tensor:
        """The dense weight of the keys."""
        return self._read(1)

    @property
    def v_proj_weight(self) -> Tensor:
        """The dense weight of the values."""
        return self._read(2)

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The biases of queries, keys and values in one."""
        layers = (self.in_proj,) if self.fused else (self.q, self.k, self.v)
        return None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])

    def _read(self, part: int) -> Tensor:
        if self.fused:
            return self.in_proj.weight.chunk(3)[part]
        return (self.q, self.k, self.v)[part].weight

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights = F.dropout(weights, dropout)
    return weights @ v, weights


def _check_mask(name: str, mask: Tensor, allowed: tuple[tuple[int, ...], ...]) -> None:
    if tuple(mask.shape) not in allowed:
        raise OptionError(
            f"{name} of shape {tuple(mask.shape)} does not fit queries and keys: it must be "
            f"{' or '.join(map(str, allowed))}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise OptionError(f"{name} is {mask.dtype}; it must be bool (True: left out) or floating")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
