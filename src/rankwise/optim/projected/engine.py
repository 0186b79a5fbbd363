"""Low-rank gradients around any optimizer: one engine, of which the methods are choices.

The optimizer steps a proxy of the projected shape for every matrix. Gradients are projected as
backward produces them; what a proxy has become after the step is lifted and added to the weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from rankwise import distributed, sharding
from rankwise.errors import LifeCycleError, OptionError
from rankwise.layers import adapted_layers
from rankwise.method import Change, Context, Successors
from rankwise.optim.projected.choices import Choices
from rankwise.optim.projected.gradient import LowRankGrad
from rankwise.optim.projected.int8 import Int8Storage, Int8Weight
from rankwise.optim.projected.matrix import ProjectedMatrix
from rankwise.optim.projected.probe import inside_compiled_code
from rankwise.optim.projected.reduction import WorkerMean
from rankwise.optim.projected.refresh import Bases
from rankwise.optim.projected.rounding import compensated_, stochastic_
from rankwise.optim.projected.updates import Step

_HALF = (torch.bfloat16, torch.float16)


class ProjectedGradients:
    """Projects gradients, keeps bases, and lifts what the optimizer made of the proxies.

    Args:
        model: the bare model.
        weights: name -> parameter to project.
        choices: the method.
        context: of the run, for options and state of the optimizer.

    Attributes:
        matrices: name -> the projected matrix, in the order of `weights`.
        bases: when and how their bases are renewed.
        mean: how gradients are averaged over data-parallel workers; None for one worker.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Parameter],
        choices: Choices,
        context: Context,
    ) -> None:
        self.choices, self.context = choices, context
        self.stored = Int8Storage(model, weights) if choices.weight_bits == 8 else None
        weights = weights if self.stored is None else self.stored.weights
        self.bases = Bases(choices, context)
        self.matrices = {
            name: ProjectedMatrix(
                self.bases, name, weight, choices.rank_of(weight), _side(choices, name, weight)
            )
            for name, weight in weights.items()
        }
        adapted = adapted_layers(model).values()
        self._factors = {p for layer in adapted for p in layer.heads.parameters()}
        self.bases.turns = {name: i for i, name in enumerate(weights)}
        self._moved: list[tuple[ProjectedMatrix, LowRankGrad, Tensor | None]] = []
        self._checked = False
        self.mean: WorkerMean | None = None
        for matrix in self.matrices.values():
            matrix.watch()
        whole = {n: w for n, w in weights.items() if not sharding.is_sharded(w)}
        if distributed.workers() > 1 and whole and not context.apart:
            self.mean = WorkerMean(model, whole, self._held_tensors)

    def _held_tensors(self) -> Iterable[Tensor]:
        for matrix in self.matrices.values():
            held = matrix.held()
            if held is not None and not sharding.is_sharded(matrix.weight):
                held.settle()
                held.seen = None
                yield from held.parts()

    # ------------------------------------------------------------------ the life cycle

    def begin(self) -> Change:
        """The proxies take the weights' places in the optimizer; the model keeps the weights."""
        pairs = [(m.weight, m.proxy) for m in self.matrices.values()]
        stored = {} if self.stored is None else self.stored.take_replaced()
        return Change(
            replaced={old: Successors((new,)) for old, new in stored.items()},
            added={w: Successors((p,)) for w, p in pairs},
            frozen=tuple(w for w, _ in pairs),
        )

    def parameter_names(self) -> dict[Parameter, str]:
        """The proxies, named after their weights."""
        return {m.proxy: f"{name}.projected" for name, m in self.matrices.items()}

    def follow(self, change: Change) -> Change:
        """Another method's change, with proxies in the places of the weights that they stand for.

        A weight that is frozen or replaced is projected no longer. One whose values are new gets a
        new basis and forgets all moments, which spoke of the old one, whatever part of them the
        change would keep; with all of them the basis stays too.
        """
        stand_ins: dict[Parameter, Parameter] = {}
        leaving: list[Parameter] = []
        frozen, rewritten = set(change.frozen), dict(change.rewritten)
        for name, matrix in list(self.matrices.items()):
            weight, proxy = matrix.weight, matrix.proxy
            behind = change.added.get(weight)
            if behind is not None and proxy in set(behind.parameters):  # this engine's own change
                continue
            if weight in frozen or weight in change.replaced:
                self.matrices.pop(name).release()
                stand_ins[weight] = proxy
                leaving += [proxy] if weight in frozen else []
            keep = rewritten.pop(weight, None)
            if keep is not None:
                whole = not isinstance(keep, Tensor) and keep >= 1
                rewritten[proxy] = 1.0 if whole else 0.0
                if not whole:
                    matrix.forget()
        return replace(
            change,
            added={stand_ins.get(p, p): new for p, new in change.added.items()},
            replaced={stand_ins.get(p, p): new for p, new in change.replaced.items()},
            frozen=(*change.frozen, *leaving),
            rewritten=rewritten,
        )

    @torch.no_grad()
    def before_step(self) -> None:
        """Gradients are accumulated and clipped: what every form of update needs first."""
        if inside_compiled_code():
            raise LifeCycleError(
                "optimizer.step was compiled, but torch.compile reads the gradients of proxies "
                "past the code that projects them; step uncompiled (fused=True is as fast), and "
                "compile the model alone"
            )
        self._check_membership()
        self._moved = []
        for matrix in self.matrices.values():
            held = matrix.held()
            if held is None:
                continue
            small = held.look()
            held.settle()
            self._add_coupled_decay(matrix, held, small)
            gram = None if held.sketch is None else self.bases.gram(matrix)
            self.choices.update.begin(self.bases, matrix, held)
            matrix.wake()
            self._moved.append((matrix, held, gram))

    def _add_coupled_decay(self, matrix: ProjectedMatrix, held: LowRankGrad, small: Tensor) -> None:
        group = self.bases.options(matrix)
        decay = group.get("weight_decay") or 0.0
        if not decay or self.bases.decoupled(matrix):
            return
        # The proxy is zero, so the optimizer's own decay would see no weight.
        decay = -decay if group.get("maximize") else decay
        weight = matrix.local(matrix.weight)
        matrix.project_into(small, weight, decay)
        if held.full is not None:
            held.full.add_(weight, alpha=decay)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Lift what the proxies have become into the weights, and let them go."""
        for matrix, held, gram in self._moved:
            self._apply(matrix, held)
            if gram is not None and held.sketch is not None:
                self.bases.track(matrix, held.sketch, gram)
            elif self.choices.track is not None:
                self.bases.check_momentum(matrix)
            self.bases.renew(matrix)
            held.full = held.sketch = held.seen = None
            matrix.rest()
        self._moved = []
        self.bases.step = step
        self._report()

    def finalize(self) -> Change:
        """The weights take their places in the optimizer again; nothing watches gradients."""
        self.release()
        floats = {} if self.stored is None else self.stored.decode()
        pairs = [(floats.get(m.weight, m.weight), m.proxy) for m in self.matrices.values()]
        return Change(
            added={p: Successors((w,)) for w, p in pairs}, frozen=tuple(p for _, p in pairs)
        )

    def release(self) -> None:
        """Watch gradients no longer."""
        if self.mean is not None:
            self.mean.release()
        for matrix in self.matrices.values():
            matrix.release()

    def state_dict(self) -> dict[str, Any]:
        """Bases and counters of every matrix."""
        return {
            "step": self.bases.step,
            "matrices": {name: m.state_dict() for name, m in self.matrices.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            LifeCycleError: it is of other matrices.
        """
        saved = state_dict["matrices"]
        for name in [n for n, m in self.matrices.items() if m.weight in self._factors]:
            if name not in saved:  # of an update that was opened while others were projected
                self.matrices.pop(name).release()
        if saved.keys() != self.matrices.keys():
            other = sorted(saved.keys() ^ self.matrices.keys())
            raise LifeCycleError(
                f"the saved run projected other matrices: {other[0]} is in one of them alone; "
                "resume with the layers and exclude of the saved run"
            )
        self.bases.step = int(state_dict["step"])
        for name, matrix in self.matrices.items():
            matrix.load_state_dict(saved[name])

    # ------------------------------------------------------------------ the optimizer's side

    def _check_membership(self) -> None:
        """Weights that this optimizer does not hold are none of ours: another may step them."""
        if self._checked:
            return
        self._checked = True
        outside = [name for name, m in self.matrices.items() if not self.bases.options(m)]
        if outside and len(outside) == len(self.matrices):
            raise LifeCycleError(
                f"the optimizer holds none of the {len(outside)} selected matrices, {outside[0]} "
                "among them; select layers that it trains"
            )
        for name in outside:
            self.matrices.pop(name).release()

    def _report(self) -> None:
        """Say which matrices have begun to keep their old basis for want of a fit gradient."""
        if not self.bases.failing:
            return
        self.context.report(
            {
                "event": "basis kept",
                "step": self.bases.step,
                "matrices": len(self.bases.failing),
                "first": self.bases.failing[0],
                "failures": sum(m.failures for m in self.matrices.values()),
                "reason": "gradient zero or not finite, or its decomposition failed",
            }
        )
        self.bases.failing.clear()

    # ------------------------------------------------------------------ the weights

    def _apply(self, matrix: ProjectedMatrix, held: LowRankGrad) -> None:
        group, weight = self.bases.options(matrix), matrix.local(matrix.weight.data)
        rate = self.bases.learning_rate(matrix)
        decay = float(group.get("weight_decay") or 0.0) if self.bases.decoupled(matrix) else 0.0
        target = self._target(matrix, weight)
        self.choices.update.apply(
            Step(
                matrix=matrix,
                held=held,
                target=target,
                keep=1 - rate * decay,
                scale=self.choices.scale * _shape_gain(group, matrix),
                rate=rate,
                sign=-1.0 if group.get("maximize") else 1.0,
                total=self.bases.total(matrix),
            )
        )
        self._write(matrix, weight, target)

    def _target(self, matrix: ProjectedMatrix, weight: Tensor) -> Tensor:
        """The weight as a matrix (M, N) to be changed: itself, or a copy to be written back."""
        if isinstance(weight, Int8Weight):
            return weight.decoded(torch.float32).flatten(1)  # else codes wander by rounding
        if self._rounds(weight):
            target = weight.flatten(1).float()
            lost = matrix.memory.get("lost")
            return target if lost is None else target.add_(lost)
        return weight.flatten(1)  # a copy of channels-last kernels

    def _rounds(self, weight: Tensor) -> bool:
        return self.choices.rounding != "nearest" and weight.dtype in _HALF

    def _write(self, matrix: ProjectedMatrix, weight: Tensor, target: Tensor) -> None:
        generator = self.context.generator
        if isinstance(weight, Int8Weight):
            weight.write_(target.view(weight.shape), generator(self.bases.step + 1, matrix.name))
        elif not self._rounds(weight):
            if target.data_ptr() != weight.data_ptr():
                weight.copy_(target.view(weight.shape))
        elif self.choices.rounding == "stochastic":
            target = target.view(weight.shape)
            stochastic_(weight, target, generator(self.bases.step + 1, matrix.name))
        else:
            lost = matrix.memory.setdefault("lost", torch.zeros_like(target, dtype=weight.dtype))
            compensated_(weight, target.view(weight.shape), lost.view(weight.shape))


