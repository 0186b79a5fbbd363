"""The factors of an update as PEFT's LoRA layers store them, and back.

PEFT has one pair of maps a layer, A (r, ...) and B (..., r), and multiplies their product by
alpha / r. Heads, and what of them is merged, stand side by side in it. Its convolution of G groups
has a B of G groups, but an A that sees every channel; its embedding is transposed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.errors import PlanError
from rankwise.layers import AdaptedLayer, LowRankEmbedding
from rankwise.layers.conv import LowRankConv
from rankwise.layers.linear import LowRankLinear


def pair_of(layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
    """A and B of an update, r the sum of its ranks; the scale is `scale_of`.

    Raises:
        PlanError: a layer that PEFT has no form for, with the reason.
    """
    head: Any = layer.heads[0]
    reason = obstacle(layer.base, type(head))
    if reason:
        raise PlanError(reason)
    # What is in W already counts as merged; before the first merge that is nothing.
    heads, merged = list[Any](layer.heads), list[Any](layer.merged or ())
    used = [(h, 1.0) for h in heads] + [(m, -1.0) for m in merged if bool(m.u.weight.any())]
    parts = [(_with_core(h, _by_group(h)), _columns(h) * sign) for h, sign in used]
    a, b = torch.cat([a for a, _ in parts], 1), torch.cat([b for _, b in parts], 1)
    if isinstance(head, LowRankConv):
        return _all_channels(a), b
    # An embedding's row is looked up in U, a token's column of A.
    return (b.mT, a[0].mT) if isinstance(head, LowRankEmbedding) else (a[0], b)


def scale_of(layer: AdaptedLayer) -> float:
    """What PEFT has to multiply the product by."""
    return layer.scale / len(layer.heads)


def obstacle(base: Any, kind: type[Any]) -> str:
    """Why PEFT has no form for an update of a layer, whose heads are of this kind, or empty."""
    if not issubclass(kind, (LowRankLinear, LowRankConv, LowRankEmbedding)):
        return f"PEFT adapts linear layers, Conv1D, embeddings, convolutions, not {kind.kind}"
    plain = all(size == 1 for size in getattr(base, "dilation", ()))
    if issubclass(kind, LowRankConv) and not (plain and base.padding_mode == "zeros"):
        return (
            f"PEFT's map A of a convolution has neither dilation ({base.dilation}) nor a padding "
            f"mode ({base.padding_mode!r})"
        )
    return ""


def shapes_of(dense: Any, kind: type[Any], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B for a dense layer."""
    if issubclass(kind, LowRankConv):
        ones = (1,) * len(dense.kernel_size)
        wide = (rank, dense.in_channels, *dense.kernel_size)
        return wide, (dense.out_channels, rank // dense.groups, *ones)
    rows, columns = kind.matrix_shape(dense)
    if issubclass(kind, LowRankEmbedding):
        rows, columns = columns, rows
    return (rank, columns), (rows, rank)


def fill(layer: AdaptedLayer, a: Tensor, b: Tensor, scale: float) -> None:
    """Write A and B into an update's heads; where its scale is another one, B makes up for it.

    Rows of A that no head has room for must not exist; rows that are missing are zero.

    Raises:
        PlanError: an A that mixes the groups of a convolution.
    """
    head: Any = layer.heads[0]
    if isinstance(head, LowRankEmbedding):
        a, b = b.mT, a.mT  # V (r, D) and U (N, r)
    groups = head.groups if isinstance(head, LowRankConv) else 1
    rows = _own_channels(a, groups) if isinstance(head, LowRankConv) else a[None]
    room = head.rank * len(layer.heads)
    rows, columns = _padded(rows, room), _padded(b, room) * (scale / scale_of(layer))
    pairs = zip(rows.split(head.rank, 1), columns.split(head.rank, 1), strict=True)
    with torch.no_grad():
        for own, (v, u) in zip(layer.heads, pairs, strict=True):
            target: Any = own
            target.v.weight.copy_(v.reshape(target.v.weight.shape))
            target.u.weight.copy_(u.reshape(target.u.weight.shape))


def _by_group(head: Any) -> Tensor:
    """V as (G, R, ...): a convolution's groups; of a fused projection all codes are one group."""
    groups = head.groups if isinstance(head, LowRankConv) else 1
    return head.v.weight.detach().unflatten(0, (groups, -1))


def _with_core(head: Any, rows: Tensor) -> Tensor:
    """diag(c) V of an update of AdaLoRA, as V (G, R, ...) is given; V itself of the others."""
    if head.core is None:
        return rows
    return rows * head.core.weight.detach().view(*rows.shape[:2], *(1,) * (rows.dim() - 2))


def _columns(head: Any) -> Tensor:
    """U as (O, R, ...); of a fused projection the block-diagonal (O, B R)."""
    u = head.u.weight.detach()
    if isinstance(head, LowRankConv) or head.blocks == 1:
        return u
    return torch.block_diag(*u.chunk(head.blocks))


def _all_channels(a: Tensor) -> Tensor:
    """(G, R, I / G, K...) as (G R, I, K...), zero where a group does not look."""
    groups, rank, own, *kernel = a.shape
    wide = a.new_zeros(groups, rank, groups, own, *kernel)
    for g in range(groups):
        wide[g, :, g] = a[g]
    return wide.flatten(2, 3).flatten(0, 1)


def _own_channels(a: Tensor, groups: int) -> Tensor:
    wide = a.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
    own = torch.stack([wide[g, :, g] for g in range(groups)])
    if int(own.count_nonzero()) < int(a.count_nonzero()):
        raise PlanError(
            f"its map A lets each of the {groups} groups see the channels of the others, which no "
            "update of this convolution's weight does"
        )
    return own


def _padded(tensor: Tensor, room: int) -> Tensor:
    """With zeros along dimension 1."""
    missing = room - tensor.shape[1]
    if not missing:
        return tensor
    zeros = tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])
    return torch.cat([tensor, zeros], 1)
