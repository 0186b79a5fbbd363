"""Bytes that training keeps: weights, gradients, optimizer states; predicted, not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from rankwise.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes kept from one backward to the next.

    Attributes:
        weights: trained or not.
        gradients: once they are accumulated.
        states: of the optimizer, one number or more for each of the gradient.
        bases: of projected gradients.
        proxies: what the optimizer steps in place of projected matrices; they live during the
            step alone, when the dense gradients of backward and its activations are gone.
        largest_gradient: the largest dense gradient that exists for a moment beside these, while
            a matrix is projected; 0 if none is.
    """

    weights: int
    gradients: int
    states: int
    bases: int = 0
    proxies: int = 0
    largest_gradient: int = 0

    @property
    def total(self) -> int:
        """All that is there once gradients are accumulated: no activations, no proxies."""
        return self.weights + self.gradients + self.states + self.bases

    @property
    def beside_weights(self) -> int:
        """All of it but the weights."""
        return self.total - self.weights

    @property
    def at_step(self) -> int:
        """All that is there while the optimizer steps."""
        return self.total + self.proxies


def memory(
    model: nn.Module,
    *,
    states: int = 2,
    state_bytes: float | None = None,
    weight_bytes: float | None = None,
    basis_bytes: float = 4,
    ranks: Mapping[str, int] | None = None,
    only: bool = False,
) -> Memory:
    """Predict the bytes that a training step keeps, with some gradients projected.

    A matrix (M, N) at rank R < min(M, N) has a gradient and states of R max(M, N) numbers, as many
    in a proxy during the step, and a basis of R min(M, N) in float32 (GaLore, arXiv 2403.03507).
    Where gradients are summed over micro-batches without projection, as in the published program,
    they are dense: there predict gradients with `ranks=None`. Activations depend on the batch and
    are not counted.

    Args:
        model: any model, also on meta; a parameter shared by several modules counts once.
        states: numbers that the optimizer keeps for each of a gradient: Adam 2, momentum 1.
        state_bytes: bytes of each; by default those of the weight's own dtype. Optimizers with 8
            bits a number keep a scale per block besides: with blocks of 256, 1 + 4 / 256.
        weight_bytes: bytes of each number of a projected matrix; by default those of its dtype.
            Stored in 8 bits with a scale per block of 256 (Q-GaLore, 2407.08296), 1 + 4 / 256.
        basis_bytes: bytes of each number of a basis: 4, or half a byte for codes of 4 bits.
        ranks: name of a projected parameter -> its rank; a kernel counts as (out, in * k * k).
        only: count the parameters in `ranks` alone.

    Raises:
        OptionError: a name in `ranks` that is no parameter with two dimensions, a rank below 1, or
            a negative number of states or bytes.
    """
    wanted = dict(ranks or {})
    sizes = {"states": states, "state_bytes": state_bytes, "weight_bytes": weight_bytes}
    for name, value in {**sizes, "basis_bytes": basis_bytes}.items():
        if value is not None and value < 0:
            raise OptionError(f"{name}={value} must not be negative")
    each = _Bytes(state_bytes, weight_bytes, basis_bytes)
    total = dict.fromkeys(Memory.__dataclass_fields__, 0)
    for name, parameter in model.named_parameters():
        rank = wanted.pop(name, None)
        if only and rank is None:
            continue
        for part, count in vars(_of(name, parameter, states, each, rank)).items():
            previous = total[part]
            total[part] = max(previous, count) if part == "largest_gradient" else previous + count
    if wanted:
        name = next(iter(wanted))
        raise OptionError(f"ranks names '{name}', which is no parameter of {type(model).__name__}")
    return Memory(**total)


@dataclass(frozen=True)
class _Bytes:
    """Of one number; None: as in the parameter."""

    state: float | None
    weight: float | None
    basis: float


def _of(
    name: str, parameter: nn.Parameter, states: int, number: _Bytes, rank: int | None
) -> Memory:
    size, each = parameter.numel(), parameter.element_size()
    if not parameter.requires_grad:
        return Memory(weights=size * each, gradients=0, states=0)
    kept, basis = size, 0
    if rank is not None:
        if parameter.dim() < 2 or rank < 1:
            raise OptionError(
                f"{name} of shape {tuple(parameter.shape)} at rank {rank}: only a matrix or kernel "
                "can be projected, to at least one direction"
            )
        rows = parameter.shape[0]
        short, long = sorted((rows, size // rows))
        if rank < short:
            kept, basis = rank * long, rank * short
    stored = each if rank is None or number.weight is None else number.weight
    return Memory(
        weights=round(size * stored),
        gradients=kept * each,
        states=round(states * kept * (each if number.state is None else number.state)),
        # Bases of float32 are of the weight's dtype if that is wider.
        bases=round(basis * (number.basis if number.basis < 4 else max(number.basis, each))),
        proxies=0 if rank is None else kept * each,
        largest_gradient=0 if rank is None else size * each,
    )
