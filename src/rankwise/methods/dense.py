"""Dense training: every weight at full rank, the row that every comparison needs.

When: never. Where: nowhere. How many ranks: all. Action: none.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.method import Method


@dataclass
class Dense(Method):
    """Ordinary training, unchanged: the baseline of every comparison."""