def _side(choices: Choices, name: str, weight: Parameter) -> str:
    if not sharding.is_sharded(weight):
        return choices.side
    if not sharding.split_by_rows(weight):
        places: Any = getattr(weight, "placements", ())
        raise OptionError(
            f"{name} is placed as {', '.join(map(str, places))}, but gradients are projected on "
            "whole rows alone; shard it with fully_shard (Shard(0)), or exclude it"
        )
    if choices.side not in ("short", "right") or choices.basis == "svd":
        raise OptionError(
            f"side={choices.side!r} with basis={choices.basis!r} needs whole gradients, but the "
            "weights are sharded by rows; take side='right' and basis='power'"
        )
    return "right"  # rows are local: R_i = G_i Q needs no communication


def _shape_gain(group: Mapping[str, Any], matrix: ProjectedMatrix) -> float:
    """Muon's factor on the rate for W's shape, over the one it used for the proxy's."""
    if "ns_steps" not in group:
        return 1.0
    kind = group.get("adjust_lr_fn")

    def factor(rows: int, columns: int) -> float:
        if kind == "match_rms_adamw":
            return 0.2 * max(rows, columns) ** 0.5
        return max(1.0, rows / columns) ** 0.5

    rows, columns = matrix.proxy.shape
    return factor(*matrix.shape) / factor(rows, columns)
