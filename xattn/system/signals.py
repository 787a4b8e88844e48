"""Signals as a request: the first asks a run to save and leave; SIGTERM or SIGINT after it makes it leave at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Who sends these wants the process gone.
DEMANDS = (signal.SIGTERM, signal.SIGINT)
# And these announce that it will be: a closed terminal or lost connection, what SLURM, SGE and LSF are asked to send
# ahead of a time limit, a limit on CPU seconds (each second anew). They come more than once for one reason, so a second
# one asks for nothing more. SIGQUIT keeps its meaning, to leave a core; SIGPWR is for init.
WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

Handler = Callable[[int, FrameType | None], object]


class Interruption:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._breaks = False
        self._listens = False
        self._standing: dict[int, Handler] = {}  # those of others, by signal
        self._received: list[int] = []

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
        """Takes over the signals that ask for an end, and gives them back at the end.

        A signal that is ignored (nohup) stays ignored. A handler that stands already is called at the end, when what
        was asked for has been saved: submitit's queues the job again and leaves. Does nothing where it is entered
        already, or not in the main thread, which alone may have handlers.
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
        self.requested = False  # what was asked of an earlier run in this process (a notebook's) is done with
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
            os._exit(128 + number)  # no cleaning up: what is committed is committed, and the lock goes with the process
        if self.requested:
            return
        self.requested = True
        if self._breaks:
            raise KeyboardInterrupt
        if number == signal.SIGINT and os.isatty(2):  # a person who pressed Ctrl-C
            os.write(2, b"\nsaving, to go on from there later; Ctrl-C again leaves at once\n")


def _let_go_of_the_terminal() -> None:
    """Sends output to nowhere if the terminal is gone: the save must not fail for a line on the screen."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


# Signals are the process's, and so is what they ask for.
interruption = Interruption()
