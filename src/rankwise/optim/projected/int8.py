"""Weights stored in 8 bits (Q-GaLore, 2407.08296), decoded wherever they are used.

A weight W is codes of one byte with a scale per block of 256 numbers; the layer's forward and
backward decode it, one product at a time, so that no float copy outlives its use. Updates are far
smaller than the step between two codes: they survive by stochastic rounding alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map

from rankwise import sharding
from rankwise.errors import LifeCycleError, OptionError
from rankwise.optim.projected.gradient import writes

BLOCK, HIGHEST = 256, 127

_aten = torch.ops.aten
_TURNED = {_aten.t.default, _aten.transpose.int}
_SHARED = {_aten.detach.default, _aten.alias.default}


class Int8Weight(torch.Tensor):
    """A weight that behaves as a float tensor and stores a byte a number.

    Reading sees the decoded values. Writing in place encodes the result, rounded to nearest.

    Attributes:
        codes: int8 (blocks, 256), the last block padded by zeros.
        scales: (blocks, 1), float32: what the step from one code to the next is worth.
        turned: whether this is the transpose of what is stored; such views share the codes.
    """

    codes: Tensor
    scales: Tensor
    turned: bool

    @staticmethod
    def __new__(  # pyright: ignore
        cls,
        codes: Tensor,
        scales: Tensor,
        shape: torch.Size,
        dtype: torch.dtype,
        turned: bool = False,
    ) -> Int8Weight:
        """See codes as a tensor of a shape and dtype."""
        strides = (1, shape[0]) if turned else torch.empty(shape, device="meta").stride()
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=codes.device
        )
        self.codes, self.scales, self.turned = codes, scales, turned
        return self

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor) -> Int8Weight:
        """Encode a float tensor, rounded to nearest."""
        codes, scales = encode(weight.detach())
        return cls(codes, scales, weight.shape, weight.dtype)

    def decoded(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, as a new float tensor; in the layer's dtype unless another one is given."""
        shape = self.shape[::-1] if self.turned else self.shape
        wide = torch.mul(self.codes, self.scales.to(dtype or self.dtype)).flatten()
        values = wide[: shape.numel()].view(shape)
        return values.mT if self.turned else values

    @torch.no_grad()
    def write_(self, values: Tensor, generator: torch.Generator | None = None) -> None:
        """Encode new values in place, rounded stochastically if there is a generator."""
        codes, scales = encode(values.mT if self.turned else values, generator)
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def parts(self) -> list[Tensor]:
        """The tensors that are stored."""
        return [self.codes, self.scales]

    def _seen(self, codes: Tensor, scales: Tensor, turned: bool) -> Int8Weight:
        shape = self.shape if turned == self.turned else self.shape[::-1]
        return Int8Weight(codes, scales, shape, self.dtype, turned)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # pyright: ignore
        return f"Int8Weight({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        copy = self._seen(self.codes.clone(), self.scales.clone(), self.turned)
        if isinstance(self, Parameter):
            memo[id(self)] = copy = Parameter(copy, self.requires_grad)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.decoded().detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What torch's operations do to it."""
        kwargs, first = kwargs or {}, args[0]
        if func in _SHARED:
            return first._seen(first.codes, first.scales, first.turned)
        if func in _TURNED and _swaps(first, args[1:]):
            return first._seen(first.codes, first.scales, not first.turned)
        if func is _aten.clone.default and isinstance(first, cls):
            return first._seen(first.codes.clone(), first.scales.clone(), first.turned)
        written = [x for x in tree_leaves(writes(func, args, kwargs)) if isinstance(x, cls)]
        if not written:
            return func(*tree_map(_decoded, args), **tree_map(_decoded, kwargs))
        if written != [first]:
            raise LifeCycleError(
                f"{func.name()} would write into a list of weights that are stored in 8 bits, of "
                "which it would see copies; write them one at a time"
            )
        values = first.decoded()
        func(values, *tree_map(_decoded, args[1:]), **tree_map(_decoded, kwargs))
        first.write_(values)
        return first


def _swaps(weight: Tensor, dimensions: tuple[int, ...]) -> bool:
    return weight.dim() == 2 and {d % 2 for d in dimensions or (0, 1)} == {0, 1}


def _decoded(value: Any) -> Any:
    return value.decoded() if isinstance(value, Int8Weight) else value


def decode_all(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A model's state dict with float tensors for weights that are stored in 8 bits."""
    return {name: _decoded(value) for name, value in state_dict.items()}


def encode(values: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Codes (blocks, 256) and scales (blocks, 1) of a tensor, in its order of memory.

    Args:
        values: of any shape and float dtype.
        generator: of random numbers on the CPU: a value between two codes then becomes the upper
            one with the probability of its distance from the lower, so that its mean is exact.
            Without it, the nearest.
    """
    flat = values.flatten().float()
    blocks = nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True).div_(HIGHEST)
    tiny = torch.finfo(torch.float32).tiny
    # Not clamp: a NaN must come out of the decoder again.
    scaled = blocks / torch.where(scales < tiny, tiny, scales)
    if generator is None:
        scaled.round_()
    else:
        drawn = torch.rand(scaled.shape, generator=generator).to(scaled.device)
        scaled.add_(drawn).floor_()
    return scaled.clamp_(-HIGHEST, HIGHEST).to(torch.int8), scales


class Int8Storage:
    """The weights of a model that are stored in 8 bits while a run lasts.

    Attributes:
        weights: name -> the parameter in 8 bits.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Parameter]) -> None:
        for name, weight in weights.items():
            if sharding.is_sharded(weight):
                raise OptionError(
                    f"{name} is sharded, and blocks of 8-bit weights do not end with its rows; "
                    "leave weight_bits out, or use DDP through wrap="
                )
        stored = {w: Parameter(Int8Weight.of(w)) for w in weights.values()}
        self.weights = {name: stored[w] for name, w in weights.items()}
        self._places = [
            (module, key, stored[p])
            for module in model.modules()
            for key, p in module._parameters.items()
            if p is not None and p in stored
        ]
        for module, key, weight in self._places:
            module._parameters[key] = weight
        self._floats = stored

    def take_replaced(self) -> dict[Parameter, Parameter]:
        """Float parameter that left the model -> stored; once, for they are to be freed."""
        floats, self._floats = self._floats, {}
        return floats

    @torch.no_grad()
    def decode(self) -> dict[Parameter, Parameter]:
        """Put float parameters into the model again: stored -> float."""
        floats = {p: Parameter(_decoded(p.detach())) for p in self.weights.values()}
        for module, key, stored in self._places:
            if module._parameters.get(key) is stored:
                module._parameters[key] = floats[stored]
        return floats
