"""The zoo needs torchvision, also one that was built for another torch."""

from __future__ import annotations

from torchvision_operators import stub_operators

stub_operators()
