"""The run folder: who may write in it, what state it is in, and how its files are written so that no reader sees half.

Standard library only, so that everyone may import it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xattn.errors import BadInput, FolderInUse

CONFIG, OVERRIDES, PROVENANCE = "config.yaml", "overrides.yaml", "provenance.json"
METRICS, SUMMARY, LOG = "metrics.jsonl", "summary.json", "log.txt"
CHECKPOINTS, ARTIFACTS = "checkpoints", "artifacts"
LOCK = ".lock"
SUPERSEDED = ".superseded"
_TEMPORARY = ".tmp"
_NOTHING_YET = {LOCK, LOG, *(name + _TEMPORARY for name in (CONFIG, OVERRIDES, PROVENANCE, SUMMARY))}


class RunFolder:
    """A run's folder, held by this process until :meth:`release` or the end of the process.

    The lock is the kernel's (flock): it goes with the process, however that ends, and a stale one cannot exist.
    Raises :class:`FolderInUse` where another process holds it, :class:`BadInput` where the path cannot be a folder, or
    is one that is not empty and not a run's: that is neither written nor moved.
    """

    def __init__(self, path: Path):
        self.path = path.absolute()
        if self.path.is_dir() and not self.is_ours() and not self.is_empty():
            raise BadInput(f"{path}: is not empty and holds no {CONFIG} of a run; choose another folder")
        self._lock = _acquire(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def release(self) -> None:
        os.close(self._lock)

    def summary(self) -> dict[str, Any] | None:
        """summary.json, or None where no run has written one yet."""
        return read_summary(self.path)

    def is_ours(self) -> bool:
        return (self / CONFIG).is_file()

    def is_empty(self) -> bool:
        """No file, or only what a start that died before its config.yaml leaves."""
        return all(entry.name in _NOTHING_YET for entry in self.path.iterdir())

    def move_aside(self) -> Path:
        """Moves the folder to ``<parent>/.superseded/<name>-<UTC time>`` and begins a new one, held by this process."""
        time = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        target = self.path.parent / SUPERSEDED / f"{self.path.name}-{time}"
        target.parent.mkdir(exist_ok=True)
        self.path.rename(target)
        moved_lock, self._lock = self._lock, _acquire(self.path)
        os.close(moved_lock)
        return target


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary.json of the run folder ``path``, or None where there is none."""
    try:
        return json.loads((path / SUMMARY).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path / SUMMARY}: not readable: {error}") from error


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Writes the summary.json of the run folder ``path``."""
    write_atomically(path / SUMMARY, to_json(summary, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file: a reader, or a crash at any moment, sees the old text or the new one."""
    temporary = path.with_name(path.name + _TEMPORARY)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def finite_or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None


def to_json(values: Mapping[str, Any], *, indent: int | None = None) -> str:
    """JSON text in which every number that is not finite is null."""
    finite = {key: finite_or_none(v) if isinstance(v, float) else v for key, v in values.items()}
    return json.dumps(finite, indent=indent, allow_nan=False, ensure_ascii=False)


def _acquire(path: Path) -> int:
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except (FileExistsError, NotADirectoryError) as error:
            raise BadInput(f"{error.filename}: is a file, and a run needs a folder there") from error
        except OSError as error:
            raise BadInput(f"{path}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise FolderInUse(f"{path}: another process is running in this folder") from error
        if _is_at(descriptor, path / LOCK):
            return descriptor
        os.close(descriptor)  # the folder was moved aside between the open and the lock: take the new one


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
