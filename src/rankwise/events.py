"""What a run reports: the plan once it is decided, and every change with what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.ranks import Plan


class EventLog:
    """Keeps events as dicts of numbers and strings, and hands each one on.

    Attributes:
        events: all of them, in order.
    """

    def __init__(self, on_event: Callable[[dict[str, Any]], None] | None) -> None:
        self.events: list[dict[str, Any]] = []
        self._on_event = on_event
        self._announced: Plan | None = None

    def record(self, event: dict[str, Any]) -> None:
        """Keep an event and tell the listener."""
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)

    def announce(self, plan: Plan | None, step: int) -> None:
        """Record a plan that is new."""
        if plan is None or plan is self._announced:
            return
        self._announced = plan
        layers = [layer.as_dict() for layer in plan.layers]
        self.record({"event": "plan", "step": step, "summary": plan.summary(), "layers": layers})
