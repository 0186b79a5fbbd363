"""What must hold before a run's first step: methods that compose, a bare model, its optimizer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from rankwise import distributed, sharding
from rankwise.errors import CompositionError, LifeCycleError, OptionError
from rankwise.isolation import untraced
from rankwise.method import Change, Method
from rankwise.optim.groups import held_by
from rankwise.optim.projected.gradient import Proxy
from rankwise.optim.projected.probe import depends_on_values, mixes_rows, refuse_unnamed
from rankwise.updates.workers import AVERAGED

logger = logging.getLogger(__name__)


def check_methods(methods: Sequence[Method]) -> None:
    """Check composition by what the methods declare: `provides`, `needs`, `conflicts`.

    Raises:
        CompositionError: naming both methods and the reason.
    """
    for method in methods:
        if not isinstance(method, Method):
            hint = f"; write {method.__name__}()" if isinstance(method, type) else ""
            raise CompositionError(f"{method!r} is no method{hint}")
    if len({id(method) for method in methods}) < len(methods):
        raise CompositionError(
            "the same method instance is given twice, so its hooks would be called twice a step; "
            "give each one its own"
        )
    if not methods:
        raise CompositionError("no method given; rankwise.Dense() trains without low rank")
    for method in methods:
        name = type(method).__name__
        others = [m for m in methods if m is not method]
        offered = {feature for other in others for feature in other.provides}
        for feature, reason in method.needs.items():
            if feature not in offered:
                raise CompositionError(
                    f"{name} needs {feature}: {reason}; add a method that gives it"
                )
        for other in others:
            for feature in other.provides & method.conflicts.keys():
                raise CompositionError(
                    f"{name} and {type(other).__name__} do not go together: "
                    f"{method.conflicts[feature]}; keep one of them"
                )


def check_model(model: nn.Module, methods: Sequence[Method]) -> None:
    """Refuse wrappers: surgery must see the bare model.

    Sharded weights are for methods alone that leave the structure as it is.

    Raises:
        LifeCycleError: saying how to pass the wrapper instead.
    """
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        name = type(model).__name__
        raise LifeCycleError(
            f"the model is already wrapped in {name}; pass the bare model and "
            f"rankwise.start(..., wrap={name}), which wraps it again after every structural change"
        )
    if hasattr(model, "_orig_mod"):
        raise LifeCycleError(
            "the model is already compiled; pass the bare model and rankwise.start(..., "
            "wrap=torch.compile), which compiles it again after every structural change"
        )
    sharded = [n for n, p in model.named_parameters() if sharding.is_sharded(p)]
    for method in methods if sharded else ():
        if method.provides - {"low-rank gradients"}:
            raise LifeCycleError(
                f"parameter {sharded[0]} is sharded (FSDP2 / DTensor), which this version cannot "
                f"factorise, as {type(method).__name__} would; use DDP through wrap=, factorise "
                "before sharding, or take a method of low-rank gradients"
            )


def check_wrapper(model: Any, methods: Sequence[Method]) -> None:
    """Refuse a wrapper that averages gradients over workers that train apart.

    Raises:
        LifeCycleError: naming the method.
    """
    for method in methods:
        if method.trains_apart and distributed.averages_gradients(model):
            raise LifeCycleError(f"{type(method).__name__}: {AVERAGED}")


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse optimizers that the run cannot follow.

    Raises:
        LifeCycleError: of another model, closure-driven, or already under a scheduler.
    """
    if not isinstance(optimizer, Optimizer):
        raise LifeCycleError(
            f"a {type(optimizer).__name__} is no optimizer; pass an instance, or a factory such as "
            "lambda model: torch.optim.SGD(model.parameters(), lr=0.1)"
        )
    if isinstance(optimizer, LBFGS):
        raise LifeCycleError(
            "LBFGS evaluates the model several times within a step, so no hook sees its gradients; "
            "use an optimizer whose step() needs no closure"
        )
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise LifeCycleError(
            "an LR scheduler was built on this optimizer before rankwise.start; build it after, so "
            "that it also drives the parameter groups that methods add"
        )
    if optimizer in _held:
        raise LifeCycleError(
            "this optimizer already belongs to a run; pass several methods as a list to one "
            "rankwise.start, or call finish() on the other run first"
        )
    if not held_by(optimizer, model.parameters()):
        raise LifeCycleError(
            f"the optimizer holds none of the parameters of {type(model).__name__}; build it from "
            "this model's parameters(), after the model was moved or changed"
        )


