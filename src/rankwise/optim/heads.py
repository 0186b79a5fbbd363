"""Attention as what it already is, a factorised map: products of each head's projections.

Scores are x^T (W_Q,h^T W_K,h) y and outputs (W_O,h W_V,h) y: per head h two products of rank D,
the width of a head (2105.01029, section 5). Both have all heads in one batch. With grouped queries
the heads of a group share W_K and W_V: their W_Q (and W_O) stand above each other in one U.

H: heads, G: groups of them that share keys (G = H without), D: width of a head, E: features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rankwise.errors import FactorizeError, OptionError, SelectionError, unknown
from rankwise.method import Change
from rankwise.optim.attention import Attention, Projection, attentions, ov_obstacle, qk_obstacle
from rankwise.optim.products import Product
from rankwise.selection import Layers, survey

FORMS = ("none", "qk", "ov", "qk+ov")
_USED = {"qk": ("q", "k"), "ov": ("o", "v")}


def head_products(model: nn.Module, forms: str, *, low_rank: str = "refuse") -> list[Product]:
    """The products of all attention heads of a model, one for each module and form.

    Args:
        model: any model.
        forms: "qk", "ov", "qk+ov" or "none".
        low_rank: "refuse" heads of low-rank projections, or "skip" them: a run that was begun with
            dense ones does not break off where a method factorises them later.

    Raises:
        SelectionError: forms are asked for, and no attention is found.
        FactorizeError: a form that does not hold in this model (rotary embeddings, norms), or
            projections that are no dense matrices.
        OptionError: unknown forms.
    """
    return [product for _, _, product in _forms(model, forms, skip=low_rank == "skip")]


def projections(model: nn.Module, forms: str) -> set[str]:
    """Names of the layers that the forms consist of: they stay dense."""
    found = attentions(model) if forms != "none" else []
    used = [n for form in forms.split("+") for n in _USED.get(form, ())]
    return {getattr(attention, n).name for attention in found for n in used}


@torch.no_grad()
def balance_heads(model: nn.Module, forms: str) -> Change:
    """Spectral initialisation of attention: each head's product split evenly by its SVD.

    The rule of the program of 2105.01029: the SVD is that of the product of the present
    projections, not of a fresh dense matrix. So the function stays the same (to rounding), also
    that of a pretrained model; biases turn with the projections. A head whose product has not the
    full rank D is left as it is: split evenly, an output projection of zeros would make its
    values zeros too, and neither would ever learn. So is one whose projections have other users,
    queries that are the keys or layers shared between attentions: turned for one, they would be
    wrong for the other.

    Returns:
        What was rewritten; no moments are kept, for they belong to the old basis.

    Raises:
        As `head_products`.
    """
    rewritten: dict[nn.Parameter, float] = {}
    found = list(_forms(model, forms))
    shared = _shared(model, found)
    for form, attention, product in found:
        u, v = product.factors()
        if (
            shared.intersection(part.parameter for part in product.parts)
            or u.is_meta
            or min(u.shape[-2], v.shape[-1]) < u.shape[-1]
        ):
            continue
        new_u, new_v, turn_u, turn_v = _balanced(u, v)
        for part, value in zip(product.parts, product.to_parts((new_u, new_v)), strict=True):
            part.of(part.parameter).copy_(value)
            rewritten[part.parameter] = 0.0
        turned = {"qk": ((attention.q, turn_u), (attention.k, turn_v))}
        for projection, turn in turned.get(form, ((attention.v, turn_v),)):
            for bias in projection.biases:
                held = bias.of(bias.parameter.detach())
                codes = held.to(turn.dtype).reshape(turn.shape[0], -1, turn.shape[-1])
                held.copy_((codes @ turn.mT).reshape(held.shape))
                rewritten[bias.parameter] = 0.0
    return Change(rewritten=rewritten)


def _shared(model: nn.Module, found: Sequence[tuple[str, Attention, Product]]) -> set[nn.Parameter]:
    """Weights that several modules hold, or that are twice a factor of the same form."""
    holders = Counter(p for module in model.modules() for p in module._parameters.values())
    uses = Counter(
        (form, part.parameter, part.rows) for form, _, product in found for part in product.parts
    )
    twice = {parameter for (_, parameter, _), count in uses.items() if count > 1}
    return twice | {p for p, count in holders.items() if p is not None and count > 1}


def _balanced(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Balanced factors (G, M, D), (G, D, N), and how codes turn on U's and on V's side (G, D, D).

    With U' = U A and V' = A^-1 V, codes that meet U turn by A^T, those that meet V by A^-1.
    """
    basis_u, left = torch.linalg.qr(u)
    basis_v, right = torch.linalg.qr(v.mT)
    p, s, qh = torch.linalg.svd(left @ right.mT)
    full = s[..., -1:] > 10 * s.shape[-1] * torch.finfo(s.dtype).eps * s[..., :1]
    root = s.sqrt()
    inverse = torch.where(full, 1 / root, 0)[..., None]
    kept = full[..., None]
    one = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    return (
        torch.where(kept, basis_u @ (p * root[..., None, :]), u),
        torch.where(kept, (root[..., None] * qh) @ basis_v.mT, v),
        torch.where(kept, inverse * (qh @ right), one),
        torch.where(kept, inverse * (p.mT @ left), one),
    )


