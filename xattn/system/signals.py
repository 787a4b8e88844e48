"""Signals as a request: the first asks a run to save and leave; a later SIGTERM or SIGINT ends it immediately."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# The sender of these wants the process to end.
DEMANDS = (signal.SIGTERM, signal.SIGINT)
# These announce its end: a closed terminal or lost connection, what SLURM, SGE and LSF are asked to send ahead of a
# time limit, a limit on CPU seconds (sent every second). They come more than once for one reason, so a second one asks
# for nothing more. SIGQUIT keeps its meaning, to dump core; SIGPWR is for init.
WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

Handler = Callable[[int, FrameType | None], object]


class Interruption:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._breaks = False
        self._listens = False
        self._standing: dict[int, Handler] = {}  # other code's handlers, by signal
        self._received: list[int] = []

    @contextmanager
    def breaking(self) -> Iterator[None]:
        """Make a request raise KeyboardInterrupt in this context, for code that waits for others and cannot poll."""
        self._breaks = True
        try:
            yield
        finally:
            self._breaks = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signals that ask for an end, and restore them at the end.

        A signal that is ignored (nohup) stays ignored. An existing handler is called at the end, when the requested
        save is done: submitit's requeues the job and leaves. Does nothing if it is already entered, or outside the main
        thread, which alone may have handlers.
        """
        if self._listens or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (*DEMANDS, *WARNINGS)}
        taken = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        self._standing = {
            number: handler
            for number, handler in taken.items()
            if callable(handler) and handler is not signal.default_int_handler
        }
        self._received.clear()
        self.requested = False  # a request to an earlier run in this process (in a notebook) is settled
        self._listens = True
        for number in taken:
            signal.signal(number, self._request)
        try:
            yield
        finally:
            self._listens = False
            for number, handler in taken.items():
                signal.signal(number, handler)
            for received in dict.fromkeys(self._received):
                if received in self._standing:
                    self._standing[received](received, None)

    def _request(self, number: int, frame: FrameType | None) -> None:
        _let_go_of_the_terminal()
        self._received.append(number)
        if self.requested and number in DEMANDS and number not in self._standing:
            os._exit(128 + number)  # no cleanup: commits are whole, and the lock ends with the process
        if self.requested:
            return
        self.requested = True
        if self._breaks:
            raise KeyboardInterrupt
        if number == signal.SIGINT and os.isatty(2):  # a user who pressed Ctrl-C
            os.write(2, b"\nsaving, to go on from there later; Ctrl-C again leaves at once\n")


def _let_go_of_the_terminal() -> None:
    """Redirect output to the null device if the terminal is gone: the save must not fail for a line on the screen."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


# Signals are sent to the process, so it has one such request.
interruption = Interruption()
