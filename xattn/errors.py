"""Errors that are shown to the user as one message, each with its exit code."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Outside:
    """An error that something outside xattn may raise when first used, and its message. All conditions must hold."""

    kinds: tuple[type[Exception], ...]
    becomes: type[XattnError]
    message: str
    """The message, with {error} (its first line), {value} (the variable's), {path}, {system} (its file system)."""
    says: str = ""
    """A regular expression that the error's message must contain."""
    errnos: tuple[int, ...] = ()
    """If any are given, the error's errno must be one of them."""
    variable: str | None = None
    """If given, the environment must have this variable."""

    def applies(self, error: Exception) -> bool:
        return (
            isinstance(error, self.kinds)
            and re.search(self.says, str(error)) is not None
            and (not self.errnos or (isinstance(error, OSError) and error.errno in self.errnos))
            and (self.variable is None or self.variable in os.environ)
        )


# What is looked at → rows, of which the first that applies is used. tests/system/test_outside.py raises each.
OUTSIDE: dict[str, tuple[Outside, ...]] = {
    "device": (
        Outside(
            (RuntimeError,),
            BadInput,
            "XLA_FLAGS = {value!r}: {error}",
            says="[Ff]lag",
            variable="XLA_FLAGS",
        ),
        Outside(
            (RuntimeError,),
            BadInput,
            "JAX_NUM_CPU_DEVICES = {value!r}: must be a number of at least 1, or unset",
            says="process_index",
            variable="JAX_NUM_CPU_DEVICES",
        ),
        Outside(
            (RuntimeError,),
            BadInput,
            "XLA_FLAGS = {value!r}: leaves jax without a device; xla_force_host_platform_device_count must be ≥ 1",
            says="process_index",
            variable="XLA_FLAGS",
        ),
        Outside(  # jax asserts that it has a plugin for CUDA, and its assertion has no message
            (AssertionError, RuntimeError),
            BadInput,
            "JAX_PLATFORMS = {value!r}: jax finds no such device here, or has no plugin for it ({error}); unset it, or "
            "set JAX_PLATFORMS=cpu",
            says="^$|nable to initialize backend|nknown backend",
            variable="JAX_PLATFORMS",
        ),
        Outside(
            (RuntimeError,),
            BadInput,
            "JAX_PLATFORM_NAME = {value!r}: {error}; unset it, or set JAX_PLATFORM_NAME=cpu",
            says="nknown backend",
            variable="JAX_PLATFORM_NAME",
        ),
        Outside(  # a driver that does not answer, or a plugin of another version
            (RuntimeError,), BadInput, "jax finds no device: {error}", says="nable to initialize backend"
        ),
        Outside(
            (ValueError,),
            BadInput,
            "jax rejects an environment variable: {error}",
            says="for JAX flag jax_|for environment '|^jax\\.default_device",
        ),
    ),
    "lock": (
        Outside(  # Lustre without -o flock, NFS without its lock service, some FUSE
            (OSError,),
            StorageError,
            "{path}: the file system there ({system}) has no locks ({error}), so two processes could write to one "
            "folder\nmount it with locks (Lustre: -o flock), or put runs on another file system: hydra.run.dir=…, "
            "hydra.sweep.dir=…",
            errnos=(errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK),
        ),
    ),
    "working directory": (
        Outside(  # it was deleted, or a folder above it cannot be read
            (OSError,), BadInput, "the working directory cannot be read ({error}); start from a folder that exists"
        ),
    ),
}


@contextlib.contextmanager
def looking_at(what: str, path: Path | None = None) -> Iterator[None]:
    """Convert errors raised here into those that :data:`OUTSIDE` has for them. Other errors pass unchanged."""
    rows = OUTSIDE[what]
    try:
        yield
    except tuple({kind for row in rows for kind in row.kinds}) as error:
        for row in rows:
            if row.applies(error):
                value = os.environ[row.variable] if row.variable else None
                system = _file_system(path) if path else None
                raise row.becomes(
                    row.message.format(error=first_line(error), value=value, path=path, system=system)
                ) from error
        raise


def _file_system(path: Path) -> str:
    """Return type and mount point of a path's file system, from Linux's /proc; elsewhere only the mount point."""
    mount = next((folder for folder in (path, *path.parents) if os.path.ismount(folder)), Path("/"))
    with contextlib.suppress(OSError):
        for line in reversed(Path("/proc/self/mounts").read_text("utf-8", "replace").splitlines()):
            _, where, kind, *_ = line.split(" ")
            if where.replace("\\040", " ") == str(mount):
                return f"{kind} at {mount}"
    return str(mount)
