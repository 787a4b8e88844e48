"""Locks for several processes that share a search: only one draws at a time, and each can see which are alive.

Both use the kernel's locks (flock), as :mod:`xattn.runs.run_folder` does: a lock ends with its process in any case.
"""

from __future__ import annotations

import contextlib
import fcntl
import secrets
from collections.abc import Iterator
from pathlib import Path

from xattn.runs.run_folder import flock

_DRAWING = ".tuning.lock"


@contextlib.contextmanager
def drawing(folder: Path) -> Iterator[None]:
    """Hold the search's lock for drawing; its other processes wait for it."""
    with (folder / _DRAWING).open("a") as lock:
        flock(lock.fileno(), fcntl.LOCK_EX, folder)
        yield


@contextlib.contextmanager
def present(folder: Path) -> Iterator[str]:
    """Yield a name under which :func:`is_present` finds this process, until the block ends."""
    name = f".tuning-{secrets.token_hex(4)}"
    with (folder / name).open("x") as lock:
        flock(lock.fileno(), fcntl.LOCK_EX, folder)
        try:
            yield name
        finally:
            (folder / name).unlink(missing_ok=True)


def is_present(folder: Path, name: str) -> bool:
    """Return whether the process of that name is working on the search. The file of a dead process is removed."""
    try:
        with (folder / name).open("r") as lock:
            flock(lock.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB, folder)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    (folder / name).unlink(missing_ok=True)
    return False
