"""What a model holds and does, counted: parameters, the order and shapes of its layers, FLOPs.

Everything returned is a plain number or tuple. Nothing here knows of rank, and nothing here
leaves a trace in the model: flags, buffers, hooks and random state are as they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from rankwise.errors import LifeCycleError

Sample = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many numbers a model stores; a parameter shared by several modules counts once."""

    stored: int
    trainable: int  # those that require a gradient
    bytes: int


@dataclass(frozen=True)
class Call:
    """The shapes of one call of a module: its first tensor argument, its first tensor result."""

    input: Shape
    output: Shape


@dataclass(frozen=True)
class Trace:
    """Which modules with a weight one forward ran, in which order, on which shapes.

    A weight that a parent reads without calling its module (`out_proj` of
    `nn.MultiheadAttention`) has no call, so it is absent.
    """

    order: tuple[str, ...]  # names of `named_modules`, by first call; a shared module is named once
    calls: Mapping[str, tuple[Call, ...]]


def parameters(model: nn.Module) -> Parameters:
    """Count the parameters of a model; buffers are not parameters."""
    unique = list(model.parameters())
    return Parameters(
        stored=sum(p.numel() for p in unique),
        trainable=sum(p.numel() for p in unique if p.requires_grad),
        bytes=sum(p.numel() * p.element_size() for p in unique),
    )


def trace(model: nn.Module, sample: Sample) -> Trace:
    """Run one forward in eval mode without gradients, and say what it called.

    Args:
        model: any module; afterwards it is exactly as before, also if its forward raises.
        sample: an example input: a tensor, a tuple of arguments or a dict of keyword arguments.
            It is moved to the model's device.

    Raises:
        LifeCycleError: the model's class calls no forward hooks.
    """
    watcher = watch(model)
    try:
        with _undisturbed(model):
            _forward(model, sample, _device(model))
    finally:
        watcher.remove()
    if watcher.trace is None:
        raise LifeCycleError(
            f"calling {type(model).__name__} runs none of its forward hooks, so it cannot be "
            "traced; pass the module that this wrapper holds"
        )
    return watcher.trace


def running_statistics(model: nn.Module) -> int:
    """How many layers normalise in eval mode by statistics gathered during training (BatchNorm).

    After a change of the weights before them these are out of date for some training steps.
    """
    return sum(getattr(m, "running_mean", None) is not None for m in model.modules())


def watch(model: nn.Module) -> Watcher:
    """Record the next complete forward of a model, in whatever mode it runs.

    Unlike `trace` it costs no forward of its own. Under torch.compile the recording is part of
    the first compiled graph, and the call after it compiles once more without it; a model that
    was compiled and called before does not see the hooks.
    """
    return Watcher(model)


class Watcher:
    """Hooks that record one forward and go away; `trace` is None until it is complete.

    A forward that raises ends the watch with `trace` None. Under data-parallel replicas the
    first one to start is recorded.
    """

    # Dynamo inlines the hooks, so while recording they only append to a list and set attributes.

    def __init__(self, model: nn.Module) -> None:
        self._recorded: list[tuple[str, Shape | None, Shape | None]] = []
        self._depth = 0  # forwards of the root under way in the owner's thread
        self._owner: dict[str, int] = {}  # the first thread to enter; `setdefault` is atomic
        self._complete = False
        self._over = False
        self._trace: Trace | None = None
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._enter)]
        for name, module in model.named_modules():
            if _has_weight(module):
                # Replicas share these dicts but are other objects: the name travels in the hook.
                hook = partial(self._record, name)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._leave))
        self._handles.append(model.register_forward_hook(self._end, always_call=True))

    @property
    def over(self) -> bool:
        """Whether no more will be recorded, complete or not."""
        return self._over

    @property
    def trace(self) -> Trace | None:
        """What was recorded, once a forward is complete."""
        if self._over:
            self.remove()
        if self._complete and self._trace is None:
            self._trace = _collect(self._recorded)
            self._recorded = []
        return self._trace

    def remove(self) -> None:
        """Take all hooks away; what was recorded completely stays."""
        self._over = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self._over and self._owner.setdefault("thread", _thread()) == _thread():
            self._depth += 1

    def _record(self, name: str, module: nn.Module, args: Any, *rest: Any) -> None:
        if self._mine():
            # A replica's thread may find the hook but no longer its mark "with kwargs".
            inputs = (args, rest[0]) if len(rest) == 2 else args
            self._recorded.append((name, _shape(inputs), _shape(rest[-1])))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._mine() and self._depth == 1:
            self._complete = True

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._mine():
            return
        self._depth -= 1
        if self._depth == 0:
            self._over = True
            # Dynamo cannot trace the removal: there `trace` does it, and `_over` silences them.
            if not torch.compiler.is_compiling():
                self.remove()

    def _mine(self) -> bool:
        return not self._over and self._owner.get("thread") == _thread()


