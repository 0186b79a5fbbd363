"""What a run reports: the plan once it is decided, and every change with what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from rankwise import accounting
from rankwise.layers import LowRankLayer
from rankwise.method import Change

if TYPE_CHECKING:
    from rankwise.optim.rebind import Rebound
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

    def changed(
        self, kind: str, change: Change, model: nn.Module, moments: Rebound, **facts: Any
    ) -> None:
        """Record a change that the optimizer has followed: sizes, moments, and what is given.

        An exchange of low-rank layers for others is of the kind "ranks", with every layer's old
        and new one; a change of values alone is of the kind "merge".
        """
        stored = accounting.parameters(model).stored
        event: dict[str, Any] = {
            "event": kind,
            # Attentions and recurrent layers that were opened come with the layers in them.
            "layers": sum(isinstance(new, LowRankLayer) for _, new in change.modules.values())
            or len(change.modules),
            "parameters": [stored - change.growth(), stored],
            "moments": {**vars(moments), "unknown": list(moments.unknown)},
            "running_statistics": accounting.running_statistics(model),
        }
        if not change.structural:
            event["event"] = "merge"
        pairs = change.modules.values()
        if pairs and all(isinstance(m, LowRankLayer) for pair in pairs for m in pair):
            ranks = {name: [a.rank, b.rank] for name, (a, b) in change.modules.items()}
            event |= {"event": "ranks", "kind": "shrink", "layers": ranks}
        self.record({**event, **facts, **change.notes})

    def announce(self, plan: Plan | None, step: int) -> None:
        """Record a plan that is new."""
        if plan is None or plan is self._announced:
            return
        self._announced = plan
        layers = [layer.as_dict() for layer in plan.layers]
        self.record({"event": "plan", "step": step, "summary": plan.summary(), "layers": layers})
