"""SIGTERM and SIGINT as a request: the first asks a run to save and leave, the second makes it leave at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._breaks = False

    @contextmanager
    def breaking(self) -> Iterator[None]:
        """While it is entered a request raises KeyboardInterrupt: for who waits for others, and cannot be asked."""
        self._breaks = True
        try:
            yield
        finally:
            self._breaks = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes over SIGTERM and SIGINT, and gives them back at the end. Only in the main thread."""
        before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)  # no cleaning up: what is committed is committed, and the lock goes with the process
        self.requested = True
        if self._breaks:
            raise KeyboardInterrupt
        if number == signal.SIGINT and os.isatty(2):  # a person who pressed Ctrl-C
            os.write(2, b"\nsaving, to go on from there later; Ctrl-C again leaves at once\n")


# Signals are the process's, and so is what they ask for.
interruption = Interruption()
