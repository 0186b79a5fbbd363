"""start and Run: the only caller of a method's hooks, in one order, for every kind of loop.

A step: gradients are accumulated, reduced and unscaled by the user's loop; `before_step` clips and
lets the methods read them; the optimizer steps; `after_step` lets the methods change the model.
A structural change ends a phase: the optimizer is rebound, followers get the same structure, the
other methods are told, the model is wrapped and compiled again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise import accounting, beside, checkpoint, composition, distributed, sharding, structure
from rankwise.errors import LifeCycleError
from rankwise.events import EventLog
from rankwise.followers import give_structure, inside
from rankwise.handle import ModelHandle, Wrap
from rankwise.isolation import Probe, all_or_nothing, losses_around, measure, ordinary_mode
from rankwise.method import NO_CHANGE, Change, Context, Method
from rankwise.optim.groups import Options, group_names, open_roles, regroup, settle
from rankwise.optim.learning_rate import LearningRateScale
from rankwise.optim.low_bit import packed, unpacked
from rankwise.optim.projected.states import part_states, whole_states
from rankwise.optim.rebind import rebind
from rankwise.ranks import Plan
from rankwise.running_statistics import Calibrate, check_calibrate, gather_statistics

if TYPE_CHECKING:
    from rankwise.checkpoint import Checkpoint


def start(
    model: nn.Module,
    methods: Method | Sequence[Method],
    optimizer: Optimizer | Callable[[nn.Module], Optimizer],
    *,
    steps_per_epoch: int | None = None,
    total_steps: int | None = None,
    sample: Any = None,
    clip_norm: float | None = None,
    wrap: Wrap | None = None,
    probe: Probe | None = None,
    calibrate: Calibrate | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    hooks: bool = True,
    seed: int = 0,
    resume: str | Path | None = None,
) -> Run:
    """Begin a low-rank training run around a model, one or more methods and your own optimizer.

    Prepares the model, makes the optimizer follow in place, and hangs on the optimizer's step
    hooks, so that the loop stays as it is. Call it before building an LR scheduler and before
    wrapping the model (DDP, torch.compile): give `wrap` instead. If it fails, model and optimizer
    are as they were, but for numbers that a checkpoint or worker 0 has given.

    Args:
        model: the bare model; changed in place.
        methods: a method, or several that compose.
        optimizer: an instance that holds the model's parameters, or a factory called with the
            prepared model. Its groups, learning rates, decay and state are kept.
        steps_per_epoch: optimizer steps in an epoch, for options given in epochs.
        total_steps: optimizer steps of the whole run, for options that are fractions of it.
        sample: an example input (tensor, tuple of arguments, dict of keywords); without it the
            first training forward is watched for execution order and shapes.
        clip_norm: clip the gradients' global norm before the methods see them.
        wrap: applied to the bare model now and after every structural change; see `Run.model`.
        probe: a loss of the model; recorded just before and after every structural change. Modes
            and torch's random state are put back after it.
        calibrate: returns some batches of inputs (as `sample`, those of training), from which
            BatchNorm's statistics are gathered anew after a structural change; else they adapt.
        on_event: called with every event (a dict of numbers and strings).
        hooks: False for loops that call `run.before_step` and `run.after_step` themselves.
        seed: of the methods' own random numbers.
        resume: a checkpoint of `rankwise.save`, or a trainer's (`rankwise.integrations`); model and
            optimizer are those of a fresh start, and take on structure, values (a trainer's from
            that trainer) and state. See `run.resumed.restore_scheduler`, `restore_random`.

    Returns:
        The run; train with `run.model`, end with `run.finish()`.

    Raises:
        LifeCycleError: a scheduler or wrapper came first, or the optimizer is not the model's.
        CompositionError: methods that do not go together.
        OptionError, SelectionError, PlanError: options that do not fit the model.
        CheckpointError: a checkpoint that cannot be resumed.
    """
    methods = tuple(methods) if isinstance(methods, Sequence) else (methods,)
    composition.check_methods(methods)
    composition.check_model(model, methods)
    composition.check_clip_norm(clip_norm)
    check_calibrate(calibrate)
    apart = any(method.trains_apart for method in methods)
    context = Context(steps_per_epoch, total_steps, seed, apart=apart)
    if sample is not None:
        context.trace = accounting.trace(model, sample)
    if isinstance(optimizer, Optimizer):
        composition.check_optimizer(optimizer, model)
    run = Run(model, methods, context, clip_norm, wrap, probe, calibrate, on_event)
    saved = None if resume is None else checkpoint.load(resume)
    with all_or_nothing(model, optimizer) as undo:
        for method in methods:
            undo.callback(method.leave, context)
            method.attach(context)
        run._adopt(optimizer, [] if saved is not None else run._prepare())
        if saved is not None:
            run.load_state_dict(*saved.of_this_worker())
            run.resumed = saved
            beside.wait_for_trainer(run)
        run._begin(hooks)
    return run


class Run:
    """A training run under way; made by `start`.

    Attributes:
        bare: the model without wrappers.
        optimizer: the user's optimizer.
        methods: in the order in which their hooks are called.
        context: lengths, seed and execution trace, shared with the methods.
        step: finished optimizer steps.
        resumed: the checkpoint this run came from, or None.
    """

    optimizer: Optimizer

    def __init__(
        self,
        model: nn.Module,
        methods: tuple[Method, ...],
        context: Context,
        clip_norm: float | None,
        wrap: Wrap | None,
        probe: Probe | None,
        calibrate: Calibrate | None,
        on_event: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.bare, self.methods, self.context = model, methods, context
        self.clip_norm, self.probe, self.calibrate = clip_norm, probe, calibrate
        self.step = 0
        self._log = EventLog(on_event)
        context.report = self._log.record
        self.resumed: Checkpoint | None = None
        self._handle = None if wrap is None else ModelHandle(model, wrap)
        self._followers = context.followers
        self._hooks: list[Any] = []
        self._unproven: list[tuple[str, nn.Parameter]] = []
        self._watcher: accounting.Watcher | None = None
        self._finished = False
        self._saved_rates: list[float] = []

    @property
    def events(self) -> list[dict[str, Any]]:
        """Everything that happened so far, as dicts of numbers and strings."""
        return self._log.events

    @property
    def model(self) -> Any:
        """What the loop calls: the bare model, or a stable handle to its present wrapper."""
        return self.bare if self._handle is None else self._handle

    @property
    def plan(self) -> Plan | None:
        """Which layers become low-rank, of the first method that decides it."""
        plans = (getattr(method, "plan", None) for method in self.methods)
        return next((plan for plan in plans if plan is not None), None)

    def before_step(self) -> None:
        """Call when gradients are accumulated, reduced and unscaled; the step hook does it."""
        if self._watcher is not None:
            self._look_at(self._watcher)
        if self._saved_rates:
            composition.warn_of_new_rates(self.optimizer, self._saved_rates, self.step)
            self._saved_rates = []
        if self._unproven:
            distributed.compare_gradients(
                (name, p.grad) for name, p in self._unproven if p.requires_grad
            )
            self._unproven = []
        if self.clip_norm is not None:
            composition.clip_gradients(self.optimizer, self.clip_norm)
        factor = math.prod(method.lr_scale(self.step + 1) for method in self.methods)
        self.context.lr_factor = factor
        with ordinary_mode():
            for method in self.methods:
                method.before_step(self.bare, self.step + 1)
        self._log.announce(self.plan, self.step)
        self._lr.scale(factor)

    def after_step(self) -> Change:
        """Call right after the optimizer's step; the step hook does it.

        Returns:
            What the methods changed, merged.
        """
        self._lr.restore()
        self.step += 1
        total = NO_CHANGE
        with ordinary_mode():
            for method in composition.behind_the_step(self.methods):
                began = time.perf_counter()
                change = method.after_step(self.bare, self.step)
                if change:
                    self._apply(change, method, began)
                    total = total | change
        return total

    def follow(self, copy: nn.Module) -> None:
        """Keep an averaged copy of the model (EMA, SWA) in step with structural changes.

        Its low-rank layers get its own weights, expressed in the basis of the model's V, so that
        averaging factors stays meaningful. AveragedModel, DDP and torch.compile are looked
        through.

        Raises:
            PlanError: it is no copy of the model.
        """
        inner = inside(copy, self.bare)
        give_structure(self.bare, inner)
        if not any(known is inner for known in self._followers):
            self._followers.append(inner)

    def finish(self) -> nn.Module:
        """End the run: finalise the methods, take the hooks off, return the bare model.

        Once is enough; a second call does nothing.
        """
        if self._finished:
            return self.bare
        self._finished = True
        with ordinary_mode():
            for method in self.methods:
                began = time.perf_counter()
                change = method.finalize(self.bare)
                if change:
                    self._apply(change, method, began, kind="finalize")
        self._log.announce(self.plan, self.step)  # decided at the last step
        composition.warn_of_missed_switches(self.methods, self.step)
        self._lr.restore()
        while self._hooks:
            self._hooks.pop().remove()
        composition.let_go(self.optimizer)
        if self._watcher is not None:
            self._watcher.remove()
        return self.bare

    def state_dict(self) -> dict[str, Any]:
        """Structure, optimizer, methods, position; `run.bare.state_dict()` holds the weights.

        Loads with weights_only=True. Where weights are sharded: DTensors, and a collective.
        """
        return {
            "step": self.step,
            "plan": structure.read_plan(self.bare),
            "methods": {key: method.state_dict() for key, method in self._keyed().items()},
            "parameter_names": group_names(self.optimizer, self._names()),
            "optimizer": packed(whole_states(self.optimizer)),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Take on a saved run's structure, weights and state; before the first step only.

        Args:
            state_dict: what `state_dict` returned; without "optimizer" if a trainer loads that.
            weights: the bare model's state dict of that moment; empty if a trainer loads it.

        Raises:
            PlanError: the structure does not fit this model.
            LifeCycleError: other methods or parameter groups than the saved run's.
        """
        if self.step:
            raise LifeCycleError(
                f"a run is resumed before its first step, this one is at {self.step}"
            )
        own, saved = list(self._keyed()), list(state_dict["methods"])
        if own != saved:
            raise LifeCycleError(f"the saved run used the methods {saved}, this one has {own}")
        change = structure.impose_plan(self.bare, state_dict["plan"])
        rebind(self.optimizer, change)
        if weights:
            sharding.load_weights(self.bare, weights)
        for method in self.methods:
            rebind(self.optimizer, method.resume(self.bare), self._names())
        regroup(self.optimizer, self._names(), state_dict["parameter_names"])
        if "optimizer" in state_dict:
            saved_optimizer = unpacked(state_dict["optimizer"])
            self.optimizer.load_state_dict(part_states(self.optimizer, saved_optimizer))
            self._saved_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.step = int(state_dict["step"])
        for key, method in self._keyed().items():
            method.load_state_dict(state_dict["methods"][key])
            method.on_change(self.bare, change)

    def _keyed(self) -> dict[str, Method]:
        return {f"{i}:{type(m).__name__}": m for i, m in enumerate(self.methods)}

    def _names(self) -> dict[nn.Parameter, str]:
        names = {p: name for name, p in self.bare.named_parameters()}
        for method in self.methods:
            names.update(method.parameter_names(self.bare))
        return names

    def _adopt(
        self, optimizer: Optimizer | Callable[[nn.Module], Optimizer], prepared: list[Change]
    ) -> None:
        given = isinstance(optimizer, Optimizer)
        self.optimizer = optimizer if given else composition.made_by(optimizer, self.bare)
        composition.check_proxies(self.methods, self.optimizer)
        for method in self.methods:
            open_roles(self.optimizer, method.roles())
        for change in filter(None, prepared):
            moments = rebind(self.optimizer, change, self._names())
            settle(self.optimizer, change)
            if given:
                composition.warn_of_losses(change, moments.outside)
        self.context.options = Options(self.optimizer)
        self._lr = LearningRateScale(self.optimizer)
        composition.leave_skipping_to_the_scaler(self.optimizer)

    def _prepare(self) -> list[Change]:
        changes: list[Change] = []
        for position, method in enumerate(self.methods):
            change = self._amended(method.prepare(self.bare))
            if change:  # methods that are not prepared yet have seen nothing else
                for earlier in self.methods[:position]:
                    earlier.on_change(self.bare, change)
            changes.append(change)
        if any(change.modules for change in changes):  # of a pretrained model
            gather_statistics(self.bare, self.calibrate, only_stale=True)
        return changes

    def _amended(self, change: Change) -> Change:
        for method in self.methods if change else ():
            change = method.amend(self.bare, change)
        return change

    def _look_at(self, watcher: accounting.Watcher) -> None:
        if watcher.trace:
            self.context.trace, self._watcher = watcher.trace, None
        elif watcher.over:  # that forward raised: out of memory, say, and the loop went on
            self._watcher = accounting.watch(self.bare)

    def _begin(self, hooks: bool) -> None:
        distributed.agree(repr(structure.read_plan(self.bare)), "the structure of the model")
        if self.context.trace is None:
            self._watcher = accounting.watch(self.bare)
        if self._handle is not None:
            self._handle.wrap_again()
        composition.check_wrapper(self.model, self.methods)
        self._log.announce(self.plan, self.step)
        composition.warn_of_missed_switches(self.methods, self.context.total_steps)
        if hooks:
            self._hooks = composition.hang_on(self.optimizer, self.before_step, self.after_step)

    def _apply(self, change: Change, method: Method, began: float, kind: str = "switch") -> None:
        change = self._amended(change)
        moments = rebind(self.optimizer, change, self._names())
        composition.warn_of_losses(change, moments.outside)
        if change.structural:
            self._end_phase(change, method)
        # Only now: a probe that raises must not leave the optimizer behind.
        before, after = losses_around(change, self.bare, self.probe)
        gathered = gather_statistics(self.bare, self.calibrate) if change.modules else 0
        self._log.changed(
            kind,
            change,
            self.bare,
            moments,
            step=self.step,
            method=type(method).__name__,
            loss_before=before,
            loss_after=after,
            loss_calibrated=measure(self.probe, self.bare) if gathered else None,
            seconds=time.perf_counter() - began,
        )

    def _end_phase(self, change: Change, method: Method) -> None:
        distributed.agree(repr(structure.read_plan(self.bare)), "the structure after the switch")
        new = change.joined()
        # Decompositions may differ in the last bits between machines: worker 0's count.
        distributed.broadcast_parameters(new, self.optimizer.state)
        for copy in self._followers:
            give_structure(self.bare, copy, change.modules)
        for other in self.methods:
            if other is not method:
                other.on_change(self.bare, change)
        if self._handle is not None:
            self._handle.wrap_again()
        elif distributed.workers() > 1 and not self.context.apart:
            names = self._names()
            self._unproven = [(names[p], p) for p in new if p in names]
