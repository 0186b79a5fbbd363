"""How many ranks: rules, and the plan a user reads before training."""

from __future__ import annotations

from rankwise.ranks import estimators
from rankwise.ranks.budget import Budget
from rankwise.ranks.plan import LayerPlan, Plan
from rankwise.ranks.planning import factorize, plan
from rankwise.ranks.present import present
from rankwise.ranks.registry import RULE_HELP, RULES, as_rule
from rankwise.ranks.rules import Fixed, Later, Ratio, Rule
from rankwise.ranks.shape import MatrixShape
from rankwise.ranks.spectral import VBMF, Energy, Entropy, ScaledStableRank, StableRank

__all__ = [
    "RULES",
    "RULE_HELP",
    "VBMF",
    "Budget",
    "Energy",
    "Entropy",
    "Fixed",
    "Later",
    "LayerPlan",
    "MatrixShape",
    "Plan",
    "Ratio",
    "Rule",
    "ScaledStableRank",
    "StableRank",
    "as_rule",
    "estimators",
    "factorize",
    "plan",
    "present",
]
