"""What every low-rank layer is: real child layers, one product, and a spec to rebuild it.

M, N: the weight as a matrix, R: rank, B: blocks. The layer stands for W = U V, or U C V with a
core C, where U is (M, R), C (R, R) and V (R, N); the child `v` is applied first. With B > 1 the
weight is B such matrices, each of rank R: the groups of a convolution, the parts of a fused qkv.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rankwise import linalg
from rankwise.errors import FactorizeError, LifeCycleError, PlanError
from rankwise.layers.diagonal import Diagonal
from rankwise.layers.form import Form, check_rank
from rankwise.layers.initial import initial_factors
from rankwise.layers.moments import FactorCarry
from rankwise.method import Change, Successors

PARTS = ("u", "core", "v")


class LowRankLayer(nn.Module, ABC):
    """A layer W = U V, with a core U C V, and with a BatchNorm over the codes, if asked for.

    A class says how a dense weight becomes the matrix that is factorised (`as_matrix`,
    `as_weight`), how its children store the factors (`to_factor`, `from_factor`), and which
    arguments of the constructor it shares with the dense layer (`settings`). `splits` says that
    its rows may be seen as several blocks at will.

    Attributes:
        v: the first map, from the input to B R codes, without bias.
        norm: BatchNorm over the codes, or None.
        core: the square map between the codes, without bias, or None.
        u: the last map, from the codes to the output; it owns the layer's bias.
        blocks: B, of how many matrices of rank R the weight consists.
    """

    kind: ClassVar[str]
    dense_class: ClassVar[type[nn.Module]]
    settings: ClassVar[tuple[str, ...]]
    splits: ClassVar[bool] = False

    v: Any  # nn.Linear or a convolution; Any, because wrappers of adapter libraries may stand here
    u: Any
    norm: Any
    core: Any
    rank: int
    blocks: int

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight: (O, I), (O, I / groups, K, K), ..."""

    @property
    def fan_in(self) -> int:
        """How many inputs an output of the dense layer sums, as torch's initialisation counts."""
        return math.prod(self.weight_shape[1:])

    @classmethod
    def obstacle(cls, dense: Any, form: Form) -> str:
        """Why this class cannot stand for a dense layer in a form, or empty."""
        return ""

    @classmethod
    def blocks_of(cls, dense: Any, blocks: int = 1) -> int:
        """How many matrices the weight is: what was asked for, or what the layer itself fixes.

        Raises:
            PlanError: a layer that cannot be split like this.
        """
        if blocks == 1:
            return 1
        if not cls.splits:
            raise PlanError(f"blocks={blocks!r}: a {cls.kind} layer does not split into blocks")
        rows = cls.as_matrix(torch.empty(dense.weight.shape, device="meta")).shape[0]
        if not isinstance(blocks, int) or blocks < 1 or rows % blocks:
            raise PlanError(
                f"blocks={blocks!r} does not divide the {rows} rows of this {cls.kind} weight into "
                "equal parts"
            )
        return blocks

    @classmethod
    def as_matrix(cls, weight: Tensor, blocks: int = 1) -> Tensor:
        """What is factorised: (M, N), or (B, M, N) for B > 1; of the weight or of its gradient.

        A view where the weight's strides allow one; works on the meta device.
        """
        if blocks == 1:
            return weight.flatten(1)
        return weight.reshape(blocks, weight.shape[0] // blocks, -1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of `as_matrix`: (M, N) or (B, M, N) in the dense weight's shape."""
        return matrix.reshape(self.weight_shape)

    def to_factor(self, part: str, weight: Tensor) -> Tensor:
        """A child's weight, or anything of its shape, as U, C or V; differentiable.

        Args:
            part: "u", "core" or "v".
            weight: of the shape of that child's weight.

        Returns:
            U (..., M, R), C (..., R, R) or V (..., R, N); the dots are B where B > 1.
        """
        assert part in PARTS
        if weight.dim() == 1:  # of a diagonal core
            return torch.diag_embed(weight.view(self.blocks, -1) if self.blocks > 1 else weight)
        if self.blocks == 1:
            return weight.flatten(1)
        return weight.reshape(self.blocks, weight.shape[0] // self.blocks, -1)

    def from_factor(self, part: str, factor: Tensor) -> Tensor:
        """The inverse of `to_factor`: a factor in the shape of that child's weight."""
        shape = getattr(self, part).weight.shape
        return (factor if len(shape) > 1 else factor.diagonal(0, -2, -1)).reshape(shape)

    @classmethod
    def matrix_shape(cls, dense: Any, blocks: int = 1) -> tuple[int, int]:
        """M and N of one block of a dense layer's weight."""
        weight = torch.empty(dense.weight.shape, device="meta")
        rows, columns = cls.as_matrix(weight, cls.blocks_of(dense, blocks)).shape[-2:]
        return rows, columns

    @classmethod
    def like(
        cls, dense: Any, rank: int, *, norm: bool = False, core: bool = False, blocks: int = 1
    ) -> Self:
        """An uninitialised low-rank layer of a dense layer's shape, dtype and device.

        Raises:
            PlanError: rank out of range, or a number of blocks that does not divide the layer.
            FactorizeError: a form that this layer does not have.
        """
        reason = cls.obstacle(dense, Form(norm=norm, core=core))
        if reason:
            raise FactorizeError(reason)
        check_rank(rank, cls.matrix_shape(dense, blocks), cls.kind)
        form = {"norm": norm, "core": core, "blocks": blocks if cls.splits and blocks > 1 else 0}
        layer: Any = nn.utils.skip_init(
            cls,
            **{name: getattr(dense, name) for name in cls.settings},
            rank=rank,
            bias=getattr(dense, "bias", None) is not None,
            **{option: value for option, value in form.items() if value},
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )
        if layer.norm is not None:
            layer.norm.reset_parameters()
        return layer

    def dense_like(self, device: torch.device | None = None) -> Any:
        """An uninitialised dense layer of this layer's shape and dtype; its device, or another."""
        return nn.utils.skip_init(
            self.dense_class,
            **{name: getattr(self, name) for name in self.settings},
            bias=self.u.bias is not None,
            device=device or self.u.weight.device,
            dtype=self.u.weight.dtype,
        )

    def with_rank(self, rank: int) -> Self:
        """An uninitialised layer of this one's shape and form, at another rank, sharing its bias.

        Neither the dense weight nor memory for it is needed.

        Raises:
            PlanError: rank out of range.
        """
        form = {"norm": self.norm is not None, "core": self.core is not None and not self.diagonal}
        layer = self.like(self.dense_like(torch.device("meta")), rank, blocks=self.blocks, **form)
        layer = layer.to_empty(device=self.u.weight.device)
        if layer.norm is not None:
            layer.norm.reset_parameters()
        layer.u.bias = self.u.bias
        if self.diagonal:
            layer.put_diagonal()
        for part in self.parts:
            learns = getattr(self, part).weight.requires_grad
            getattr(layer, part).weight.requires_grad_(learns)
        return layer.train(self.training)

    @classmethod
    def from_dense(
        cls,
        dense: Any,
        rank: int,
        *,
        init: str = "spectral",
        norm: bool = False,
        core: bool = False,
        blocks: int = 1,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Factorise a dense layer; its bias is shared, not copied, so its optimizer state survives.

        Args:
            dense: the layer to stand for.
            rank: 1 ... min(M, N), of each block.
            init: `spectral`, the truncated SVD of the dense weight, split evenly (2103.03936); the
                others forget the weight's values, see `layers.initial`. `loralinear` alone draws
                the bias anew, too.
            norm: put a BatchNorm over the codes; the function then changes.
            core: three factors U C V instead of two (2105.01029).
            blocks: see a linear layer's rows as that many matrices (parts of a fused qkv).
            generator: source of random numbers; without it torch's global one.

        Raises:
            PlanError: rank or blocks that do not fit.
            FactorizeError: weights that are not finite, or a form that this layer does not have.
            OptionError: unknown `init`.
        """
        layer = cls.like(dense, rank, norm=norm, core=core, blocks=blocks)
        factors = initial_factors(layer, dense, init, generator)
        if factors is not None:
            layer.set_factors(*factors)
        return layer._stand_in_for(dense)

    @property
    def parts(self) -> tuple[str, ...]:
        """The children that hold factors, in the order of the product: u, v or u, core, v."""
        return ("u", "v") if self.core is None else PARTS

    @property
    def diagonal(self) -> bool:
        """Whether the core is a diagonal one, of as many numbers as there are codes."""
        return isinstance(self.core, Diagonal)

    def put_diagonal(self) -> None:
        """Put a diagonal core, all zero, between the factors."""
        weight = self.u.weight
        place: Any = {"device": weight.device, "dtype": weight.dtype}
        self.core = Diagonal(self.rank * self.blocks, self.v.weight.dim() - 2, **place)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, ...]:
        """(U, V), or (U, C, V) with a core: detached, in float32 or better.

        Their product is `as_matrix` of the weight: U (M, R), C (R, R), V (R, N), each with B in
        front where B > 1.
        """
        dtype = linalg.working_dtype(self.u.weight.dtype)
        weights = ((part, getattr(self, part).weight.detach()) for part in self.parts)
        return tuple(self.to_factor(part, weight).to(dtype) for part, weight in weights)

    @torch.no_grad()
    def set_factors(self, *factors: Tensor) -> None:
        """Write what `factors` returns, any dtype and device, into the children.

        Raises:
            PlanError: factors of another number or shape.
        """
        if len(factors) != len(self.parts):
            raise PlanError(f"this layer has {len(self.parts)} factors; {len(factors)} were given")
        for part, factor in zip(self.parts, factors, strict=True):
            weight = getattr(self, part).weight
            expected = self.to_factor(part, weight).shape
            if factor.shape != expected:
                raise PlanError(
                    f"a factor of shape {tuple(factor.shape)} does not fit the map of "
                    f"{tuple(weight.shape)} in {type(self).__name__}, which is {tuple(expected)}"
                )
            weight.copy_(self.from_factor(part, factor))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the factors anew, their product with the variance of a default dense layer.

        That is 1 / (3 F) with the fan-in F (I of a linear layer) at every rank. The bias is drawn
        like the dense layer's, within 1 / sqrt(F).
        """
        fan_in, count = self.fan_in, len(self.parts)
        # An entry of the product is a sum over every inner index: R terms, R^2 with a core.
        std = (1 / (3 * fan_in) / self.rank ** (count - 1)) ** (1 / (2 * count))
        for part in reversed(self.parts):
            nn.init.normal_(getattr(self, part).weight, std=std)
        if self.u.bias is not None:
            nn.init.uniform_(self.u.bias, -(fan_in**-0.5), fan_in**-0.5)

    def new_parameters(self) -> tuple[nn.Parameter, ...]:
        """What stands for the dense weight, in the order of `parameters()`: all but the bias."""
        return tuple(p for p in self.parameters() if p is not self.u.bias)

    def moments(self) -> FactorCarry:
        """How optimizer moments of the dense weight become those of the factors."""
        return FactorCarry(self)

    @property
    def weight(self) -> Tensor:
        """The dense weight that parents read: differentiable; costs one GEMM per access."""
        u = self._codes_to_output()
        if self.norm is not None:
            self._refuse_batch_statistics()
            u = u * self._norm_as_affine()[0].mT
        return self.as_weight(u @ self.to_factor("v", self.v.weight))

    @property
    def bias(self) -> Tensor | None:
        """The dense bias, with the shift of a BatchNorm between the factors folded in."""
        if self.norm is None:
            return self.u.bias
        self._refuse_batch_statistics()
        shift = (self._codes_to_output() @ self._norm_as_affine()[1]).flatten()
        return shift if self.u.bias is None else self.u.bias + shift

    def _codes_to_output(self) -> Tensor:
        """U, or U C: what stands between the normalised codes and the output."""
        u = self.to_factor("u", self.u.weight)
        return u if self.core is None else u @ self.to_factor("core", self.core.weight)

    def _refuse_batch_statistics(self) -> None:
        if self.training:
            raise LifeCycleError(
                f"{type(self).__name__} normalises its {self.rank * self.blocks} codes by the "
                "batch, so in training mode no single weight matrix stands for it; call eval() "
                "first, or build it without the extra BatchNorm"
            )

    def _norm_as_affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of each code, as columns (..., R, 1)."""
        norm: Any = self.norm
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        shape = (self.rank, 1) if self.blocks == 1 else (self.blocks, self.rank, 1)
        return scale.reshape(shape), shift.reshape(shape)

    @torch.no_grad()
    def to_dense(self) -> Any:
        """The dense layer of the same function (with BatchNorm: the same in evaluation mode).

        The product is formed in float32 or better; without BatchNorm the bias stays shared.
        """
        dense = self.dense_like()
        u, *core, v = self.factors()
        u = u @ core[0] if core else u
        if self.norm is None:
            dense.bias = self.u.bias
        else:
            scale, shift = self._norm_as_affine()
            bias = (self._codes_to_output() @ shift).flatten()
            owner = self.u.weight if self.u.bias is None else self.u.bias
            bias = bias if self.u.bias is None else self.u.bias + bias
            dense.bias = nn.Parameter(bias, requires_grad=owner.requires_grad)
            u = u * scale.mT
        dense.weight.copy_(self.as_weight(u @ v))
        dense.weight.requires_grad_(self.u.weight.requires_grad)
        return dense.train(self.training)

    def spec(self) -> dict[str, Any]:
        """Everything needed to rebuild this layer in place of the dense one."""
        return {
            "kind": self.kind,
            "shape": list(self.weight_shape),
            "rank": self.rank,
            "norm": self.norm is not None,
            "core": "diagonal" if self.diagonal else self.core is not None,
            "blocks": self.blocks,
        }

    @classmethod
    def from_spec(cls, dense: Any, spec: Mapping[str, Any]) -> Self:
        """The layer a spec describes, uninitialised, in place of `dense` (its bias shared).

        Specs of before there were cores and blocks have neither.
        """
        layer = cls.like(
            dense,
            int(spec["rank"]),
            norm=bool(spec["norm"]),
            core=bool(spec.get("core", False)),
            blocks=int(spec.get("blocks", 1)),
        )
        return layer._stand_in_for(dense)

    def for_tied(self, dense: Any, stand_in: type[LowRankLayer]) -> LowRankLayer:
        """A layer with this one's factors in place of another dense layer of the same weight."""
        layer = stand_in.from_spec(dense, self.spec())
        layer.v, layer.norm, layer.core = self.v, self.norm, self.core
        layer.u.weight = self.u.weight
        return layer

    def taken_from(self, dense: Any) -> Change:
        """The factors take the place of a dense layer's weight in the optimizer."""
        return Change(replaced={dense.weight: Successors(self.new_parameters(), self.moments())})

    def _stand_in_for(self, dense: Any) -> Self:
        self.u.bias = dense.bias
        for parameter in self.new_parameters():
            parameter.requires_grad_(dense.weight.requires_grad)
        return self.train(dense.training)
