"""How many ranks: rules, and the plan a user reads before training."""

from __future__ import annotations

from rankwise.ranks.plan import LayerPlan, Plan, factorize, plan
from rankwise.ranks.rules import RULES, Budget, Fixed, Ratio, Rule, as_rule

__all__ = [
    "RULES",
    "Budget",
    "Fixed",
    "LayerPlan",
    "Plan",
    "Ratio",
    "Rule",
    "as_rule",
    "factorize",
    "plan",
]
