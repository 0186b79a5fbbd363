"""Can this optimizer step proxies? Its update must depend on gradients, not on the values it moves.

A proxy starts every step at zero. An optimizer that reads the parameter (Adafactor's scale, LAMB's
trust ratio, the distance from the start, averages of weights) would see that zero.
"""

from __future__ import annotations

import inspect
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from rankwise.errors import LifeCycleError

logger = logging.getLogger(__name__)

# Parts of class or module names, and what they do with the value.
_KNOWN = {
    "adafactor": "scales its step by the parameter's root mean square",
    "lamb": "scales its step by the parameter's norm",
    "lars": "scales its step by the parameter's norm",
    "schedulefree": "averages parameters",
    "prodigy": "measures the distance from the first value",
    "dadapt": "measures the distance from the first value",
    "sam": "moves the parameter and back within a step",
    "ademamix_master": "keeps master copies of the parameters",
}
_EXACT = frozenset({"sam", "lars", "lamb"})


def depends_on_values(optimizer: Optimizer) -> str:
    """Why an optimizer's updates depend on the parameters' values; empty if they do not.

    Known ones by name. Others are tried: two fresh instances step parameters of different values
    with the same gradients, without weight decay; one that cannot be built so is taken to be fit,
    with a warning.
    """
    cls = type(optimizer)
    words = (cls.__name__ + "." + cls.__module__).lower().replace("_", "")
    for part, reason in _KNOWN.items():
        if (part in words and part not in _EXACT) or cls.__name__.lower() == part:
            return reason
    if cls.__module__.partition(".")[0] in ("bitsandbytes", "torchao"):
        return ""  # low-bit forms of Adam, Lion and the like: not to be built on toys
    moved = _tried(optimizer)
    if moved is None:
        logger.warning(
            "%s could not be tried on parameters of its own; if its update reads the parameter's "
            "value, projected gradients train wrongly with it",
            cls.__name__,
        )
    if moved is None or torch.allclose(*moved, rtol=1e-4, atol=1e-7):
        return ""
    return "moved two parameters of different values differently by the same gradients"


def mixes_rows(optimizer: Optimizer) -> bool:
    """Whether it moves the rows of a matrix otherwise than each worker would its own (Muon).

    Tried on a toy; an optimizer that cannot be built for it is taken to be fit.
    """
    start = torch.zeros(6, 4, device="cpu")
    whole, halves = (_stepped(optimizer, start, parts) for parts in (1, 2))
    return not (whole is None or halves is None or torch.allclose(whole, halves, rtol=1e-4))


def _tried(optimizer: Optimizer) -> tuple[Tensor, Tensor] | None:
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(6, 4, generator=generator, device="cpu")
    moved = [_stepped(optimizer, start, 1) for start in (torch.zeros_like(value), value)]
    return None if moved[0] is None or moved[1] is None else (moved[0], moved[1])


@torch.enable_grad()
def _stepped(optimizer: Optimizer, start: Tensor, parts: int) -> Tensor | None:
    """How an optimizer of this kind moves a matrix in three steps, its rows held in parts."""
    taken = inspect.signature(type(optimizer)).parameters
    options: dict[str, Any] = {k: v for k, v in optimizer.defaults.items() if k in taken}
    # Rates may be zero at the start of a warm-up, and tensors that captured graphs hold.
    options |= {k: v for k, v in (("lr", 0.01), ("weight_decay", 0.0)) if k in taken}
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(start.shape, generator=generator, device="cpu") for _ in range(3)]
    held = [Parameter(part.clone()) for part in start.chunk(parts)]
    try:
        toy = type(optimizer)(held, **options)
        for gradient in gradients:
            for parameter, part in zip(held, gradient.chunk(parts), strict=True):
                parameter.grad = part.clone()
            toy.step()
    except Exception:
        # Anyone's optimizer, on tensors it was not made for: it may raise anything, which says
        # nothing of the run to come. The caller warns, or takes it to be fit.
        return None
    return torch.cat([parameter.detach() for parameter in held]) - start


def inside_compiled_code() -> bool:
    """Whether the caller runs under torch.compile, in the Python between compiled parts."""
    return _called_from("_dynamo", "compile_wrapper")


def refuse_unnamed() -> None:
    """Say what to do when torch.distributed.checkpoint asks for proxies by the model's names.

    Raises:
        LifeCycleError: it is among the callers. It would end in a KeyError of a number.
    """
    if _called_from(str(Path("distributed", "checkpoint", "state_dict.py"))):
        raise LifeCycleError(
            "torch.distributed.checkpoint looks for the optimizer's parameters in the model, but "
            "with low-rank gradients it steps proxies of them; call it inside "
            "`with rankwise.states_by_weight(run):`, or save by rankwise.save(directory, run)"
        )


def _called_from(file: str, function: str = "") -> bool:
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if file in code.co_filename and function in code.co_name:
            return True
        frame = frame.f_back
    return False
