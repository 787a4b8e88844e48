"""Several processes at one study of trials: one at a time draws, and each can tell who is still there.

Both by the kernel's locks (flock), as in :mod:`xattn.runs.run_folder`: they go with their process, however that ends.
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
    """While it is entered, every other process of this study waits to enter it."""
    with (folder / _DRAWING).open("a") as lock:
        flock(lock.fileno(), fcntl.LOCK_EX, folder)
        yield


@contextlib.contextmanager
def present(folder: Path) -> Iterator[str]:
    """A name under which :func:`is_present` finds this process, until the end."""
    name = f".tuning-{secrets.token_hex(4)}"
    with (folder / name).open("x") as lock:
        flock(lock.fileno(), fcntl.LOCK_EX, folder)
        try:
            yield name
        finally:
            (folder / name).unlink(missing_ok=True)


def is_present(folder: Path, name: str) -> bool:
    """Whether the process of that name is at the study; of one that died the file is removed."""
    try:
        with (folder / name).open("r") as lock:
            flock(lock.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB, folder)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    (folder / name).unlink(missing_ok=True)
    return False
