"""Tensors in pieces (FSDP2, any DTensor): put together for a checkpoint, and cut again.

Everything here works on one tensor, or on the tensors inside plain containers. Nothing is imported
of torch.distributed.tensor before the first sharded tensor is met.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise import distributed
from rankwise.errors import PlanError


def is_sharded(value: Any) -> bool:
    """Whether this is a DTensor, of which a worker holds a part."""
    return hasattr(value, "device_mesh") and hasattr(value, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this worker holds; any other tensor itself."""
    part: Tensor | None = getattr(tensor, "_local_tensor", None)
    return tensor if part is None else part


def split_by_rows(tensor: Any) -> bool:
    """Whether every worker holds some of the whole rows, or all of them: FSDP2's own layout."""
    kinds = [type(place).__name__ for place in tensor.placements]
    rows = [p for p, kind in zip(tensor.placements, kinds, strict=True) if kind == "Shard"]
    others = [kind for kind in kinds if kind not in ("Shard", "Replicate")]
    return not others and len(rows) <= 1 and all(place.dim == 0 for place in rows)


def row_group(tensor: Any) -> Any:
    """The process group over which the rows of a tensor are split; None where they are not."""
    for dimension, place in enumerate(tensor.placements):
        if type(place).__name__ == "Shard":
            return tensor.device_mesh.get_group(dimension)
    return None


def as_rows(part: Tensor, like: Any) -> Tensor:
    """This worker's rows of a matrix, seen as the whole matrix; no communication.

    Args:
        part: (m, C): as many rows as this worker holds of `like`.
        like: a tensor (M, ...) split by rows.

    Returns:
        DTensor (M, C), placed like `like`.
    """
    from torch.distributed.tensor import DTensor

    shape = torch.Size((like.shape[0], *part.shape[1:]))
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part.contiguous(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=shape,
        stride=strides,
    )


@torch.no_grad()
def cut(value: Tensor, like: Any) -> Tensor:
    """A tensor placed as `like` is: whole values, held by every worker, are cut where they are."""
    if is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(local(like).device), like.device_mesh, like.placements, src_data_rank=None
    )


def cut_as(values: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict whose values are cut as those of the same name in another one are."""
    return {
        name: cut(value, like[name])
        if isinstance(value, Tensor) and is_sharded(like.get(name)) and _fits(value, like[name])
        else value
        for name, value in values.items()
    }


def _fits(value: Tensor, like: Tensor) -> bool:
    return value.shape == like.shape


@torch.no_grad()
def whole(value: Any) -> Any:
    """Put together all sharded tensors inside dicts, lists and tuples; a collective.

    Worker 0 gets them whole, on the CPU; the others get empty ones, so that only one copy of
    what many workers hold together ever exists.
    """

    def gathered(tensor: Any) -> Tensor:
        full = tensor.full_tensor().detach()
        return full.cpu() if distributed.worker() == 0 else full.new_empty(0, device="cpu")

    return _mapped(value, gathered)


def _mapped(value: Any, function: Callable[[Any], Tensor]) -> Any:
    kind: Any = type(value)
    if is_sharded(value):
        return function(value)
    if kind in (dict, OrderedDict):
        return kind((key, _mapped(inner, function)) for key, inner in value.items())
    if kind in (list, tuple):
        return kind(_mapped(inner, function) for inner in value)
    return value


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a whole state dict into a model, sharded or not.

    Raises:
        PlanError: it is of another model.
    """
    try:
        model.load_state_dict(cut_as(weights, model.state_dict()))
    except RuntimeError as error:
        raise PlanError(f"the saved weights do not fit this model: {error}") from error
