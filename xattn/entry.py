"""What ``train.py`` and ``xattn`` share at their rim: open streams, a working directory, a name, the last message."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from xattn.errors import looking_at


def open_streams() -> None:
    """Opens the null device in place of each standard stream that is closed (``>&-``).

    Otherwise the next file to be opened takes its number, and what a library prints would land in that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode, encoding="utf-8"))  # noqa: SIM115  # as long as the process lives


def program() -> str:
    """The words that start a training here: ``python train.py``, ``python mine.py`` or ``xattn train``."""
    started = Path(sys.argv[0])
    is_command = started.name == "xattn" or started.parts[-2:] == ("xattn", "cli.py")
    return "xattn train" if is_command else shlex.join(["python", sys.argv[0]])


def check_working_directory() -> None:
    """Raises :class:`BadInput` where the working directory was deleted, or cannot be looked up."""
    with looking_at("working directory"):
        Path.cwd()


def tell(message: object) -> None:
    """Prints an error's message on the error stream, where the exit code stands even if nobody reads it any more."""
    try:
        print(f"xattn: {message}", file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # else the interpreter's own flush fails again


def answer(text: str) -> None:
    """Prints what was asked for; the exit code, which is an answer too, stands even if nobody reads the text."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's own flush fails again
