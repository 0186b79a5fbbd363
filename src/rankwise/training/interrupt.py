"""SIGINT and SIGTERM ask a run to stop at the end of its step, when it can still be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError


class Interrupted(RankwiseError):
    """A signal ended the run early; everything up to its last step is saved.

    Attributes:
        directory: of the run; `resume` takes it.
        step: finished optimizer steps.
        signal: its number.
    """

    def __init__(self, directory: Path, step: int, number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}; the run is saved in "
            f"{directory} and goes on with: rankwise train --resume {directory}"
        )
        self.directory, self.step, self.signal = directory, step, number


class StopRequest:
    """Which signal asked to stop; 0 while none has."""

    signal = 0


@contextmanager
def listen() -> Iterator[StopRequest]:
    """Catch the first SIGINT or SIGTERM; a second one acts at once, as usual.

    Outside the main thread, where no handler can be set, nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, _: Any) -> None:
        request.signal = number
        restore()

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        restore()
