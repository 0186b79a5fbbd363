"""Low-rank gradients around any optimizer. Read `engine` first, then `gradient` and `matrix`."""

from __future__ import annotations

from rankwise.optim.projected.choices import MOMENTS, Choices, as_rank
from rankwise.optim.projected.engine import ProjectedGradients
from rankwise.optim.projected.gradient import LowRankGrad, Proxy
from rankwise.optim.projected.hooks import projected
from rankwise.optim.projected.matrix import SIDES, ProjectedMatrix
from rankwise.optim.projected.rounding import ROUNDINGS
from rankwise.optim.projected.selection import select_matrices
from rankwise.optim.projected.subspace import BASES
from rankwise.optim.projected.updates import (
    LIFT,
    ChannelResidual,
    ErrorFeedback,
    GradientScaling,
    Lift,
    OrthonormalUpdate,
    SignResidual,
    Update,
)

__all__ = [
    "BASES",
    "LIFT",
    "MOMENTS",
    "ROUNDINGS",
    "SIDES",
    "ChannelResidual",
    "Choices",
    "ErrorFeedback",
    "GradientScaling",
    "Lift",
    "LowRankGrad",
    "OrthonormalUpdate",
    "ProjectedGradients",
    "ProjectedMatrix",
    "Proxy",
    "SignResidual",
    "Update",
    "as_rank",
    "projected",
    "select_matrices",
]
