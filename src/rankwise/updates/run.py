"""What the methods of low-rank updates have in common while a run is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn import Parameter

from rankwise import closing, distributed
from rankwise.candidates import survey
from rankwise.errors import LifeCycleError, PlanError
from rankwise.layers import AdaptedLayer, Form, adapted_layers, low_rank_class
from rankwise.layers.adapted import Chunks
from rankwise.method import Change, Context
from rankwise.selection import Layers
from rankwise.updates.merging import merge_
from rankwise.updates.opening import (
    Opening,
    adapt,
    choose,
    factors_dtype,
    freeze_others,
    scale_from_alpha,
)
from rankwise.updates.workers import WorkerHeads


class Updates:
    """The open updates of a run: opened, found again on a resume, merged and closed.

    Args:
        context: of the run.
        opening: how updates are opened.
        layers: which layers.
        exclude: which not.
        others: what else goes on learning.
        rounding: of merges.
        chunks: how batches are divided among heads, or None.
        apart: every worker has a head of its own, see `updates.workers`.
        options: attributes to set on every layer: `own_mean`, `evaluates_open`.
    """

    def __init__(
        self,
        context: Context,
        opening: Opening,
        layers: Layers,
        exclude: Layers,
        others: str | Iterable[str],
        *,
        rounding: str = "stochastic",
        chunks: Chunks | None = None,
        apart: bool = False,
        **options: Any,
    ) -> None:
        self.context, self.opening = context, opening
        self.selected, self.others, self.rounding = (layers, exclude), others, rounding
        self.chunks, self.apart, self.options = chunks, apart, options
        self.workers: WorkerHeads | None = None
        self.layers: dict[str, AdaptedLayer] = {}
        self._frozen: tuple[Parameter, ...] = ()
        self._watch: Any = None

    @classmethod
    def of(
        cls, method: Any, context: Context, *, chunks: Chunks | None = None, **opening: Any
    ) -> Updates:
        """The updates that a method with the shared fields (`updates.fields`) asks for.

        Args:
            method: its fields `rank`, `alpha`, `dtype`, `split`, `layers`, `exclude` and `others`
                are read, and `init`, `rounding`, `own_mean`, `evaluate_open` where it has them.
            context: of the run.
            chunks: how batches are divided among heads.
            opening: what differs of `Opening`.
        """
        rank = opening.get("rank") or method.rank
        shared: dict[str, Any] = {
            "rank": rank,
            "scale": scale_from_alpha(method.alpha, rank),
            "draw": getattr(method, "init", "kaiming"),
            "dtype": factors_dtype(method.dtype),
            "split": method.split,
            "skip": distributed.worker() if method.trains_apart else 0,
        }
        return cls(
            context,
            Opening(**(shared | opening)),
            method.layers,
            method.exclude,
            method.others,
            rounding=getattr(method, "rounding", "stochastic"),
            chunks=chunks,
            apart=method.trains_apart,
            own_mean=getattr(method, "own_mean", True),
            evaluates_open=getattr(method, "evaluate_open", True),
        )

    def check(self, model: nn.Module) -> None:
        """Find out now what would stop `open` later: a selection of nothing, a rank too large."""
        form = Form(split=self.opening.split)
        chosen = choose(model, *self.selected, trace=self.context.trace, form=form)
        candidates = survey(model, form=form, layers=chosen)
        for name in chosen:
            stand_in: Any = low_rank_class(candidates[name].module, form)
            shape = stand_in.matrix_shape(candidates[name].module)
            if self.opening.rank > min(shape):
                raise PlanError(
                    f"{name}: an update of rank {self.opening.rank} does not fit a weight of "
                    f"{shape[0]}×{shape[1]}; lower the rank, or exclude the layer"
                )

    def open(
        self,
        model: nn.Module,
        step: int = 0,
        *,
        begin: Callable[[nn.Module], None] = lambda model: None,
    ) -> Change:
        """Open the updates; what does not learn any more leaves the optimizer.

        `begin` is what else a method does to them, before they are counted for the record.
        """
        if self.apart:  # there is no wrapper that would do it
            distributed.broadcast_([p.data for p in model.parameters()] + list(model.buffers()))
        change = adapt(
            model,
            self.opening,
            *self.selected,
            chunks=self.chunks,
            trace=self.context.trace,
            generator=lambda name: self.context.generator(step, name),
        )
        self._begin(model)
        begin(model)
        learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        stored = sum(p.numel() for p in model.parameters())
        self.context.report(
            {
                "event": "updates",
                "step": step,
                "layers": len(self.layers),
                "rank": self.opening.rank,
                "heads": self.opening.heads,
                "parameters": [stored, learning],
            }
        )
        return change | Change(frozen=self._frozen)

    def resume(self, model: nn.Module) -> Change:
        """Take up the updates that a restored structure has.

        Raises:
            LifeCycleError: it has other heads than this run.
        """
        if not adapted_layers(model):
            return Change()
        asked = (self.opening.heads, self.opening.anchored)
        for name, layer in adapted_layers(model).items():
            if (len(layer.heads), layer.merged is not None) != asked:
                raise LifeCycleError(
                    f"{name} has {len(layer.heads)} head(s) in the saved run, this one asks for "
                    f"{asked[0]}, or heads work together in another way; resume with the method's "
                    "options of the saved run"
                )
        self._begin(model)
        return Change(frozen=self._frozen)

    def _begin(self, model: nn.Module) -> None:
        self.layers = adapted_layers(model)
        self._frozen = freeze_others(model, self.others)
        for layer in self.layers.values():
            layer.chunks = self.chunks
            for name, value in self.options.items():
                setattr(layer, name, value)
        if self.chunks is not None:
            self._watch = self.chunks.watch(model)
        if self.apart:
            self.workers = WorkerHeads(model, self.layers)

    def merge(self, step: int) -> None:
        """Fold what is open into the weights, and let the heads go on from there."""
        if self.workers is not None:
            self.workers.merge(step, self.context.generator(step, "merge"), self.rounding)
            return
        for layers in self._fold(step):
            for layer in layers.values():
                layer.anchor_()

    def restart(self, step: int) -> tuple[Parameter, ...]:
        """Fold what is open into the weights, and begin with new updates.

        Returns:
            The parameters whose values are new.
        """
        own, *copies = self._fold(step)
        for name, layer in own.items():
            layer.restart_(self.opening.draw, self.context.generator(step, name))
            for copied in copies:
                copied[name].heads.load_state_dict(layer.heads.state_dict())
                copied[name].anchor_()
        heads = (p for layer in own.values() for p in layer.new_parameters())
        return tuple(dict.fromkeys(heads))

    def _fold(self, step: int) -> list[dict[str, AdaptedLayer]]:
        """Merge the updates of the model and of its averaged copies, each into its own weights."""
        everywhere = [self.layers, *(adapted_layers(copy) for copy in self.context.followers)]
        for layers in everywhere:
            merge_(layers, self.context.generator(step, "merge"), rounding=self.rounding)
        return everywhere

    def close(self, model: nn.Module) -> Change:
        """Merge the updates and put the dense layers back; all learns again that did before."""
        if self.workers is not None:
            self.merge(-1)
            self.workers.clear()
        self.release()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.layers, self._frozen = {}, ()
        return closing.merge_updates(model)

    def release(self) -> None:
        """Watch the model's forward no longer."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        if self.workers is not None:
            self.workers.release()
            self.workers = None
