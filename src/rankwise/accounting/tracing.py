"""Which layers one forward calls: their order and shapes, and which weights are read instead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from rankwise.accounting.recurrent import is_recurrent, reader_of, recurrent_calls
from rankwise.accounting.running import Sample, Shape, device_of, forward, undisturbed
from rankwise.errors import LifeCycleError


@dataclass(frozen=True)
class Call:
    """The shapes of one call of a module: its first tensor argument, its first tensor result."""

    input: Shape
    output: Shape


@dataclass(frozen=True)
class Trace:
    """Which modules with a weight one forward ran, in which order, on which shapes.

    A call of nn.MultiheadAttention counts as one of each of its projections, under the names
    `q`, `k`, `v`, `out_proj` and, for the first three at once, `in_proj`; one of nn.LSTM or nn.GRU
    as one of each of its matrices, `ih_l0`, `hh_l0`, ..., on all steps at once.

    Attributes:
        order: names of `named_modules`, by first call; a shared module is named once.
        calls: of each of them.
        reads: weights used without calling their module (`F.linear(x, self.embedding.weight)`):
            module -> how many calls came before the last such use. Only `trace` sees them.
        stems: for each tensor that the model was given, the module that met it first.
        autocast: the dtype that torch.autocast computed in; None without it, and unknown where the
            forward was compiled.
    """

    order: tuple[str, ...]
    calls: Mapping[str, tuple[Call, ...]]
    # Not every way of watching sees these, so two traces of one execution may differ in them.
    reads: Mapping[str, int] = field(default_factory=dict, compare=False)
    stems: tuple[str, ...] = field(default=(), compare=False)
    autocast: torch.dtype | None = field(default=None, compare=False)


def trace(model: nn.Module, sample: Sample) -> Trace:
    """Run one forward in eval mode without gradients, and say what it called.

    Args:
        model: any module; afterwards it is exactly as before, also if its forward raises.
        sample: an example input: a tensor, a tuple of arguments or a dict of keyword arguments.
            It is moved to the model's device.

    Raises:
        LifeCycleError: the model's class calls no forward hooks.
    """
    watcher, reads = watch(model), _Reads(model)
    reads.clock = watcher.calls
    try:
        with undisturbed(model), reads:
            forward(model, sample, device_of(model))
    finally:
        watcher.remove()
        reads.remove()
    if watcher.trace is None:
        raise LifeCycleError(
            f"calling {type(model).__name__} runs none of its forward hooks, so it cannot be "
            "traced; pass the module that this wrapper holds"
        )
    return replace(watcher.trace, reads=reads.found)


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
        self._given: list[Tensor] = []
        self._stems: list[str] = []
        self._autocast: torch.dtype | None = None
        enter = model.register_forward_pre_hook(self._enter, with_kwargs=True)
        self._handles: list[RemovableHandle] = [enter]
        for name, module in model.named_modules():
            # Replicas share these dicts but are other objects: the name travels in the hook.
            parts = self._record_attention if type(module) is _ATTENTION else None
            parts = self._record_recurrent if is_recurrent(module) else parts
            hook = parts or self._record
            if _has_weight(module) or parts is not None:
                hook = partial(hook, name)
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
            found = _collect(self._recorded)
            self._trace = replace(found, stems=tuple(self._stems), autocast=self._autocast)
            self._recorded = []
        return self._trace

    def remove(self) -> None:
        """Take all hooks away; what was recorded completely stays."""
        self._over = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._given.clear()

    def calls(self) -> int:
        """How many calls have been recorded so far."""
        return len(self._recorded)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if not self._over and self._owner.setdefault("thread", _thread()) == _thread():
            self._depth += 1
            if not torch.compiler.is_compiling():
                self._given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]

    def _record(self, name: str, module: nn.Module, args: Any, *rest: Any) -> None:
        if self._mine():
            # A replica's thread may find the hook but no longer its mark "with kwargs".
            inputs = (args, rest[0]) if len(rest) == 2 else args
            self._recorded.append((name, _shape(inputs), _shape(rest[-1])))
            if torch.compiler.is_compiling():
                return
            self._autocast = self._autocast or _autocast(module)
            if self._given:
                self._meet(name, inputs)

    def _record_attention(self, name: str, module: Any, args: Any, *rest: Any) -> None:
        if not self._mine():
            return
        named = rest[0] if len(rest) == 2 else {}
        query, key, value = (*args, *(named[n] for n in ("query", "key", "value") if n in named))[
            :3
        ]
        prefix = f"{name}." if name else ""
        for part, x in (("q", query), ("in_proj", query), ("k", key), ("v", value)):
            width = module.embed_dim * (3 if part == "in_proj" else 1)
            self._recorded.append((prefix + part, tuple(x.shape), (*x.shape[:-1], width)))
        self._recorded.append((f"{prefix}out_proj", tuple(query.shape), tuple(query.shape)))

    def _record_recurrent(self, name: str, module: Any, args: Any, *rest: Any) -> None:
        if not self._mine():
            return
        named = rest[0] if len(rest) == 2 else {}
        x = args[0] if args else named["input"]
        prefix = f"{name}." if name else ""
        for part, inputs, outputs in recurrent_calls(module, x):
            self._recorded.append((prefix + part, inputs, outputs))
        if not torch.compiler.is_compiling():
            self._autocast = self._autocast or _autocast(module)
            if self._given:
                self._meet(f"{prefix}ih_l0", x)

    def _meet(self, name: str, inputs: Any) -> None:
        for tensor in tree_leaves(inputs):
            for given in self._given if isinstance(tensor, Tensor) else ():
                if tensor is given or tensor._base is given:
                    self._stems.append(name)
                    self._given = [other for other in self._given if other is not given]
                    return

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


class _Reads(TorchFunctionMode):
    """Sees which weights a forward uses outside their own module's call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, int] = {}
        self.clock: Callable[[], int] = lambda: 0
        self._owners: dict[int, list[str]] = {}
        self._running: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() > 1:
                self._owners.setdefault(id(weight), []).append(name)
                enter, leave = partial(self._turn, name, 1), partial(self._turn, name, -1)
                user = reader_of(model, name) or module
                self._handles.append(user.register_forward_pre_hook(enter))
                self._handles.append(user.register_forward_hook(leave, always_call=True))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _of_shape_only(func):
            for value in tree_leaves((args, kwargs)):
                owners = self._owners.get(id(value), ())
                if owners and not any(self._running.get(name) for name in owners):
                    self.found[owners[0]] = self.clock()
        return func(*args, **kwargs)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _turn(self, name: str, by: int, *_: Any) -> None:
        self._running[name] = self._running.get(name, 0) + by


def _of_shape_only(func: Any) -> bool:
    """Whether a function of a tensor asks for its dtype, shape or the like, not for its numbers."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in ("data", "T", "mT", "H", "mH")
    return name in (
        "size",
        "dim",
        "numel",
        "stride",
        "is_floating_point",
        "element_size",
        "__len__",
    )


def _autocast(module: nn.Module) -> torch.dtype | None:
    kind = next((p.device.type for p in module.parameters()), "cpu")
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


_ATTENTION = nn.MultiheadAttention


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
