"""Errors that are shown to the user as one message, each with its exit code."""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
import shutil
from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """Exit codes of ``train.py`` and ``xattn``; a process killed by signal n leaves with 128 + n."""

    DONE = 0
    ERROR = 1
    BAD_INPUT = 2
    DIVERGED = 3
    INTEGRITY = 4
    IN_USE = 5
    STORAGE = 6
    UNDECIDED = 10  # this and the next are of `xattn verdict`
    OPPOSITE = 11
    PREEMPTED = 75


class XattnError(Exception):
    """An error with a message for the user and an exit code for scripts."""

    exit_code = ExitCode.ERROR


class BadInput(XattnError):
    """Unusable configuration or data; the message names the given value and what is allowed."""

    exit_code = ExitCode.BAD_INPUT


class Diverged(XattnError):
    """A loss, a gradient or the last evaluation of the run is not finite."""

    exit_code = ExitCode.DIVERGED


class NotKept(BadInput):
    """A checkpoint was deleted on request, by ``trainer.keep`` or ``xattn prune``."""


class IntegrityError(XattnError):
    """Data or checkpoints are not what the run recorded."""

    exit_code = ExitCode.INTEGRITY


class FolderInUse(XattnError):
    """Another process holds the run folder."""

    exit_code = ExitCode.IN_USE


class StorageError(XattnError):
    """The file system cannot be written: full, over a quota or a size limit, read-only, or broken."""

    exit_code = ExitCode.STORAGE


class Preempted(XattnError):
    """Stopped on request, with nothing left to save; the same command continues."""

    exit_code = ExitCode.PREEMPTED


_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
_STORAGE_WORDS = re.compile(
    "No space left|quota exceeded|File too large|Read-only file system|Input/output error|Stale file handle", re.I
)


def storage_error(error: BaseException, path: Path) -> StorageError | None:
    """Return the error as a :class:`StorageError` if the file system caused it, else None.

    Libraries wrap the file system's errors, so its words are searched for in the message and in the chain of causes.
    """
    for cause in causes(error):
        if isinstance(cause, StorageError):
            return cause
        if isinstance(cause, OSError) and cause.errno in _STORAGE:
            return StorageError(_full(Path(cause.filename or path), cause.strerror))
        if found := _STORAGE_WORDS.search(str(cause)):
            return StorageError(_full(path, found[0]))
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, and in turn what caused each."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an OSError raised here: ``path`` cannot be written."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) or BadInput(f"{path}: cannot be written: {error.strerror}") from error


def _full(path: Path, reason: str | None) -> str:
    there = next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
    return f"{path}: cannot be written: {reason} ({shutil.disk_usage(there).free:,} bytes are free there)"


def needs_extra(what: str, extra: str, error: ImportError) -> BadInput:
    """Return the error for a missing package of an optional extra; it names the command that installs it."""
    clone = Path(__file__).resolve().parent.parent
    source = f'-e "{clone}[{extra}]"' if (clone / "pyproject.toml").is_file() else f'"xattn[{extra}]"'
    return BadInput(f"{what} needs the extra {extra}: pip install {source} ({first_line(error)})")


def did_you_mean(word: str, options: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return `` (did you mean OPTION?)`` with the option most like the word; empty if none is like it."""
    found = difflib.get_close_matches(word, [*options], n=1, cutoff=cutoff)
    return f" (did you mean {found[0]}?)" if found else ""


def first_line(error: BaseException) -> str:
    """Return the first line of the error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()
