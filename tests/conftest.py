"""Hypothesis draws the same examples in every run; one thread, as small tensors like it."""

from __future__ import annotations

import torch
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
torch.set_num_threads(1)
