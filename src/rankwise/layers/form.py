"""The form of a factorisation: the ranks there are, and what is chosen beside, for all layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankwise.errors import OptionError, PlanError, SelectionError, nearest

if TYPE_CHECKING:
    from rankwise.layers.base import LowRankLayer

# Linear layers whose rows are queries, keys and values one below the other, by their usual names.
FUSED = ("qkv", "c_attn", "query_key_value", "in_proj", "Wqkv", "to_qkv")


@dataclass(frozen=True)
class Form:
    """How layers are factorised; the rank says how far.

    Attributes:
        norm: a BatchNorm over the codes between the factors (2103.03936); changes the function.
        core: three factors U C V with a square map in between (2105.01029).
        separable: 2-D convolutions as 1 x k and k x 1 (2105.01029) instead of k x k and 1 x 1.
        split: linear layers that hold several matrices, each to get factors of its own: glob over
            layer names -> number of equal parts of the rows, the first pattern that matches counts;
            or True for the gates of recurrent layers, each on its own, and for the fused
            projections known by name (qkv, c_attn, ...) with three times as many rows as columns,
            in three parts. Grouped queries make unequal parts: not split.
    """

    norm: bool = False
    core: bool = False
    separable: bool = False
    split: bool | Mapping[str, int] = False

    def __post_init__(self) -> None:
        for switch in ("norm", "core", "separable"):
            if not isinstance(getattr(self, switch), bool):
                raise OptionError(f"{switch}={getattr(self, switch)!r} must be True or False")
        if isinstance(self.split, bool):
            return
        if not isinstance(self.split, Mapping):
            raise OptionError(f"split={self.split!r} is neither True nor layer glob -> parts")
        for pattern, parts in self.split.items():
            if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
                raise OptionError(f"split: {parts!r} for {pattern!r} is no number of parts")

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse a pattern of `split` that matches none of a model's layers.

        Raises:
            SelectionError: naming the closest.
        """
        known = list(names)
        for pattern in self.split if isinstance(self.split, Mapping) else ():
            if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
                close = nearest(pattern, known) or known[:4]
                raise SelectionError(
                    f"split: {pattern!r} matches no layer; the closest are {', '.join(close)}"
                )

    def keywords(self, name: str, dense: Any, stand_in: type[LowRankLayer]) -> dict[str, Any]:
        """What `from_dense` and `like` of the class for this layer take beside the rank.

        Args:
            name: the layer's name in the model.
            dense: the layer.
            stand_in: its low-rank class.

        Raises:
            PlanError: parts that do not divide the layer, or a layer that does not split.
        """
        blocks = stand_in.blocks_of(dense, self._parts(name, dense, stand_in))
        return {"norm": self.norm, "core": self.core, "blocks": blocks}

    def _parts(self, name: str, dense: Any, stand_in: type[LowRankLayer]) -> int:
        if isinstance(self.split, Mapping):
            matching = (n for p, n in self.split.items() if fnmatch.fnmatchcase(name, p))
            return next(matching, 1)
        if self.split and stand_in.splits and hasattr(dense, "gates"):  # of a recurrent layer
            return dense.gates
        if not self.split or not stand_in.splits or name.rpartition(".")[2] not in FUSED:
            return 1
        rows, columns = stand_in.matrix_shape(dense)
        return 3 if rows == 3 * columns else 1


def check_rank(rank: int, shape: tuple[int, int], kind: str) -> None:
    """Refuse a rank outside 1 ... full rank of a matrix of (rows, columns).

    Raises:
        PlanError: naming the shape and the range.
    """
    rows, columns = shape
    full = min(rows, columns)
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise PlanError(f"rank {rank!r} is no rank; it must be a whole number, 1 to {full}")
    if not 1 <= rank <= full:
        raise PlanError(
            f"rank {rank} does not fit a {kind} weight of {rows}×{columns}: its full rank is "
            f"{full}; choose 1 to {full}"
        )
