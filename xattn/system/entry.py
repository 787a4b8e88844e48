"""What ``train.py`` and ``xattn`` share at startup and exit: streams, the working directory, a name, messages."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from xattn.errors import BadInput
from xattn.system import screen

_OF_A_SWEEP = {"-m", "--multirun"}
_OF_A_RUN = {*_OF_A_SWEEP, "--like", "--config-dir", "-cd", "--config-name", "-cn"}


def open_streams() -> None:
    """Open the null device in place of each closed standard stream (``>&-``).

    Otherwise the next file to be opened takes its number, and a library's output would land in that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode, encoding="utf-8"))  # noqa: SIM115  # open until the process ends


def program() -> str:
    """Return the words that start a training here: ``python train.py``, ``python mine.py`` or ``xattn train``."""
    started = Path(sys.argv[0])
    is_command = started.name == "xattn" or started.parts[-2:] == ("xattn", "cli.py")
    return "xattn train" if is_command else shlex.join(["python", sys.argv[0]])


def check_working_directory() -> None:
    """Raise :class:`BadInput` if the working directory was deleted, or cannot be looked up."""
    try:
        Path.cwd()
    except OSError as error:
        raise BadInput(f"the working directory cannot be read ({error}); start from a folder that exists") from error


def announce(arguments: Sequence[str]) -> None:
    """Print the requested run or sweep on a terminal, before anything slow is imported.

    Print nothing if the arguments ask for something to read, such as ``--help`` or ``--cfg``, or begin with a command.
    """
    flags = {word.partition("=")[0] for word in arguments if word.startswith("-")}
    words = [word for word in arguments if word not in _OF_A_SWEEP]
    begins_a_run = not words or words[0].startswith(("-", "~")) or "=" in words[0]
    if sys.stdout is None or not sys.stdout.isatty() or flags - _OF_A_RUN or not begins_a_run:
        return
    what = "sweep" if flags & _OF_A_SWEEP else "config"
    screen.say(f"{what:12}{shlex.join(words) or 'the default'}")
    sys.stdout.flush()


@contextlib.contextmanager
def loading(command: str, arguments: Sequence[str]) -> Iterator[None]:
    """Wrap the import of a command: a terminal shows what is being loaded and, for train, what is requested."""
    if command == "train":
        announce(arguments)
    shows = command != "train" and sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if shows:
        print(f"xattn {command} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shows:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def tell(message: object) -> None:
    """Print an error's message on the error stream; the exit code stands even if nobody reads the stream any more."""
    try:
        screen.say(f"xattn: {message}", file=sys.stderr)
        sys.stderr.flush()
    except OSError:
        screen.abandon(sys.stderr)


def answer(text: str) -> None:
    """Print the answer; the exit code, which is an answer too, stands even if nobody reads the text."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        screen.abandon(sys.stdout)
