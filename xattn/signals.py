"""SIGTERM and SIGINT as a request: the first asks the run to save and leave, the second makes it leave at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Whether a signal has asked this run to stop."""

    def __init__(self) -> None:
        self.requested = False

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)  # no cleaning up: what is committed is committed, and the lock goes with the process
        self.requested = True


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Takes over SIGTERM and SIGINT; gives them back at the end. Only in the main thread, as signals have it."""
    asked = Interruption()
    before = {number: signal.signal(number, asked._request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
