"""Errors that a person is told about in a line, each with the exit code it leaves with."""

from __future__ import annotations

import errno
import re
import shutil
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
    PREEMPTED = 75


class XattnError(Exception):
    """An error with a message for a person and an exit code for a script."""

    exit_code = ExitCode.ERROR


class BadInput(XattnError):
    """Configuration or data that cannot be used: the message names what was given and what is allowed."""

    exit_code = ExitCode.BAD_INPUT


class IntegrityError(XattnError):
    """Data or checkpoints are not what the run recorded."""

    exit_code = ExitCode.INTEGRITY


class FolderInUse(XattnError):
    """Another process holds the run folder."""

    exit_code = ExitCode.IN_USE


class StorageError(XattnError):
    """The file system takes no more: full, over a quota or a size limit, read-only, or broken."""

    exit_code = ExitCode.STORAGE


class Preempted(XattnError):
    """Asked to stop, before there was anything to save that the same command would not find again."""

    exit_code = ExitCode.PREEMPTED


_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_STORAGE_WORDS = re.compile(
    "No space left|quota exceeded|File too large|Read-only file system|Input/output error", re.I
)


def storage_error(error: BaseException, path: Path) -> StorageError | None:
    """The error as a :class:`StorageError` where the file system is to blame for it, else None.

    Libraries wrap what the file system says: its words are looked for in the message and in what caused it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StorageError):
            return cause
        if isinstance(cause, OSError) and cause.errno in _STORAGE:
            return StorageError(_full(Path(cause.filename or path), cause.strerror))
        if found := _STORAGE_WORDS.search(str(cause)):
            return StorageError(_full(path, found[0]))
        cause = cause.__cause__ or cause.__context__
    return None


def _full(path: Path, reason: str | None) -> str:
    there = next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
    return f"{path}: cannot be written: {reason} ({shutil.disk_usage(there).free:,} bytes are free there)"
