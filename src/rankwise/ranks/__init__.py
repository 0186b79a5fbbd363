"""How many ranks: rules, and the plan a user reads before training."""

from __future__ import annotations

from rankwise.ranks.budget import Budget
from rankwise.ranks.plan import LayerPlan, Plan
from rankwise.ranks.planning import factorize, plan
from rankwise.ranks.registry import RULES, as_rule
from rankwise.ranks.rules import Fixed, Ratio, Rule
from rankwise.ranks.shape import MatrixShape
from rankwise.ranks.spectral import VBMF, Energy, Entropy, ScaledStableRank, StableRank

__all__ = [
    "RULES",
    "VBMF",
    "Budget",
    "Energy",
    "Entropy",
    "Fixed",
    "LayerPlan",
    "MatrixShape",
    "Plan",
    "Ratio",
    "Rule",
    "ScaledStableRank",
    "StableRank",
    "as_rule",
    "factorize",
    "plan",
]
