"""Penalties on a product U V and their gradients: Frobenius, Kronecker, L2 and sums of them.

M, N: rows and columns of the product; R: rank; U (..., M, R), V (..., R, N), in the three-factor
form U C V with a core C (..., R, R); leading dimensions are blocks (groups, heads). The product is
never formed: all goes through R x R Gram matrices, R^2 (M + N) multiplications for each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rankwise.errors import OptionError, unknown

PENALTIES = ("frobenius", "kronecker", "l2")


def parse_penalty(text: str) -> dict[str, float]:
    """A sum of penalties as written by a user: name -> weight; empty for "none".

    Raises:
        OptionError: an unknown name, an unreadable or negative weight, a name given twice.

    Example:
        >>> parse_penalty("frobenius + 0.1*l2")
        {'frobenius': 1.0, 'l2': 0.1}
    """
    terms: dict[str, float] = {}
    for part in text.split("+") if text != "none" else ():
        number, times, name = (piece.strip() for piece in part.rpartition("*"))
        if name not in PENALTIES:
            raise OptionError(unknown("decay", name, (*PENALTIES, "none")))
        if name in terms:
            raise OptionError(f"decay {text!r} names {name} twice; add up its weights")
        try:
            weight = float(number) if times else 1.0
        except ValueError as error:
            raise OptionError(
                f"decay {text!r}: {number!r} is no number; write frobenius+0.1*l2"
            ) from error
        if not 0 < weight < float("inf"):
            raise OptionError(f"decay {text!r}: the weight of {name} must be above 0 and finite")
        terms[name] = weight
    return terms


def product_norm(u: Tensor, v: Tensor, core: Tensor | None = None) -> Tensor:
    """Frobenius norm of every block's product: sqrt(tr((U^T U) (V V^T))) (2105.01029, 3.3).

    Returns:
        (...), in the dtype of the factors; differentiable where it is not 0.
    """
    left, right = _grams(u, v, core)
    return (left * right.mT).sum((-2, -1)).clamp_min(0).sqrt()


def penalty(u: Tensor, v: Tensor, core: Tensor | None = None, kind: str = "frobenius") -> Tensor:
    """Half the sum of the squared norms that `kind` names, over all blocks; times lambda, the loss.

    frobenius: |U V|^2 (2105.01029); kronecker: |U|^2 |V|^2; l2: |U|^2 + |V|^2, which is weight
    decay; a core joins as a third factor. All with the 1/2 of weight decay, so that lambda is
    torch's `weight_decay`; the program of FedLMT (ICML 2024) has no 1/2: its coefficient c is
    lambda = 2 c here.

    Returns:
        A differentiable number, at a cost of R^2 (M + N).

    Raises:
        OptionError: unknown `kind`.
    """
    terms = parse_penalty(kind)
    sizes = [f.square().sum((-2, -1)) for f in (u, v, core) if f is not None]
    total = u.new_zeros(())
    for name, weight in terms.items():
        if name == "frobenius":
            left, right = _grams(u, v, core)
            value = (left * right.mT).sum()
        elif name == "kronecker":
            value = torch.stack(sizes).prod(0).sum()
        else:
            value = torch.stack(sizes).sum()
        total = total + weight / 2 * value
    return total


def penalty_gradients(
    u: Tensor, v: Tensor, core: Tensor | None = None, kind: str = "frobenius"
) -> tuple[Tensor, ...]:
    """Gradients of `penalty` for U, the core (if there is one) and V.

    For frobenius dU = U (V V^T), dV = (U^T U) V; with a core C, dU = U (C V)(C V)^T,
    dC = (U^T U) C (V V^T), dV = (U C)^T (U C) V.

    Raises:
        OptionError: unknown `kind`.
    """
    of_u, of_core, of_v = pulls(u, v, core, parse_penalty(kind))
    middle = () if of_core is None else (of_core,)
    return (right_product(u, of_u), *middle, left_product(of_v, v))


def _grams(u: Tensor, v: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """(U C)^T (U C) and V V^T."""
    left = u.mT @ u
    return left if core is None else core.mT @ left @ core, v @ v.mT


def pulls(
    u: Tensor, v: Tensor, core: Tensor | None, terms: Mapping[str, float]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A, dC and B with dU = U A and dV = B V: one thin product each, however many the terms.

    A and B are (..., R, R), or (..., 1, 1) where they are multiples of the identity.
    """
    kronecker, plain, weight = (terms.get(n, 0.0) for n in ("kronecker", "l2", "frobenius"))
    of_u = of_v = of_core = u.new_full((1, 1), plain)
    if kronecker:  # sums over the factors cost about as much as their Grams
        sizes = [f.square().sum((-2, -1), keepdim=True) for f in (u, v, core) if f is not None]
        size_u, size_v, size_core = (*sizes, torch.ones_like(sizes[0]))[:3]
        of_u = plain + kronecker * size_v * size_core
        of_v = plain + kronecker * size_u * size_core
        of_core = plain + kronecker * size_u * size_v
    middle = None if core is None else of_core * core
    if not weight:
        return of_u, middle, of_v
    gram_u, gram_v = weight * (u.mT @ u), v @ v.mT
    if core is not None and middle is not None:
        middle = middle + gram_u @ core @ gram_v
        gram_u, gram_v = core.mT @ gram_u @ core, core @ gram_v @ core.mT
    gram_v = weight * gram_v
    if kronecker or plain:
        gram_v.diagonal(dim1=-2, dim2=-1).add_(of_u.squeeze(-1))
        gram_u.diagonal(dim1=-2, dim2=-1).add_(of_v.squeeze(-1))
    return gram_v, middle, gram_u


def right_product(u: Tensor, pull: Tensor) -> Tensor:
    """U A, where A may stand for a multiple of the identity as (..., 1, 1)."""
    return u * pull if pull.shape[-1] == 1 else u @ pull


def left_product(pull: Tensor, v: Tensor) -> Tensor:
    """B V, where B may stand for a multiple of the identity as (..., 1, 1)."""
    return pull * v if pull.shape[-1] == 1 else pull @ v
