"""Hypothesis draws the same examples in every run, so that a failure repeats."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "rankwise",
    derandomize=True,
    deadline=None,
    max_examples=30,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("rankwise")