def flops(model: nn.Module, sample: Sample) -> int:
    """Count the FLOPs of the matrix products of one forward in eval mode: 2 per multiply-add.

    Exact for linear layers, convolutions and attention, whatever kernels would really run: the
    count is made on meta tensors, without memory or time for the arithmetic. A model that needs
    values (data-dependent control flow, tensors that are neither parameters nor buffers) is run
    once for real, with the kernels that the counter cannot see through turned off.

    Args:
        model: any module; afterwards it is exactly as before.
        sample: as for `trace`.
    """
    counter = partial(FlopCounterMode, display=False, custom_mapping=_UNCOUNTED)
    with _undisturbed(model):
        with suppress(RuntimeError, TypeError, ValueError), counter() as count:
            _forward(model, sample, torch.device("meta"))
            return count.get_total_flops()
        with _transparent_kernels(), counter() as count:
            _forward(model, sample, _device(model))
        return count.get_total_flops()


def _trilinear_flops(a: Shape, weight: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * a[0] * prod(weight)  # (B, I), (O, I, J), (B, J) -> (B, O)


# What nn.Bilinear dispatches to; the counter knows no formula for it and would say 0.
_UNCOUNTED: dict[Any, Callable[..., int]] = {torch.ops.aten._trilinear: _trilinear_flops}


def _forward(model: nn.Module, sample: Sample, device: torch.device) -> None:
    if isinstance(sample, Mapping):
        args, kwargs = (), dict(sample)
    else:
        args, kwargs = (sample,) if isinstance(sample, Tensor) else tuple(sample), {}
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))
    # `tie_weights` would swap a shared module once per name, and leave the stand-in behind.
    functional_call(model, _stand_ins(model, device), args, kwargs, tie_weights=False)


def _stand_ins(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Copies of the buffers, which a forward may write to; on meta the parameters' shapes too."""
    made: dict[int, Tensor] = {}
    named: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        held = [module.named_buffers(recurse=False, remove_duplicate=False)]
        if device.type == "meta":
            held.append(module.named_parameters(recurse=False, remove_duplicate=False))
        for name, tensor in chain(*held):
            if id(tensor) not in made:
                own = tensor.detach()
                made[id(tensor)] = own.clone() if own.device == device else own.to(device)
            named[f"{prefix}.{name}" if prefix else name] = made[id(tensor)]
    return named


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, the eager and ordinary code paths; everything restored after."""
    modes = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    device = _device(model)
    indices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=indices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # The fused encoder kernel calls no child module and counts no attention.
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def _transparent_kernels() -> Iterator[None]:
    """Only kernels that dispatch to matrix products the counter knows."""
    # Not `mkldnn.flags`: it sets TF32 too, and warns where there is no such hardware.
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        with torch.backends.cudnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled)


def _device(model: nn.Module) -> torch.device:
    held = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in held), torch.device("cpu"))


def _has_weight(module: nn.Module) -> bool:
    # A parametrised layer owns no `weight` of its own, but is still one of these classes.
    own = isinstance(module._parameters.get("weight"), nn.Parameter)
    return own or isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def _shape(value: Any) -> Shape | None:
    """The shape of the first tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    items = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (tuple, list, Mapping)):
        for item in items:
            shape = _shape(item)
            if shape is not None:
                return shape
    return None


def _collect(recorded: list[tuple[str, Shape | None, Shape | None]]) -> Trace:
    calls: dict[str, list[Call]] = {}
    for name, inputs, output in recorded:
        calls.setdefault(name, []).append(Call(inputs or (), output or ()))
    frozen = {name: tuple(each) for name, each in calls.items()}
    return Trace(order=tuple(frozen), calls=MappingProxyType(frozen))


@torch.compiler.assume_constant_result
def _thread() -> int:
    return threading.get_ident()
