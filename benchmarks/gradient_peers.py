"""The published programs that low-rank gradients are measured against; nothing else needs them.

pip install --no-deps galore-torch==1.0 apollo-torch==1.0.3
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

INSTALL = "pip install --no-deps galore-torch==1.0 apollo-torch==1.0.3"


def galore_torch(
    matrices: Iterable[Parameter],
    others: Iterable[Parameter] = (),
    *,
    rank: int,
    every: int,
    lr: float = 1e-3,
    sides: str = "std",
) -> Optimizer:
    """GaLore's AdamW as published, with scale 1/4.

    Args:
        matrices: projected.
        others: stepped by plain AdamW.
        rank: of the projection.
        every: steps between two SVDs.
        lr: learning rate.
        sides: "std" for the shorter one, "full" for both.

    Raises:
        SystemExit: the package is missing; says how to install it.
    """
    projected = {"rank": rank, "update_proj_gap": every, "scale": 0.25, "proj_type": sides}
    make = _adamw("galore_torch", "adamw")
    return make(_groups(matrices, others, projected), lr=lr, no_deprecation_warning=True)


def apollo_torch(
    matrices: Iterable[Parameter],
    others: Iterable[Parameter] = (),
    *,
    rank: int,
    every: int,
    lr: float = 1e-3,
    **options: Any,
) -> Optimizer:
    """APOLLO's AdamW as published, channel-wise with scale 1; arguments as for `galore_torch`.

    Further options are those of their constructor.
    """
    projected = {
        **{"rank": rank, "update_proj_gap": every, "scale": 1.0, "proj_type": "std"},
        **{"proj": "random", "scale_type": "channel"},
    }
    return _adamw("apollo_torch", "apollo")(_groups(matrices, others, projected), lr=lr, **options)


def give_projection(optimizer: Optimizer, weight: Parameter, matrix: Tensor, rank: int) -> None:
    """Have APOLLO's AdamW project a weight's gradient by a matrix, (R, N) or (M, R), for ever."""
    projector = sys.modules["apollo_torch.apollo"].GradientProjector(rank)
    projector.ortho_matrix = matrix
    projector.update_ortho_matrix = lambda *_, **__: None
    optimizer.state[weight]["projector"] = projector


def _groups(
    matrices: Iterable[Parameter], others: Iterable[Parameter], options: dict[str, Any]
) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [{"params": list(matrices), **options}]
    rest = list(others)
    return [*groups, {"params": rest}] if rest else groups


def _adamw(package: str, module: str) -> Callable[..., Optimizer]:
    if f"{package}.{module}" not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise SystemExit(f"{package} is not installed; {INSTALL}")
        # The package's own first file imports bitsandbytes for its other optimizers.
        empty = ModuleType(package)
        empty.__path__ = list(spec.submodule_search_locations)
        empty.__spec__ = spec  # whoever looks for the package later finds it
        sys.modules[package] = empty
        with _transformers():
            importlib.import_module(f"{package}.{module}")
    return getattr(sys.modules[f"{package}.{module}"], "AdamW")  # noqa: B009


@contextmanager
def _transformers() -> Iterator[None]:
    """They ask transformers for one function that compares versions."""
    names = ("transformers", "transformers.utils", "transformers.utils.versions")
    if names[0] in sys.modules:
        yield
        return
    for name in names:
        sys.modules[name] = ModuleType(name)
    setattr(sys.modules[names[2]], "require_version", lambda *_: None)  # noqa: B010
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
