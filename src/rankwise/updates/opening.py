"""Open low-rank updates of chosen layers; the function of the model stays as it was."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import Parameter

from rankwise.errors import OptionError, SelectionError, nearest
from rankwise.layers import AdaptedLayer, Form, LowRankLayer, adapted_layers
from rankwise.layers.adapted import Chunks
from rankwise.method import Change
from rankwise.selection import Layers, select
from rankwise.surgery import factorize_layers

if TYPE_CHECKING:
    from rankwise.accounting import Trace


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How updates are opened.

    Attributes:
        rank: R of each head.
        scale: s; see `scale_from_alpha`.
        heads: H.
        anchored: heads part from each other, see `AdaptedLayer`.
        dropout: of the update's input.
        draw: how V begins.
        dtype: of the factors; None for that of the weight.
        split: an update for each part of a fused projection, as in `layers.Form`.
        skip: draws of V to pass over, see `AdaptedLayer.restart_`.
        diagonal: U diag(c) V, with c zero and both factors drawn (2303.10512).
    """

    rank: int
    scale: float = 1.0
    heads: int = 1
    anchored: bool = False
    dropout: float = 0.0
    draw: str = "kaiming"
    dtype: torch.dtype | None = None
    split: bool = False
    skip: int = 0
    diagonal: bool = False


def scale_from_alpha(alpha: float, rank: int, *, stabilized: bool = False) -> float:
    """s = alpha / R (2106.09685), or alpha / sqrt(R), which keeps large ranks learning (rsLoRA,
    2312.03732).
    """
    return alpha / (rank**0.5 if stabilized else rank)


def adapt(
    model: nn.Module,
    opening: Opening | int,
    layers: Layers = "auto",
    exclude: Layers = (),
    *,
    chunks: Chunks | None = None,
    trace: Trace | None = None,
    generator: Callable[[str], torch.Generator] | None = None,
) -> Change:
    """Freeze the weights of chosen layers and open a low-rank update of each; U is zero.

    Args:
        model: changed in place; as before if this fails.
        opening: how; a number is the rank of one head with scale 1.
        layers: "auto" takes all that has a low-rank form but embeddings and the last layer in
            execution order; or globs, or a predicate, as in `rankwise.selection.select`.
        exclude: globs or a predicate; what it matches stays as it is.
        chunks: how batches are divided among heads.
        trace: execution order; without it the order of definition.
        generator: of the random numbers of a layer's V, by name; seeded by the name without it.

    Returns:
        What `rebind` makes an optimizer follow.

    Raises:
        SelectionError: nothing matched, or nothing of it can be adapted.
        PlanError: a rank that does not fit a layer, named.

    Example:
        >>> from rankwise import adapt
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> change = adapt(model, 8)
        >>> sorted(change.modules)
        ['0']
    """
    opening = Opening(rank=opening) if isinstance(opening, int) else opening
    form = Form(split=opening.split)
    chosen = choose(model, layers, exclude, trace=trace, form=form)
    draw = generator or (lambda name: torch.Generator().manual_seed(sum(name.encode())))

    def make(name: str, dense: nn.Module, stand_in: type[LowRankLayer], rank: int) -> AdaptedLayer:
        layer = AdaptedLayer.of(
            dense,
            stand_in,
            rank,
            heads=opening.heads,
            scale=opening.scale,
            blocks=form.keywords(name, dense, stand_in)["blocks"],
            diagonal=opening.diagonal,
            dtype=opening.dtype,
            anchored=opening.anchored,
            dropout=opening.dropout,
            chunks=chunks,
        )
        layer.restart_(opening.draw, draw(name), skip=opening.skip)
        return layer

    return factorize_layers(model, dict.fromkeys(chosen, opening.rank), make, form)


def choose(
    model: nn.Module,
    layers: Layers,
    exclude: Layers,
    *,
    trace: Trace | None = None,
    form: Form | None = None,
) -> list[str]:
    """The names of the layers that get an update, see `adapt`.

    Raises:
        SelectionError: nothing matched, or nothing of it can be adapted.
    """
    reasons = select(model, layers, exclude, keep_first=0, trace=trace, form=form)
    return [name for name, reason in reasons.items() if not reason]


def freeze_others(model: nn.Module, others: str | Iterable[str]) -> tuple[Parameter, ...]:
    """Freeze what is neither part of an update nor asked for.

    Args:
        model: with its updates open.
        others: "all" go on learning, "none" does, or globs over names of parameters or of the
            layers that own them.

    Returns:
        Those that learned before.

    Raises:
        SelectionError: a glob that matches no parameter.
    """
    if others == "all":
        return ()
    adapted = adapted_layers(model).values()
    own = {p for layer in adapted for p in (*layer.heads.parameters(), layer.base.weight)}
    rest = {n: p for n, p in model.named_parameters() if p.requires_grad and p not in own}
    kept = set[str]() if others == "none" else _matching(rest, others)
    frozen = tuple(p for n, p in rest.items() if n not in kept)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def _matching(rest: dict[str, Parameter], others: str | Iterable[str]) -> set[str]:
    patterns = [p.strip() for p in (others.split(",") if isinstance(others, str) else others)]
    kept: set[str] = set()
    for pattern in patterns:
        # A layer that is adapted keeps its own name for the user: fc.bias, not fc.base.bias.
        places = {n: (n, n.rpartition(".")[0], n.replace(".base.", ".")) for n in rest}
        found = {
            n for n, names in places.items() if any(fnmatch.fnmatch(m, pattern) for m in names)
        }
        if not found:
            close = nearest(pattern, rest) or list(rest)[:4]
            raise SelectionError(
                f"others={pattern!r} matches none of the {len(rest)} parameters outside the "
                f"updates; the closest are {', '.join(map(repr, close)) or 'none'}"
            )
        kept |= found
    return kept


def factors_dtype(name: str) -> torch.dtype | None:
    """The dtype that the option of this name means; None for that of the weight."""
    if name not in ("weight", "float32"):
        raise OptionError(f"dtype={name!r} is neither 'weight' nor 'float32'")
    return torch.float32 if name == "float32" else None
