"""Processes that decode images, as the loop sees them: fill this part of a batch.

Threads would share Python's lock with each other and with the loop, and stop gaining after a few.
These processes are started from nothing rather than forked: they hold no copy of the trainer, its
threads or its GPU. They are in a process group of their own, where Ctrl-C does not reach them.
"""

from __future__ import annotations

import io
import json
import os
import queue
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from rankwise.errors import DataError
from rankwise.images.process import ANSWER, PIXELS
from rankwise.images.variation import How

PATIENCE = 10.0  # seconds that a process has to end by itself


class Decoders:
    """A number of processes for one tree; each is started when it is first needed.

    Threads call `fill`, as many at a time as there are processes.
    """

    def __init__(self, place: Path, count: int) -> None:
        self.place, self.count = place, count
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)
        # Also where nobody closes: when this object goes, and when the interpreter ends.
        weakref.finalize(self, _end_idle, self._idle)

    def fill(
        self, images: np.ndarray, names: Sequence[str], how: How, drawn: np.ndarray | None
    ) -> None:
        """Decode some images into their places.

        Args:
            images: (N, S, S, C) uint8 in one piece.
            names: of N files.
            how: what they become.
            drawn: (N, D) random numbers that vary them.

        Raises:
            DataError: an image cannot be read, or the process has ended.
        """
        process = self._idle.get()
        try:
            if process is None:
                process = _Process(self.place)
            message = process.fill(images, names, how, drawn)
        except OSError as error:
            state = "it cannot be started"
            if process is not None:
                state, process = f"exit status {process.end()}", None
            raise DataError(
                f"the process that decodes {names[0]} and the {len(names) - 1} images after it "
                f"ended ({state}: {error}); with too little memory, lower loader_workers or the "
                "batch size"
            ) from error
        finally:
            self._idle.put(process)
        if message is not None:
            raise DataError(message)

    def close(self) -> None:
        """End the processes; nobody may be filling. They start anew when they are needed."""
        for process in [self._idle.get() for _ in range(self.count)]:
            if process is not None:
                process.end()
            self._idle.put(None)


class _Process:
    """One process and its pipes."""

    def __init__(self, place: Path) -> None:
        source = str(Path(__file__).parents[2])
        paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
        own_group: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rankwise.images.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            **own_group,
        )
        self._say(str(place.absolute()))

    def fill(
        self, images: np.ndarray, names: Sequence[str], how: How, drawn: np.ndarray | None
    ) -> str | None:
        """Decode into the images' places; a message if one cannot be read."""
        numbers = None if drawn is None else drawn.tolist()
        self._say({"how": asdict(how), "names": list(names), "drawn": numbers})
        message = None
        for image in images:
            kind, length = ANSWER.unpack(self._hear(bytearray(ANSWER.size)))
            if kind == PIXELS:
                self._hear(image.reshape(-1).data)
            else:  # the answers behind it are heard, too, so that the next request has its own
                message = message or bytes(self._hear(bytearray(length))).decode()
        return message

    def end(self) -> int:
        """Close its input, and wait."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was still to be said cannot be
                    continue
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _say(self, words: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words).encode() + b"\n")
        self._process.stdin.flush()

    def _hear(self, into: Any) -> Any:
        pipe = cast(io.BufferedReader, self._process.stdout)
        if pipe.readinto(into) != len(into):
            raise BrokenPipeError("it said less than it was asked for")
        return into


def _end_idle(idle: queue.LifoQueue[_Process | None]) -> None:
    while True:
        try:
            process = idle.get_nowait()
        except queue.Empty:
            return
        if process is not None:
            process.end()
