"""Products of parameters: where their factors are, and how they are read and written as matrices.

M, N: rows and columns of the product; R: rank; U (..., M, R), V (..., R, N), with a core
C (..., R, R) in between U C V; leading dimensions are blocks (groups, heads).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import Parameter

from rankwise.errors import OptionError
from rankwise.layers import LowRankLayer, low_rank_layers
from rankwise.linalg import working_dtype


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter, or some of its rows, that holds one factor of a product."""

    parameter: Parameter
    rows: tuple[int, int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The part's rows of something that has the parameter's shape: a view."""
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


@dataclass(frozen=True, eq=False)
class Product:
    """A product U V (or U C V) whose factors are parameters of a model.

    Attributes:
        name: of the module that holds it.
        parts: where U, the core (if there is one) and V are.
        to_factors: tensors of the parts' shapes, as matrices (..., M, R), (..., R, R), (..., R, N).
        to_parts: the inverse.
    """

    name: str
    parts: tuple[Part, ...]
    to_factors: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    to_parts: Callable[[Sequence[Tensor]], Sequence[Tensor]]

    def factors(self) -> Sequence[Tensor]:
        """U, the core and V, detached, in float32 or better."""
        held = [part.of(part.parameter.detach()) for part in self.parts]
        return self.to_factors([t.to(working_dtype(t.dtype)) for t in held])


def layer_products(model: nn.Module) -> list[Product]:
    """The product of every low-rank layer in a model; tied layers have one.

    Raises:
        OptionError: a BatchNorm between the factors.
    """
    found: dict[Parameter, Product] = {}
    for name, layer in low_rank_layers(model).items():
        if layer.u.weight in found:
            continue
        if layer.norm is not None:
            raise OptionError(
                f"{name or type(layer).__name__} has a BatchNorm between its factors, which takes "
                "the scale of the first one out again: the norm of their product says nothing "
                "about the function; leave out Frobenius decay, or the extra BatchNorm"
            )
        found[layer.u.weight] = _of_layer(name, layer)
    return list(found.values())


def _of_layer(name: str, layer: LowRankLayer) -> Product:
    def to_factors(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [layer.to_factor(p, t) for p, t in zip(layer.parts, tensors, strict=True)]

    def to_parts(factors: Sequence[Tensor]) -> list[Tensor]:
        return [layer.from_factor(p, f) for p, f in zip(layer.parts, factors, strict=True)]

    parts = tuple(Part(getattr(layer, part).weight) for part in layer.parts)
    return Product(name, parts, to_factors, to_parts)