def made_by(factory: Callable[[nn.Module], Optimizer], model: nn.Module) -> Optimizer:
    """What an optimizer factory makes of the prepared model.

    Raises:
        LifeCycleError: it is not such a factory.
    """
    if not callable(factory) or (isinstance(factory, type) and issubclass(factory, Optimizer)):
        what = factory.__name__ if isinstance(factory, type) else f"a {type(factory).__name__}"
        raise LifeCycleError(
            f"{what} is neither an optimizer nor a factory called with the model; pass an "
            "instance, or lambda model: torch.optim.SGD(model.parameters(), lr=0.1)"
        )
    optimizer = factory(model)
    check_optimizer(optimizer, model)
    return optimizer


def check_clip_norm(clip_norm: float | None) -> None:
    """Refuse a norm to clip to that would turn gradients off, or around.

    Raises:
        OptionError: not above 0.
    """
    if clip_norm is not None and not clip_norm > 0:
        raise OptionError(f"clip_norm={clip_norm} must be above 0; leave it out not to clip")


def clip_gradients(optimizer: Optimizer, norm: float) -> None:
    """Clip the global norm of all gradients that the optimizer steps by.

    The gradient of a proxy is asked of the weight it stands for, which knows what was left out.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_([getattr(p, "stands_for", p) for p in held], norm)


def check_proxies(methods: Sequence[Method], optimizer: Optimizer) -> None:
    """Refuse an optimizer that cannot step proxies, if a method projects gradients.

    Raises:
        LifeCycleError: its updates depend on the values of the parameters, its moments cannot be
            turned as the method asks, or it mixes the rows that sharding keeps apart.
    """
    for method in methods:
        if "low-rank gradients" not in method.provides:
            continue
        asked, cls = type(method).__name__, type(optimizer)
        reason = depends_on_values(optimizer)
        if reason:
            raise LifeCycleError(
                f"{asked} cannot use {cls.__name__}, which {reason}: it would step proxies that "
                "are zero before every step; take one whose updates depend on gradients alone, "
                "such as AdamW, SGD, Lion or Muon"
            )
        spread = any(sharding.is_sharded(p) for g in optimizer.param_groups for p in g["params"])
        if spread and mixes_rows(optimizer):
            raise LifeCycleError(
                f"{asked} cannot use {cls.__name__} on sharded weights: its update of a row "
                "depends on the other rows, which other workers hold; take AdamW, SGD or Lion, or "
                "DDP through wrap="
            )
        rule = getattr(method, "moments_rule", "keep")
        if rule != "keep" and cls.__module__.partition(".")[0] == "bitsandbytes":
            raise LifeCycleError(
                f"{asked} would {rule} the moments of {cls.__name__} with each new basis, but "
                "they are stored in codes of bitsandbytes; take moments='keep', or the 8-bit "
                "optimizers of torchao"
            )


def behind_the_step(methods: Sequence[Method]) -> list[Method]:
    """The order in which they react to a step: those that complete it by lifting proxies first."""
    return sorted(methods, key=lambda method: "low-rank gradients" not in method.provides)


def closure_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Any] | None:
    """The closure among the arguments of a step; Accelerate passes None by position."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def followed_by(closure: Callable[..., Any], before: Callable[[], object]) -> Callable[..., Any]:
    """A closure that lets a run see the gradients it has computed.

    Raises:
        LifeCycleError: when it is evaluated once more.
    """
    calls = []

    def both() -> Any:
        if calls:
            raise LifeCycleError(
                "the optimizer evaluates its closure several times within a step, so no hook can "
                "tell which gradients it steps by; use one that evaluates it once"
            )
        calls.append(closure())
        before()
        return calls[0]

    return both


# Optimizers whose step hooks a run hangs on: with two runs every step would count twice.
_held: WeakSet[Optimizer] = WeakSet()
_resting: WeakSet[Optimizer] = WeakSet()


