"""Fewer ranks for layers that are low-rank already: truncation of live factors, moments carried.

M, N: the weight as a matrix, R: its rank, S: the rank it gets; leading dimensions are blocks. The
product U V is never formed: with U = Q_u L_u and V^T = Q_v L_v its singular values are those of the
core L_u L_v^T (R, R), so a layer costs R^2 (M + N) + R^3 operations.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from rankwise import distributed, surgery
from rankwise.errors import (
    FactorizeError,
    OptionError,
    PlanError,
    SelectionError,
    nearest,
    unknown,
)
from rankwise.layers import LowRankLayer, low_rank_layers
from rankwise.method import NO_CHANGE, Carry, Change
from rankwise.ranks import estimators

logger = logging.getLogger(__name__)


@torch.no_grad()
def shrink(
    model: nn.Module,
    energy: float = 0.99,
    *,
    ranks: Mapping[str, int] | None = None,
    min_rank: int = 1,
    multiple: int = 8,
) -> Change:
    """Truncate low-rank layers to the ranks that still hold something, in place.

    Each W = U V (or U C V) becomes its best approximation of the lower rank, with factors that are
    balanced (U^T U = V V^T), so a long training that has let them drift apart is mended as well.
    Layers that keep their rank are left exactly as they are. Layers that share their factors
    shrink together, and a layer of several blocks keeps what its most demanding block needs.

    Momentum goes along exactly: the new factors are U' = U A and V' = B V, so their gradients are
    those of the old ones times B^T and A^T. Second moments follow by the squares of A and B, as if
    gradients were uncorrelated, with the square of the first moment as lower bound.

    Zero matrices, and factors that are not finite, keep their rank; the latter are counted and
    logged. Under data parallelism a collective: worker 0 decides.

    Args:
        model: holds low-rank layers; wrappers are not looked through.
        energy: share of the squared singular values that each layer has now and is to keep, in
            (0, 1]; shares of successive calls multiply. 1 changes nothing.
        ranks: the ranks themselves instead: layer name -> rank, at most the present one.
        min_rank: no layer falls below it by `energy`.
        multiple: `energy` rounds ranks up to multiples of it; 1 for none.

    Returns:
        What changed, for `rankwise.rebind` or as the result of a method's hook. Its notes say
        under "energy" the least share that a layer kept, under "failed" how many layers could not
        be measured.

    Raises:
        SelectionError: no low-rank layer that can shrink, or a name in `ranks` that is none.
        OptionError: energy, min_rank or multiple out of range.
        PlanError: a rank in `ranks` out of range, or two for layers that share their factors.
        FactorizeError: a layer in `ranks` that cannot be truncated.

    Example:
        >>> from rankwise.layers import LowRankLinear
        >>> model = nn.Sequential(LowRankLinear(512, 512, rank=64))
        >>> _ = shrink(model, ranks={"0": 16})
        >>> model[0].rank
        16
    """
    _check_options(energy, min_rank, multiple)
    homes = _homes(model)
    wanted: dict[str, int] = {}
    failed = 0
    if ranks is not None:
        wanted = _asked(homes, _by_first_name(model, homes, ranks))
    elif energy < 1:
        wanted, failed = _by_energy(homes, energy, min_rank, multiple)
    wanted = distributed.share(wanted)
    if not wanted:
        return Change(notes={"failed": failed}) if failed else NO_CHANGE
    kept: list[float] = []

    def fill(name: str, old: LowRankLayer, new: LowRankLayer) -> Mapping[str, Carry]:
        try:
            factors, turns, share = truncated(old.factors(), new.rank)
        except FactorizeError as error:
            raise FactorizeError(f"{name}: {error}") from error
        new.set_factors(*factors)
        kept.append(share)
        pairs = zip(old.parts, turns, strict=True)
        return {part: TurnCarry(old, new, part, *turn) for part, turn in pairs}

    together = {name: rank for first, rank in wanted.items() for name in homes[first].names}
    change = surgery.change_ranks(model, together, fill)
    return change | Change(notes={"energy": min(kept), "failed": failed})


def spectrum(layer: LowRankLayer) -> Tensor:
    """The R largest singular values of a layer's weight (R,) or (B, R): all that are not zero.

    Raises:
        FactorizeError: factors that are not finite or on the meta device, or an SVD that failed.
    """
    u, *core, v = layer.factors()
    wrong = sum(int((~torch.isfinite(f)).sum()) for f in (u, *core, v) if not f.is_meta)
    if wrong:
        raise FactorizeError(f"{wrong} numbers in its factors are not finite")
    left, right = (torch.linalg.qr(f, mode="r").R for f in (u, v.mT))
    return estimators.singular_values(_inner(left, core, right))


Turn = tuple[Tensor | None, Tensor | None]


@torch.no_grad()
def truncated(
    factors: tuple[Tensor, ...], rank: int
) -> tuple[tuple[Tensor, ...], tuple[Turn, ...], float]:
    """The best approximation of rank S of a product, as balanced factors, without forming it.

    With U = Q_u L_u, V^T = Q_v L_v and the core K = L_u C L_v^T = P diag(s) H: U' = Q_u P s^p and
    V' = s^p H Q_v^T, where p is 1/2, or 1/3 with a core C' = s^p in between (C = 1 without).
    Rows of zeros in U and columns of zeros in V stay exact zeros.

    Args:
        factors: U (..., M, R), V (..., R, N), or with a core C (..., R, R) between them; finite.
        rank: S, at most R.

    Returns:
        The new factors; for each of them the pair (X, Y) with dL/dF' = X^T (dL/dF) Y^T, None
        standing for the identity; and the least share of its squared singular values that a
        block kept.

    Raises:
        FactorizeError: an SVD that failed.
    """
    u, *core, v = factors
    (q_u, left), (q_v, right) = torch.linalg.qr(u), torch.linalg.qr(v.mT)
    try:
        p, s, h = torch.linalg.svd(_inner(left, core, right))
    except RuntimeError as error:  # LinAlgError is one
        raise FactorizeError(f"the SVD of its core did not converge: {error}") from error
    squares = s.double().square()
    total = squares.sum(-1)
    share = torch.where(total > 0, squares[..., :rank].sum(-1) / total, 1.0)
    # What is zero but for rounding has no direction to divide by.
    real = s > s.shape[-1] * torch.finfo(s.dtype).eps * s[..., :1]
    p, s, h, real = p[..., :rank], s[..., :rank], h[..., :rank, :], real[..., :rank]
    power = 1 / (2 + len(core))
    scale = torch.where(real, s, 0).pow(power)
    # Zero in every factor would be zero in every gradient, for good.
    unit = torch.where(real, scale, 1)
    new_u = (q_u @ (p * scale[..., None, :])) * (u != 0).any(-1, keepdim=True)
    new_v = ((unit[..., :, None] * h) @ q_v.mT) * (v != 0).any(-2, keepdim=True)
    # U' C' = U C E and C' V' = D C V, so that a gradient of U turns by D^T, one of V by E^T.
    inverse = torch.where(real, 1 / unit, 0)
    d = (inverse[..., :, None] * p.mT) @ left
    e = right.mT @ (h.mT * inverse[..., None, :])
    if not core:
        return (new_u, new_v), ((None, d), (e, None)), float(share.min())
    # Through the core also U' = U A and V' = B V.
    a = core[0] @ e * inverse[..., None, :]
    b = inverse[..., :, None] * (d @ core[0])
    middle = torch.diag_embed(unit)
    return (new_u, middle, new_v), ((None, d), (a, b), (e, None)), float(share.min())


def _inner(left: Tensor, core: list[Tensor], right: Tensor) -> Tensor:
    return (left @ core[0] if core else left) @ right.mT


@dataclass(frozen=True, eq=False)
class TurnCarry:
    """Moments of a factor F for one F' whose gradient is X^T (dL/dF) Y^T; None is the identity.

    First moments are exact. Second ones take entries of the gradient as uncorrelated, and not less
    than the square of the first, as `linalg.carry_second` does.
    """

    old: LowRankLayer
    new: LowRankLayer
    part: str
    left: Tensor | None
    right: Tensor | None

    def first(self, moment: Tensor) -> tuple[Tensor | None, ...]:
        return (self._return(self._turn(moment, self.left, self.right), moment),)

    def second(self, moment: Tensor, first: Tensor | None) -> tuple[Tensor | None, ...]:
        left, right = (None if side is None else side.square() for side in (self.left, self.right))
        turned = self._turn(moment, left, right)
        if first is not None:
            lowest = self._turn(first, self.left, self.right).square()
            turned = torch.maximum(turned, lowest)
        return (self._return(turned, moment),)

    def _turn(self, moment: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        side: Any = right if left is None else left
        turned = self.old.to_factor(self.part, moment).to(side)
        turned = turned if left is None else left.mT @ turned
        return turned if right is None else turned @ right.mT

    def _return(self, factor: Tensor, like: Tensor) -> Tensor:
        return self.new.from_factor(self.part, factor).to(like.dtype)


def _check_options(energy: float, min_rank: int, multiple: int) -> None:
    if isinstance(energy, bool) or not 0 < energy <= 1:
        raise OptionError(f"energy={energy!r} is outside (0, 1]: it is the share to keep")
    for name, value in (("min_rank", min_rank), ("multiple", multiple)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"{name}={value!r} must be a whole number, 1 or more")


@dataclass(frozen=True, eq=False)
class _Home:
    """Layers that share their factors; `obstacle` says why they keep their rank, or nothing."""

    names: tuple[str, ...]
    layer: LowRankLayer
    obstacle: str


def _homes(model: nn.Module) -> dict[str, _Home]:
    """The low-rank layers of a model, those that share their factors as one: first name -> all."""
    layers = low_rank_layers(model)
    if not layers:
        raise SelectionError(
            f"{type(model).__name__} holds no low-rank layer to shrink; factorize() makes them"
        )
    together: dict[Parameter, list[str]] = {}
    for name, layer in layers.items():
        together.setdefault(layer.u.weight, []).append(name)
    users: dict[Parameter, set[int]] = {}  # the parents of the modules that hold it
    for parent in model.modules():
        for child in parent.children():
            for parameter in child.parameters(recurse=False):
                users.setdefault(parameter, set()).add(id(parent))
    homes = {}
    for names in together.values():
        held = [layers[name] for name in names]
        homes[names[0]] = _Home(tuple(names), held[0], _obstacle(held, users))
    return homes


def _obstacle(layers: list[LowRankLayer], users: Mapping[Parameter, set[int]]) -> str:
    if any(layer.norm is not None for layer in layers):
        return "a BatchNorm between its factors normalises each code, so they cannot be turned"
    own = {id(layer) for layer in layers}
    for module in (getattr(layer, part) for layer in layers for part in layer.parts):
        weight = module._parameters.get("weight")
        if not isinstance(weight, Parameter):
            return f"one of its maps is a {type(module).__name__} without a weight of its own"
        if not users[weight] <= own:
            return "a layer that is not one of its twins uses one of its factors"
    return ""


def _by_first_name(
    model: nn.Module, homes: Mapping[str, _Home], ranks: Mapping[str, int]
) -> dict[str, int]:
    """Ranks by the first name of each home, from any names that its layers have."""
    first = {id(model.get_submodule(n)): h.names[0] for h in homes.values() for n in h.names}
    known = {
        name: first[id(module)]
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in first
    }
    result: dict[str, int] = {}
    for name, rank in ranks.items():
        if name not in known:
            raise SelectionError(unknown("low-rank layer", name, nearest(name, known) or known))
        if result.setdefault(known[name], rank) != rank:
            raise PlanError(
                f"{name} shares its factors with {known[name]}, but they are given the ranks "
                f"{rank} and {result[known[name]]}; give one"
            )
    return result


def _asked(homes: Mapping[str, _Home], ranks: Mapping[str, int]) -> dict[str, int]:
    wanted = {}
    for name, rank in ranks.items():
        layer, obstacle = homes[name].layer, homes[name].obstacle
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= layer.rank:
            raise PlanError(
                f"{name} has rank {layer.rank}, and can shrink to 1 to {layer.rank}, not {rank!r}"
            )
        if rank == layer.rank:
            continue
        if obstacle:
            raise FactorizeError(f"{name} cannot shrink: {obstacle}")
        spectrum(layer)  # factors that are not finite are an error before anything has changed
        wanted[name] = rank
    return wanted


def _by_energy(
    homes: Mapping[str, _Home], energy: float, min_rank: int, multiple: int
) -> tuple[dict[str, int], int]:
    """First name -> new rank, of the layers that get another one; and how many failed."""
    able = {name: home.layer for name, home in homes.items() if not home.obstacle}
    if not able:
        name, home = next(iter(homes.items()))
        raise SelectionError(f"no low-rank layer can shrink; {name}: {home.obstacle}")
    wanted, failed = {}, 0
    for name, layer in able.items():
        if layer.rank <= min_rank:
            continue
        try:
            values = spectrum(layer)
        except FactorizeError as error:
            logger.warning("%s keeps its rank %d: %s", name, layer.rank, error)
            failed += 1
            continue
        needed = int(estimators.energy_rank(values, energy).max())
        rank = max(min_rank, multiple * math.ceil(needed / multiple))
        if needed and rank < layer.rank:
            wanted[name] = rank
    return wanted, failed
