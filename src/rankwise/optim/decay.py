"""Decay of products instead of factors (2105.01029): what it acts on, and one step of it.

Coupled decay (SGD, Adam) adds lambda times the penalty's gradient to the gradients; decoupled
decay (AdamW) takes lr * lambda times it off the weights, before the optimizer's own update, where
torch's AdamW decays too. Either way it stands in place of weight decay on the factors.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from rankwise.errors import LifeCycleError, OptionError, SelectionError
from rankwise.layers import LowRankLayer
from rankwise.method import NO_CHANGE, Change, Context, Successors
from rankwise.optim.groups import ROLE as GROUP
from rankwise.optim.heads import head_products
from rankwise.optim.penalties import left_product, parse_penalty, pulls, right_product
from rankwise.optim.products import Part, Product, layer_products

logger = logging.getLogger(__name__)

ROLE = "factors"  # the parameter group without weight decay
Scales = Callable[[Parameter], tuple[float, float]]


# Layers of equal shapes whose factors hold at most as many numbers go through one batched call: 24
# of 128 x 128 in two thirds of the time, at 512 x 512 it gains nothing (benchmarks/decay.py).
SMALL = 2**13


@torch.no_grad()
def decay_gradients(
    factors: Sequence[Sequence[Tensor]], terms: Mapping[str, float]
) -> list[tuple[Tensor, ...]]:
    """Gradients of a sum of penalties for products of equal shapes, in one batch.

    Args:
        factors: of every product U, the core if there is one, and V.
        terms: see `parse_penalty`.

    Returns:
        The same for the gradients.
    """
    together = len(factors) > 1
    u, *core, v = (
        torch.stack(each) if together else each[0] for each in zip(*factors, strict=True)
    )
    of_u, of_core, of_v = pulls(u, v, core[0] if core else None, terms)
    middle = () if of_core is None else (of_core,)
    found = (right_product(u, of_u), *middle, left_product(of_v, v))
    return list(zip(*(each.unbind() for each in found), strict=True)) if together else [found]


def decay_(products: Iterable[Product], terms: Mapping[str, float], scales: Scales) -> int:
    """One step of decay on every product whose parts got gradients.

    Args:
        products: what decays.
        terms: see `parse_penalty`.
        scales: of a parameter: what the penalty's gradient is multiplied by before it is added to
            the parameter's gradient, and before it is added to the parameter itself.

    Returns:
        How many parts it acted on. As with weight decay in torch, a parameter without gradient
        (frozen, or unused in this step) is left alone.

    Raises:
        OptionError: a sparse gradient, to which a dense decay cannot be added.
    """
    todo: dict[Product, dict[int, tuple[float, float]]] = {}
    for product in products:
        wanted = {
            i: scales(part.parameter)
            for i, part in enumerate(product.parts)
            if part.parameter.grad is not None
        }
        if any(any(pair) for pair in wanted.values()):
            todo[product] = wanted
    for batch in _batches(todo):
        gradients = decay_gradients([factors for _, factors in batch], terms)
        for (product, _), each in zip(batch, gradients, strict=True):
            _add(product, product.to_parts(each), todo[product])
    return sum(map(len, todo.values()))


def _batches(products: Iterable[Product]) -> Iterator[list[tuple[Product, Sequence[Tensor]]]]:
    """Products with their factors: small ones of equal shapes together, others alone."""
    alike: dict[Any, list[tuple[Product, Sequence[Tensor]]]] = {}
    for product in products:
        factors = product.factors()
        if max(f.numel() for f in factors) > SMALL:
            yield [(product, factors)]
        else:
            key = tuple((f.shape, f.dtype, f.device) for f in factors)
            alike.setdefault(key, []).append((product, factors))
    yield from alike.values()


@torch.no_grad()
def _add(
    product: Product, gradients: Sequence[Tensor], wanted: Mapping[int, tuple[float, float]]
) -> None:
    for i, (on_gradient, on_weight) in wanted.items():
        part = product.parts[i]
        grad: Any = part.parameter.grad
        if grad.is_sparse:
            raise OptionError(
                f"{product.name} gets sparse gradients, to which no decay can be added; build its "
                "embedding with sparse=False, or exclude it"
            )
        if on_gradient:
            part.of(grad).add_(gradients[i], alpha=on_gradient)
        if on_weight:
            part.of(part.parameter).add_(gradients[i], alpha=on_weight)


def frobenius_decay_(
    model: nn.Module, strength: float, *, kind: str = "frobenius", lr: float | None = None
) -> None:
    """Frobenius decay of all low-rank layers of a model, for any training loop.

    Call it once per optimizer step: after the gradients are complete (accumulated, reduced,
    unscaled, clipped), before `optimizer.step()`, with the factors in a parameter group without
    weight decay. Decays (strength / 2) |U V|_F^2 through R x R Gram matrices, computed in float32
    or better whatever the dtype of the weights (2105.01029, section 3.2).

    Args:
        model: holds low-rank layers, or is one; wrappers (DDP) are looked through.
        strength: lambda, in units of `weight_decay`; 0 or more.
        kind: "frobenius", "kronecker", "l2", or a sum such as "frobenius+0.1*l2"; see
            `rankwise.optim.penalties.penalty`.
        lr: None adds to the gradients (coupled: SGD, Adam); the learning rate of this step takes
            lr * strength times the penalty's gradient off the weights (decoupled: AdamW).

    Raises:
        SelectionError: no low-rank layer in the model.
        LifeCycleError: no factor has a gradient yet.
        OptionError: an unknown `kind`, a negative number, a BatchNorm between factors.

    Example:
        >>> import rankwise
        >>> model = rankwise.layers.LowRankLinear(64, 64, rank=8)
        >>> model(torch.ones(4, 64)).sum().backward()
        >>> frobenius_decay_(model, 1e-4)
    """
    for name, value in (("strength", strength), ("lr", lr)):
        if value is not None and not 0 <= value < float("inf"):
            raise OptionError(f"{name}={value!r} must be 0 or more, and finite")
    terms, products = parse_penalty(kind), layer_products(model)
    if not products:
        raise SelectionError(
            f"{type(model).__name__} holds no low-rank layer to decay; factorize() makes them"
        )
    scales = (strength, 0.0) if lr is None else (0.0, -lr * strength)
    ready = any(part.parameter.grad is not None for p in products for part in p.parts)
    if not ready:
        raise LifeCycleError(
            "no factor has a gradient; call frobenius_decay_ between backward() and step()"
        )
    with torch.autocast(products[0].parts[0].parameter.device.type, enabled=False):
        decay_(products, terms, lambda parameter: scales)


class RunDecay:
    """The decay of a run's products, in place of weight decay on their factors.

    Coupled or decoupled as the optimizer's own weight decay; products are found anew after
    `forget`.

    Args:
        kind: a sum of penalties, or "none".
        strength: lambda; None for the weight decay that the user gave each factor, or the weight
            that it stems from.
        attention: forms of attention that decay too: "none", "qk", "ov", "qk+ov".

    Raises:
        OptionError: unknown `kind`.
    """

    def __init__(self, kind: str, strength: float | None, attention: str = "none") -> None:
        self._terms, self._strength, self._attention = parse_penalty(kind), strength, attention
        self._products: list[Product] | None = None
        self._rest: list[Part] = []
        self._warned = False

    def take(self, model: nn.Module) -> Change:
        """Move the factors that are there already out of the optimizer's weight decay.

        Raises:
            SelectionError: forms of attention are asked for, and there is none.
            FactorizeError: a form that does not hold in this model.
        """
        if not self._terms:
            return NO_CHANGE
        heads = head_products(model, self._attention)
        products = (*layer_products(model), *heads)
        held = {part.parameter: None for p in products for part in p.parts}
        return Change(added={p: Successors((p,), role=ROLE) for p in held})

    def amend(self, change: Change) -> Change:
        """A change whose new factors go into the group without weight decay."""
        new = [layer for _, layer in change.modules.values() if isinstance(layer, LowRankLayer)]
        held = {getattr(layer, part).weight for layer in new for part in layer.parts}
        placed = {
            p: dataclasses.replace(s, role=ROLE) if held.intersection(s.parameters) else s
            for p, s in change.replaced.items()
        }
        return dataclasses.replace(change, replaced=placed) if self._terms else change

    def roles(self) -> Mapping[str, Mapping[str, Any]]:
        """The parameter group that the factors are in."""
        return {ROLE: {"weight_decay": 0.0}} if self._terms else {}

    def forget(self) -> None:
        """The structure has changed."""
        self._products = None

    def step(self, model: nn.Module, context: Context) -> None:
        """Decay once: call it with complete gradients, before the optimizer's step."""
        if not self._terms:
            return
        products = self._find(model, context)
        acted = decay_(products, self._terms, _scales(context, self._strength))
        own = _scales(context, None)
        for part in self._rest:
            acted += _decay_plainly(part, own(part.parameter))
        if products and not acted and not self._warned and self._strength != 0:
            self._warned = True
            logger.warning(
                "no decay: the weight decay that the factors would have had is 0, or none of them "
                "has a gradient; set weight_decay on the optimizer, or strength="
            )

    def _find(self, model: nn.Module, context: Context) -> list[Product]:
        if self._products is None:
            # Projections that became low-rank during the run are products of their own.
            heads = head_products(model, self._attention, low_rank="skip")
            self._products = [*layer_products(model), *heads]
            options = context.options
            assert options is not None
            groups = ((p, options.group(p) or {}) for p in model.parameters())
            moved = [p for p, g in groups if g.get(GROUP, "").endswith(f":{ROLE}")]
            self._rest = _rest(moved, self._products)
        return self._products