def hang_on(
    optimizer: Optimizer, before: Callable[[], object], after: Callable[[], object]
) -> list[RemovableHandle]:
    """Have a run's two hooks called around every step of the optimizer, which is now the run's.

    A closure is waited for: `before` is called behind it, still ahead of the update. A step that
    calls that of its parent class is one step.
    """

    def on_step(
        _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if optimizer in _resting or _called_by_another_step(optimizer):
            return None
        closure = closure_of(args, kwargs)
        if closure is None:
            before()
            return None
        # It computes, and clips, the gradients within the step.
        others = {key: value for key, value in kwargs.items() if key != "closure"}
        return (args[0], followed_by(closure, before), *args[2:]), others

    def on_stepped(*_: object) -> None:
        if optimizer not in _resting and not _called_by_another_step(optimizer):
            after()

    def on_state_dict(_: Optimizer) -> None:
        if any(isinstance(p, Proxy) for group in optimizer.param_groups for p in group["params"]):
            refuse_unnamed()

    _held.add(optimizer)
    return [
        optimizer.register_state_dict_pre_hook(on_state_dict),
        optimizer.register_step_pre_hook(untraced(on_step)),
        optimizer.register_step_post_hook(untraced(on_stepped)),
    ]


# torch wraps the step of every class that was ever built, so a parent's step calls hooks as well.
_HOOKED_STEP = Optimizer.profile_hook_step(len).__code__


def _called_by_another_step(optimizer: Optimizer) -> bool:
    """Whether the step whose hooks are being called is that of a parent class (`super().step()`).

    Read from the stack: a count of open steps would stay wrong after one that raised.
    """
    steps, frame = 0, sys._getframe()
    while frame is not None:
        if frame.f_code is _HOOKED_STEP and frame.f_locals.get("self") is optimizer:
            steps += 1
        frame = frame.f_back
    return steps > 1


@contextmanager
def resting(optimizer: Optimizer) -> Iterator[None]:
    """Steps within it are none of the run's: torch begins states by one of rate zero."""
    _resting.add(optimizer)
    try:
        yield
    finally:
        _resting.discard(optimizer)


def let_go(optimizer: Optimizer) -> None:
    """The run has ended."""
    _held.discard(optimizer)


def leave_skipping_to_the_scaler(optimizer: Optimizer) -> None:
    """Let a GradScaler unscale, and skip broken steps, by itself also for fused optimizers.

    It calls the step of a fused optimizer with scaled gradients, even on steps that are to be
    skipped, so step hooks would fire then. Without this mark on the instance it does not; the
    weights and step counts are the same.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        setattr(optimizer, "_step_supports_amp_scaling", False)  # noqa: B010


def warn_of_missed_switches(methods: Sequence[Method], last_step: int | None) -> None:
    """Say so if a run ends, or is planned to end, before a method has done its work."""
    if last_step is None:
        return
    for method in methods:
        switch = getattr(method, "switch_step", None)
        if isinstance(switch, int) and last_step < switch:
            does = ("merges", "first merge")
            if "low-rank updates" not in method.provides:
                does = ("switches", "switch")
            logger.warning(
                "%s never %s: the run ends after step %d, the %s is due after %d",
                type(method).__name__,
                does[0],
                last_step,
                does[1],
                switch,
            )


def warn_of_losses(change: Change, outside: int) -> None:
    """Say so if factors do not train, or if hooks on the parameters they replace are gone."""
    hooked = sum(bool(p._backward_hooks or p._post_accumulate_grad_hooks) for p in change.replaced)
    if hooked:
        logger.warning(
            "%d replaced parameters had hooks of yours on their gradients, which their factors do "
            "not have; register them again, from on_event or in wrap",
            hooked,
        )
    trainable = any(p.requires_grad for s in change.replaced.values() for p in s.parameters)
    if outside and trainable:
        logger.warning(
            "the optimizer holds %d of the replaced parameters not at all, so their factors are "
            "not trained by it; start with the optimizer that holds them, or exclude these layers",
            outside,
        )


def warn_of_new_rates(optimizer: Optimizer, saved: Sequence[float], step: int) -> None:
    """Once after a resume: say so if a scheduler built since has set the rates back."""
    now = [float(group["lr"]) for group in optimizer.param_groups]
    if now != list(saved):
        logger.warning(
            "resumed at step %d with learning rates %s, the saved run's were %s: a scheduler built "
            "after start() begins anew; call run.resumed.restore_scheduler(scheduler)",
            step,
            now,
            list(saved),
        )
