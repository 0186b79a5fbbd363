"""Keep the factors of U diag(c) V near orthonormal, by an edit of their gradients (2303.10512).

D: rows of U or columns of V, R: rank, K: factors of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rankwise import linalg
from rankwise.layers import LowRankLayer

_torch: Any = torch  # whose calls on lists are documented, but not typed as public


@torch.no_grad()
def add_orthogonality_(heads: Iterable[LowRankLayer], strength: float) -> None:
    """Add the gradient of strength * mean over all factors of |U^T U - I|_F or |V V^T - I|_F.

    The norms are not squared, as published: the pull on a factor does not grow with its distance
    from an orthonormal one. It depends on weights alone, so there is nothing to differentiate:
    the gradient is 2 U (U^T U - I) / |U^T U - I|_F, and zero where U is orthonormal. Factors of one
    shape are one batch. Each block of a head counts as a matrix of its own.

    Args:
        heads: each once; of their factors those without a gradient are given one.
        strength: gamma.
    """
    if not strength:
        return
    shapes: dict[object, list[tuple[LowRankLayer, str, Tensor]]] = {}
    grads: list[Tensor] = []
    edits: list[Tensor] = []
    matrices = 0
    for head in heads:
        matrices += 2 * head.blocks
        for part in ("u", "v"):
            factor = head.to_factor(part, getattr(head, part).weight)
            tall = factor if part == "u" else factor.mT  # (D, R), or (B, D, R)
            key = (tall.shape, tall.dtype, tall.device)
            shapes.setdefault(key, []).append((head, part, tall))
    for batch in shapes.values():
        tall = torch.stack([each for *_, each in batch])  # (K, ..., D, R)
        tall = tall.to(linalg.working_dtype(tall.dtype))
        gram = tall.mT @ tall
        gram.diagonal(0, -2, -1).sub_(1)
        norm = torch.linalg.matrix_norm(gram, keepdim=True)
        pull = tall @ (gram * (2 * strength / matrices / norm.clamp_min(1e-12)))
        for (head, part, _), edit in zip(batch, pull, strict=True):
            weight: Parameter = getattr(head, part).weight
            edit = head.from_factor(part, edit if part == "u" else edit.mT).to(weight.dtype)
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            grads.append(weight.grad)
            edits.append(edit)
    _torch._foreach_add_(grads, edits)