def _scales(context: Context, strength: float | None) -> Scales:
    """Of a run's parameters; without `strength` each has the weight decay its user gave it."""
    options = context.options
    assert options is not None

    def scales(parameter: Parameter) -> tuple[float, float]:
        wanted = context.weight_decay(parameter) if strength is None else strength
        if options.decoupled_decay(parameter):
            return 0.0, -context.learning_rate(parameter) * wanted
        group = options.group(parameter) or {}
        return (-wanted if group.get("maximize") else wanted), 0.0

    return scales


def _rest(moved: Iterable[Parameter], products: Iterable[Product]) -> list[Part]:
    """Rows in the group without weight decay that belong to no product.

    Beside "qk" alone the packed values; after a switch whatever else was cut from a packed weight,
    and dense projections whose counterpart became low-rank.
    """
    used = {p: torch.zeros(len(p), dtype=torch.bool, device="cpu") for p in moved}
    for part in (part for product in products for part in product.parts):
        if part.parameter in used:
            part.of(used[part.parameter]).fill_(True)
    rest = []
    for parameter, rows in used.items():
        free = (~rows).nonzero().flatten().tolist()
        rest += [Part(parameter, (free[0], free[-1] + 1))] if free else []
    return rest


@torch.no_grad()
def _decay_plainly(part: Part, scales: tuple[float, float]) -> int:
    """Weight decay of rows whose parameter is in the group without it."""
    weight, grad = part.parameter, part.parameter.grad
    if grad is None or not any(scales):
        return 0
    part.of(grad).add_(part.of(weight), alpha=scales[0])
    part.of(weight).mul_(1 + scales[1])
    return 1
