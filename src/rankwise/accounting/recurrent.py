"""What one call of a recurrent layer multiplies by: its matrices, each on all steps at once.

T: steps, B: batch, L: rows of a packed sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from rankwise.accounting.running import Shape

_GATES = {nn.LSTM: 4, nn.GRU: 3}


def is_recurrent(module: nn.Module) -> bool:
    """Whether it is nn.LSTM or nn.GRU, or holds such a layer's matrices as children."""
    return type(module) in _GATES or {"ih_l0", "hh_l0"} <= module._modules.keys()


def reader_of(model: nn.Module, name: str) -> nn.Module | None:
    """The recurrent layer that multiplies by the weight of a module without calling it.

    Args:
        model: that both are in.
        name: of the module: a matrix of the layer, or a factor of one.
    """
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if is_recurrent(module):
            return module
    return None


def recurrent_calls(module: Any, x: Any) -> Iterator[tuple[str, Shape, Shape]]:
    """Matrix, shape of what it is multiplied by, and (T, B, rows), in order of execution.

    Args:
        module: a recurrent layer.
        x: its input: (T, B, I), (B, T, I), (T, I) or packed, then what it is multiplied by is
            (L, I).
    """
    packed = isinstance(x, PackedSequence)
    leading: Shape = tuple(x.data.shape[:1] if packed else x.shape[:-1])
    if packed:
        steps, batch = len(x.batch_sizes), int(x.batch_sizes[0])
    else:
        first = module.batch_first and len(leading) == 2
        steps, batch = leading[::-1] if first else (*leading, 1)[:2]
    gates = getattr(module, "gates", None) or _GATES[type(module)]
    rows, hidden = gates * module.hidden_size, module.hidden_size
    seen = module.proj_size or hidden
    suffixes = ("", "_reverse") if module.bidirectional else ("",)
    for layer in range(module.num_layers):
        width = seen * len(suffixes) if layer else module.input_size
        for place in (f"l{layer}{suffix}" for suffix in suffixes):
            yield f"ih_{place}", (*leading, width), (steps, batch, rows)
            yield f"hh_{place}", (*leading, seen), (steps, batch, rows)
            if module.proj_size:
                yield f"hr_{place}", (*leading, hidden), (steps, batch, seen)


@contextmanager
def recurrent_flops(model: nn.Module, counted: Callable[[], int]) -> Iterator[Callable[[], int]]:
    """What to add to a count of FLOPs so that recurrent layers are right, whatever kernel ran.

    Counters see nothing in fused kernels of whole sequences, nor in operators of other libraries.

    Args:
        model: its recurrent layers are watched in a `with` block.
        counted: how many FLOPs the counter has seen so far.

    Returns:
        A function of no arguments: the difference so far.
    """
    before: dict[int, int] = {}
    missing = 0

    def enter(module: nn.Module, *_: Any) -> None:
        before[id(module)] = counted()

    def leave(module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        nonlocal missing
        seen = counted() - before[id(module)]
        missing += _flops(module, args[0] if args else kwargs["input"]) - seen

    handles = []
    for module in filter(is_recurrent, model.modules()):
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        yield lambda: missing
    finally:
        for handle in handles:
            handle.remove()


def _flops(module: nn.Module, x: Any) -> int:
    """Every matrix, or factor of one, meets every step of every sequence once."""
    steps = x.data.shape[0] if isinstance(x, PackedSequence) else prod(x.shape[:-1])
    held = (p for part in module.modules() for p in part._parameters.values() if p is not None)
    return 2 * steps * sum(p.numel() for p in held if p.dim() > 1)
