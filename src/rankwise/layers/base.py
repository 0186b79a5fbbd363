"""What every low-rank layer is: two real child layers, one product, and a spec to rebuild it.

I: in_features, O: out_features, R: rank, K: kernel size. The layer stands for the matrix
W = U V with U (O, R), V (R, I) or (R, I*K*K); the child `v` is applied first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rankwise import linalg
from rankwise.errors import FactorizeError, LifeCycleError, OptionError, PlanError, unknown

INITS = ("spectral", "variance")


@dataclass(frozen=True, eq=False)
class FactorCarry:
    """Optimizer moments of W (O, I...) for the parameters of a low-rank layer, in module order."""

    layer: LowRankLayer

    def first(self, moment: Tensor) -> tuple[Tensor | None, ...]:
        u, v = self.layer.factors()
        matrix = moment.flatten(1).to(u.dtype)
        return self._arrange(*linalg.carry_first(matrix, u, v), like=moment)

    def second(self, moment: Tensor, first: Tensor | None) -> tuple[Tensor | None, ...]:
        u, v = self.layer.factors()
        m = None if first is None else first.flatten(1).to(u.dtype)
        matrix = moment.flatten(1).to(u.dtype)
        return self._arrange(*linalg.carry_second(matrix, m, u, v), like=moment)

    def _arrange(self, for_v: Tensor, for_u: Tensor, like: Tensor) -> tuple[Tensor | None, ...]:
        layer = self.layer
        known = {layer.v.weight: for_v, layer.u.weight: for_u}
        return tuple(
            None if p not in known else known[p].reshape(p.shape).to(like.dtype)
            for p in layer.new_parameters()
        )


class LowRankLayer(nn.Module, ABC):
    """A layer W = U V, optionally with a BatchNorm over the R codes between the two maps.

    Attributes:
        v: the first map, from the input to R codes, without bias.
        norm: BatchNorm over the codes, or None.
        u: the second map, from R codes to the output; it owns the layer's bias.
    """

    kind: ClassVar[str]
    dense_class: ClassVar[type[nn.Module]]

    v: Any  # nn.Linear or nn.Conv2d; Any, because wrappers of adapter libraries may stand here
    u: Any
    norm: Any
    rank: int

    @classmethod
    @abstractmethod
    def like(cls, dense: Any, rank: int, *, norm: bool = False) -> Self:
        """An uninitialised low-rank layer of a dense layer's shape, dtype and device."""

    @abstractmethod
    def dense_like(self) -> Any:
        """An uninitialised dense layer of this layer's shape, dtype and device."""

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight: (O, I) or (O, I, K, K)."""

    @classmethod
    def from_dense(
        cls,
        dense: Any,
        rank: int,
        *,
        init: str = "spectral",
        norm: bool = False,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Factorise a dense layer; its bias is shared, not copied, so its optimizer state survives.

        Args:
            dense: the layer to stand for.
            rank: 1 ... min(O, I*K*K).
            init: `spectral`, the truncated SVD of the dense weight, split evenly (2103.03936), or
                `variance`, fresh random factors whose product has the dense weight's variance.
            norm: put a BatchNorm over the codes; the function then changes.
            generator: source of `variance`'s random numbers; without it torch's global one.

        Raises:
            PlanError: rank out of range.
            FactorizeError: weights that are not finite.
            OptionError: unknown `init`.
        """
        if init not in INITS:
            raise OptionError(unknown("initialisation", str(init), INITS))
        layer = cls.like(dense, rank, norm=norm)
        matrix = dense.weight.detach().flatten(1)
        if init == "spectral":
            u, v = linalg.spectral_factors(matrix, rank)
        elif matrix.is_meta:
            u, v = layer.factors()
        else:
            variance = float(matrix.float().var(correction=0))
            if not 0 < variance < float("inf"):
                raise FactorizeError(
                    f"the weights have variance {variance}; variance init needs it finite and > 0"
                )
            source = generator or torch.default_generator
            u, v = linalg.variance_factors(
                (matrix.shape[0], matrix.shape[1]), rank, variance, source
            )
        layer.set_factors(u, v)
        return layer._stand_in_for(dense)

    @torch.no_grad()
    def set_factors(self, u: Tensor, v: Tensor) -> None:
        """Write U (O, R) and V (R, I*K*K), any dtype and device, into the children.

        Raises:
            PlanError: factors of another shape.
        """
        for child, factor in ((self.u, u), (self.v, v)):
            rows = child.weight.shape[0]
            if factor.shape != (rows, child.weight.numel() // rows):
                raise PlanError(
                    f"a factor of shape {tuple(factor.shape)} does not fit the map of "
                    f"{tuple(child.weight.shape)} in {type(self).__name__}"
                )
            child.weight.copy_(factor.reshape(child.weight.shape))

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """U (O, R) and V (R, I*K*K), detached, in float32 or better."""
        dtype = linalg.working_dtype(self.u.weight.dtype)
        u, v = self.u.weight.detach(), self.v.weight.detach()
        return u.flatten(1).to(dtype), v.flatten(1).to(dtype)

    def new_parameters(self) -> tuple[nn.Parameter, ...]:
        """What stands for the dense weight, in the order of `parameters()`: all but the bias."""
        return tuple(p for p in self.parameters() if p is not self.u.bias)

    def moments(self) -> FactorCarry:
        """How optimizer moments of the dense weight become those of the factors."""
        return FactorCarry(self)

    @property
    def weight(self) -> Tensor:
        """The dense weight U V that parents read: differentiable; costs one GEMM per access."""
        u = self.u.weight.flatten(1)
        if self.norm is not None:
            self._refuse_batch_statistics()
            u = u * self._norm_as_affine()[0]
        return (u @ self.v.weight.flatten(1)).reshape(self.weight_shape)

    @property
    def bias(self) -> Tensor | None:
        """The dense bias, with the shift of a BatchNorm between the factors folded in."""
        if self.norm is None:
            return self.u.bias
        self._refuse_batch_statistics()
        shift = self.u.weight.flatten(1) @ self._norm_as_affine()[1]
        return shift if self.u.bias is None else self.u.bias + shift

    def _refuse_batch_statistics(self) -> None:
        if self.training:
            raise LifeCycleError(
                f"{type(self).__name__} normalises its {self.rank} codes by the batch, so in "
                "training mode no single weight matrix stands for it; call eval() first, or build "
                "it without the extra BatchNorm"
            )

    def _norm_as_affine(self) -> tuple[Tensor, Tensor]:
        norm: Any = self.norm
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return scale, norm.bias - norm.running_mean * scale

    @torch.no_grad()
    def to_dense(self) -> Any:
        """The dense layer of the same function (with BatchNorm: the same in evaluation mode).

        The product is formed in float32 or better; without BatchNorm the bias stays shared.
        """
        dense = self.dense_like()
        u, v = self.factors()
        if self.norm is None:
            dense.bias = self.u.bias
        else:
            scale, shift = self._norm_as_affine()
            bias = self.u.weight.flatten(1) @ shift
            owner = self.u.weight if self.u.bias is None else self.u.bias
            bias = bias if self.u.bias is None else self.u.bias + bias
            dense.bias = nn.Parameter(bias, requires_grad=owner.requires_grad)
            u = u * scale
        dense.weight.copy_((u @ v).reshape(self.weight_shape))
        dense.weight.requires_grad_(self.u.weight.requires_grad)
        return dense.train(self.training)

    def spec(self) -> dict[str, Any]:
        """Everything needed to rebuild this layer in place of the dense one."""
        return {
            "kind": self.kind,
            "shape": list(self.weight_shape),
            "rank": self.rank,
            "norm": self.norm is not None,
        }

    @classmethod
    def from_spec(cls, dense: Any, spec: Mapping[str, Any]) -> Self:
        """The layer a spec describes, uninitialised, in place of `dense` (its bias shared)."""
        layer = cls.like(dense, int(spec["rank"]), norm=bool(spec["norm"]))
        return layer._stand_in_for(dense)

    def _stand_in_for(self, dense: Any) -> Self:
        self.u.bias = dense.bias
        for parameter in self.new_parameters():
            parameter.requires_grad_(dense.weight.requires_grad)
        return self.train(dense.training)


def check_rank(rank: int, shape: tuple[int, ...], kind: str) -> None:
    """Refuse a rank outside 1 ... full rank of the weight seen as a matrix.

    Raises:
        PlanError: naming the shape and the range.
    """
    rows = shape[0]
    columns = 1
    for size in shape[1:]:
        columns *= size
    full = min(rows, columns)
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise PlanError(f"rank {rank!r} is no rank; it must be a whole number, 1 to {full}")
    if not 1 <= rank <= full:
        raise PlanError(
            f"rank {rank} does not fit a {kind} weight of {rows}×{columns}: its full rank is "
            f"{full}; choose 1 to {full}"
        )
