"""Heads with a frozen orthonormal basis for a factor, so that the other learns in a subspace.

With a left basis P (M, R) the head is P V: the gradient of V is P^T G, the projected one, and the
optimizer's moments of V live in the subspace. With a right basis Q (N, R) the head is U Q^T. The
shorter side has the basis.

A new basis is orth(G V^T): V is what was learned since the last merge, and G V^T the gradient that
backward forms of P anyway. Of the energy of the next batch's gradient it captures .957 of what the
best basis would, a power step with the whole gradient .972, random directions .251
(benchmarks/head_bases.py: 28 matrices of a small LLaMA, 12 merges, rank 32).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from rankwise import distributed
from rankwise.errors import OptionError
from rankwise.layers import AdaptedLayer, LowRankLayer
from rankwise.linalg import working_dtype
from rankwise.method import Change
from rankwise.optim.projected import moments as moment_rules
from rankwise.optim.projected.subspace import orthonormal
from rankwise.updates.run import Updates

IGNORED = "_ddp_params_and_buffers_to_ignore"


@dataclass(eq=False)
class HeadBasis:
    """The basis of one head, and the sketch that its successor is found from.

    Attributes:
        name: of the head.
        head: the low-rank layer.
        part: the child that holds the basis, "u" or "v".
        sketch: G V^T (or G^T U), summed over the micro-batches of one step; None before.
    """

    name: str
    head: LowRankLayer
    part: str
    sketch: Tensor | None = None
    _handle: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, name: str, head: LowRankLayer) -> HeadBasis:
        """The basis on the shorter side of a head's weight, frozen."""
        rows = head.to_factor("u", head.u.weight).shape[-2]
        columns = head.to_factor("v", head.v.weight).shape[-1]
        basis = cls(name, head, "v" if rows >= columns else "u")
        basis.parameter.requires_grad_(False)
        return basis

    @property
    def parameter(self) -> Parameter:
        """The factor that is the basis."""
        return getattr(self.head, self.part).weight

    @property
    def learning(self) -> Parameter:
        """The factor that learns."""
        return getattr(self.head, "u" if self.part == "v" else "v").weight

    @property
    def whole(self) -> bool:
        """Whether it spans its whole space."""
        directions = self.columns().shape
        return directions[-1] == directions[-2]

    def columns(self, values: Tensor | None = None) -> Tensor:
        """The basis, or what has its parameter's shape, with directions as columns (..., D, R)."""
        factor = self.head.to_factor(self.part, self.parameter if values is None else values)
        return factor if self.part == "u" else factor.mT

    @torch.no_grad()
    def set_columns(self, columns: Tensor) -> None:
        """Use another basis (..., D, R)."""
        factor = columns if self.part == "u" else columns.mT
        self.parameter.copy_(self.head.from_factor(self.part, factor))

    def project(self, weight: Tensor) -> Tensor:
        """P^T W or W Q of a weight or gradient, in the shape of what learns."""
        matrix, basis = self.head.as_matrix(weight, self.head.blocks), self.columns()
        if self.part == "u":
            return self.head.from_factor("v", basis.mT @ matrix)
        return self.head.from_factor("u", matrix @ basis)

    def listen(self) -> None:
        """Gather the sketch in the backward passes to come: the ordinary gradient of the basis."""
        self.parameter.requires_grad_(True)
        self._handle = self.parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: Tensor) -> None:
        # Not left in .grad, where it would count in the norm that gradients are clipped by.
        assert parameter.grad is not None
        found, parameter.grad = parameter.grad, None
        self.sketch = found if self.sketch is None else self.sketch.add_(found)

    def settle(self) -> None:
        """Listen no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.parameter.requires_grad_(False)

    def turn(self, by: Tensor) -> Callable[[Tensor], Tensor]:
        """Multiplies the directions of a moment of what learns by a matrix (..., R, R)."""
        part = "v" if self.part == "u" else "u"

        def turned(moment: Tensor) -> Tensor:
            factor, own = self.head.to_factor(part, moment), by.to(moment.dtype)
            return self.head.from_factor(part, own.mT @ factor if part == "v" else factor @ own)

        return turned


class HeadBases:
    """The bases of all heads of a run: drawn, listened for, renewed.

    Args:
        method: its `scale`, `merge_every`, `renew`, `moments` and `trains_apart` are read.
        updates: of the run.

    Attributes:
        all: every head's basis and the layer it is of.
        kept: how often a basis stayed because its sketch was zero or not finite.
    """

    ROLE: ClassVar[str] = "multi-head galore"

    def __init__(self, method: Any, updates: Updates) -> None:
        self.method, self.updates, self.context = method, updates, updates.context
        # The gradient of V is then P^T G itself, as GaLore's, and not s times that.
        updates.options["gain"] = 1 / method.scale
        self.all: dict[HeadBasis, AdaptedLayer] = {}
        self.kept = self._next = 0

    def _find(self, model: nn.Module) -> None:
        seen: set[Parameter] = set()  # of tied layers
        # A worker's head is named as the one of its number among the heads of one process.
        first = distributed.worker() if self.method.trains_apart else 0
        for name, layer in self.updates.layers.items():
            for n, head in enumerate(layer.heads):
                assert isinstance(head, LowRankLayer)
                if head.u.weight not in seen:
                    self.all[HeadBasis.of(f"{name}.heads.{first + n}", head)] = layer
                seen.add(head.u.weight)
        method = self.method
        if method.merge_every == 1 and method.renew and not all(b.whole for b in self.all):
            raise OptionError(
                "merge_every=1 leaves nothing learned to find new bases from; take 2 or more, or "
                "renew=0 to keep the random ones"
            )
        if distributed.workers() > 1:
            self._hide_from_wrappers(model)

    def _hide_from_wrappers(self, model: nn.Module) -> None:
        # Sketches are summed here. A wrapper made while they are gathered (a resume) would later
        # wait for gradients of bases in vain.
        bases = {basis.parameter for basis in self.all}
        places = model.named_parameters(remove_duplicate=False)
        ignored = {*getattr(model, IGNORED, ()), *(n for n, p in places if p in bases)}
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """Random directions, others for every head and worker; what learns is zero."""
        self._find(model)
        for basis in self.all:
            generator = self.context.generator(0, basis.name)
            drawn = torch.randn(basis.columns().shape, generator=generator, device="cpu")
            wide = drawn.to(basis.parameter.device, working_dtype(basis.parameter.dtype))
            basis.set_columns(orthonormal(wide))
            basis.learning.zero_()
        self.listen(1)

    def without_decay(self, opened: Change) -> Change:
        """The change that opened the updates, with heads in a group without weight decay."""
        added = {p: replace(new, role=self.ROLE) for p, new in opened.added.items()}
        return replace(opened, added=added)

    def resume(self, model: nn.Module) -> Change:
        """Take up the bases of a restored model, which the optimizer does not hold."""
        self._find(model)
        return Change(frozen=tuple(basis.parameter for basis in self.all))

    def listen(self, step: int) -> None:
        """Gather sketches in a step to come, if new bases are due behind it."""
        self._next = step
        if self.method.renew and step % (self.method.merge_every * self.method.renew) == 0:
            for basis in self.all:
                basis.listen()

    def state_dict(self) -> dict[str, Any]:
        """Counters."""
        return {"next": self._next, "kept": self.kept}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from saved counters."""
        self.kept = int(state_dict["kept"])
        self.listen(int(state_dict["next"]))

    def settle(self) -> None:
        """Gather no sketches."""
        for basis in self.all:
            basis.settle()

    @torch.no_grad()
    def restart(self) -> None:
        """What learns begins again at zero, in new directions where there is a sketch of them."""
        for basis in self.all:
            basis.learning.zero_()
        self.settle()
        fresh = [basis for basis in self.all if basis.sketch is not None and not basis.whole]
        if not self.context.apart:
            distributed.sum_(basis.sketch for basis in fresh if basis.sketch is not None)
        for basis in fresh:
            self._renew(basis)
        for basis in self.all:
            basis.sketch = None

    def _renew(self, basis: HeadBasis) -> None:
        assert basis.sketch is not None
        sketch = basis.columns(basis.sketch).to(working_dtype(basis.sketch.dtype))
        if not bool(sketch.isfinite().all()) or not bool(sketch.any()):
            self.kept += 1
            return
        old = basis.columns().to(sketch.dtype, copy=True)
        # Scaled, because sketches are as small as the product of a gradient and a rate.
        new = orthonormal(sketch / sketch.abs().max())
        basis.set_columns(new)
        options, learning = self.context.options, basis.learning
        state = {} if options is None else options.state(learning)
        if self.method.moments == "reset":
            moment_rules.reset_(state, basis.name)
        elif self.method.moments == "rotate" and options is not None:
            cosines = old.mT @ new
            turns = basis.turn(cosines), basis.turn(cosines.square())
            moment_rules.rotate_(state, options.group(learning) or {}, *turns, basis.name)

    @torch.no_grad()
    def decay(self) -> None:
        """The user's weight decay, of W and what is open of it: the heads' own group has none."""
        done: set[Parameter] = set()
        options = self.context.options
        for basis, layer in self.all.items():
            weight, learning = layer.base.weight, basis.learning
            asked = self.context.weight_decay(learning)
            if not asked or options is None:
                continue
            if not options.decoupled_decay(learning):
                if learning.grad is not None:
                    learning.grad.add_(basis.project(weight), alpha=asked)
                    learning.grad.add_(learning, alpha=asked * layer.scale)
                continue
            left = 1 - self.context.learning_rate(learning) * asked
            learning.mul_(left)
            if weight not in done:
                done.add(weight)
                weight.mul_(left)