def _forms(
    model: nn.Module, forms: str, *, skip: bool = False
) -> Iterator[tuple[str, Attention, Product]]:
    if forms not in FORMS:
        raise OptionError(unknown("attention forms", str(forms), FORMS))
    if forms == "none":
        return
    found = attentions(model)
    if not found:
        kinds = {type(m).__name__ for m in model.modules() if "ttention" in type(m).__name__}
        seen = f" ({', '.join(sorted(kinds))}: of other children)" if kinds else ""
        raise SelectionError(
            f"attention={forms!r}: {type(model).__name__} has no attention with projections known "
            f"by name{seen}: nn.MultiheadAttention, or q_proj, k_proj, v_proj, o_proj and the "
            "like; leave out attention="
        )
    for attention in found:
        for form in forms.split("+"):
            if not (skip and any(getattr(attention, n).low_rank for n in _USED[form])):
                yield form, attention, _product(attention, form)


def _product(attention: Attention, form: str) -> Product:
    many, shared = (getattr(attention, n) for n in _USED[form])
    reason = qk_obstacle(attention) if form == "qk" else ov_obstacle(attention)
    if reason:
        what = "scores are no product of W_Q" if form == "qk" else "outputs are no product of W_O"
        raise FactorizeError(
            f"{attention.name}: its {what} and W_{form[-1].upper()} alone: {reason}; choose "
            f"attention='{'ov' if form == 'qk' else 'qk'}'"
        )
    for projection in (many, shared):
        if projection.obstacle:
            raise FactorizeError(f"{projection.obstacle}, or leave out attention=")
    width, groups = _sizes(attention, many.shape[0 if form == "qk" else 1], shared)
    heads = attention.heads

    def to_factors(tensors: Sequence[Tensor]) -> list[Tensor]:
        rows = tensors[0] if form == "qk" else tensors[0].mT
        rows = rows.reshape(groups, heads // groups, width, -1)
        return [rows.mT.flatten(1, 2), tensors[1].reshape(groups, width, -1)]

    def to_parts(factors: Sequence[Tensor]) -> list[Tensor]:
        rows = factors[0].unflatten(1, (heads // groups, -1)).mT.reshape(heads * width, -1)
        return [rows if form == "qk" else rows.mT, factors[1].reshape(groups * width, -1)]

    return Product(attention.name, (many.weight, shared.weight), to_factors, to_parts)


def _sizes(attention: Attention, wide: int, shared: Projection) -> tuple[int, int]:
    """Width of a head and number of groups, from the shapes of the projections."""
    heads, rows = attention.heads, shared.shape[0]
    width, rest = divmod(wide, heads)
    groups = rows // max(width, 1)
    if rest or groups < 1 or groups * width != rows or heads % groups:
        raise FactorizeError(
            f"{attention.name}: {heads} heads do not divide projections of {wide} and {rows} "
            "features evenly"
        )
    return width, groups


def kept_dense(model: nn.Module, forms: str, layers: Layers, exclude: Layers) -> Layers:
    """A user's `exclude` with the layers added that the forms of attention consist of.

    Args:
        model: any model.
        forms: see `head_products`.
        layers: the user's choice of low-rank layers, which says how attention is opened.
        exclude: the user's own.
    """
    used = projections(model, forms)
    candidates = survey(model, layers=() if callable(layers) else layers)
    names = sorted(used & candidates.keys())
    if not names:
        return exclude
    if callable(exclude):
        return lambda name, module: name in used or exclude(name, module)
    given = exclude.split(",") if isinstance(exclude, str) else exclude
    return [*(pattern for pattern in given if pattern), *names]
