"""The run folder: its lock, its state, and atomic writes, so that no reader sees half a file.

Standard library only, so that any module may import it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xattn.errors import BadInput, FolderInUse, StorageError, storage_error

CONFIG, OVERRIDES, PROVENANCE = "config.yaml", "overrides.yaml", "provenance.json"
METRICS, SUMMARY, LOG = "metrics.jsonl", "summary.json", "log.txt"
EVALUATIONS = "evaluations.jsonl"
CHECKPOINTS, ARTIFACTS = "checkpoints", "artifacts"
# Among the artifacts. Losses keep the file name of versions that called a held-out sequence a window.
SEQUENCE_LOSSES, SAMPLE, ATTENTION_MAPS = "window_losses.npy", "sample.txt", "attention_maps.png"
FOLDERS = (CHECKPOINTS, ARTIFACTS, "wandb")
TOKENIZER = "tokenizer.json"
LOCK = ".lock"
SUPERSEDED = ".superseded"
_TEMPORARY = ".tmp"
# is_held() itself holds the lock for a moment, so a busy lock is tried again.
_TRIES, _TRY_SECONDS = 5, 0.01
# What flock raises on Lustre without -o flock, NFS without its lock service, and some FUSE.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
# A start that died before writing its config.yaml may leave these; a folder with nothing else counts as empty.
_NOTHING_YET = {LOCK, LOG, CONFIG + _TEMPORARY}
_HYDRA = "hydra.yaml"
REPORT = "report"  # a study's report goes to this folder of the study, so no run may be called this


class RunFolder:
    """A run's folder, held by this process until :meth:`release` or the end of the process.

    The lock is the kernel's (flock): it goes with the process, however that ends, so it cannot be stale.
    Raises :class:`FolderInUse` if another process holds the folder, and :class:`BadInput` if the path cannot be a
    folder, or is a non-empty folder that is not a run's. Such a folder is neither written nor moved.
    """

    def __init__(self, path: Path):
        self.path = path.absolute()
        self._lock = _acquire(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def release(self) -> None:
        os.close(self._lock)

    def withdraw(self) -> None:
        """Remove the lock file, then the folder, its study's folder and outputs/, as long as each is empty."""
        (self / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or gone already
            self.path.rmdir()
            if self.path.parent.parent.name == "outputs":
                self.path.parent.rmdir()
                self.path.parent.parent.rmdir()

    def is_ours(self) -> bool:
        return (self / CONFIG).is_file()

    def move_aside(self) -> Path:
        """Move the folder to ``<parent>/.superseded/<name>-<UTC time>`` and create a new one, held by this process."""
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        target = self.path.parent / SUPERSEDED / f"{self.path.name}-{now}"
        target.parent.mkdir(exist_ok=True)
        self.path.rename(target)
        moved_lock, self._lock = self._lock, _acquire(self.path)
        os.close(moved_lock)
        return target


def is_held(path: Path) -> bool:
    """Return whether a process is running in the run folder ``path``; without file locks, none can be."""
    try:
        with (path / LOCK).open("rb") as lock:
            flock(lock.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB, path)
    except (FileNotFoundError, StorageError):
        return False
    except BlockingIOError:
        return True
    return False


def flock(descriptor: int, operation: int, path: Path) -> None:
    """Apply the kernel's lock ``operation`` to an open file at ``path``.

    Raises :class:`StorageError` if the file system has no locks, and BlockingIOError if another process has the lock
    and the operation does not wait.
    """
    # Not by the filelock package: it has no shared flock, which is_held() needs and which takes no right to write. On a
    # file system without locks it falls back to a marker file, which a killed process leaves behind.
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise StorageError(
            f"{path}: the file system there ({_file_system(path)}) has no locks ({error}), so two processes could "
            "write to one folder\nmount it with locks (Lustre: -o flock), or put runs on another file system: "
            "hydra.run.dir=…, hydra.sweep.dir=…"
        ) from error


def _file_system(path: Path) -> str:
    """Return type and mount point of a path's file system, from Linux's /proc; elsewhere only the mount point."""
    mount = next((folder for folder in (path, *path.parents) if os.path.ismount(folder)), Path("/"))
    with contextlib.suppress(OSError):
        for line in reversed(Path("/proc/self/mounts").read_text("utf-8", "replace").splitlines()):
            _, where, kind, *_ = line.split(" ")
            if where.replace("\\040", " ") == str(mount):
                return f"{kind} at {mount}"
    return str(mount)


def read_summary(path: Path) -> dict[str, Any] | None:
    """Return the summary.json of the run folder ``path``, or None if there is none."""
    return read_json(path / SUMMARY)


def read_provenance(path: Path) -> dict[str, Any] | None:
    """Return the provenance.json of the run folder ``path``, or None if there is none."""
    return read_json(path / PROVENANCE)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in the file, or None without a file. Raises :class:`BadInput` if it holds no object."""
    try:
        loaded = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path}: not readable: {error}") from error
    if not isinstance(loaded, dict):
        raise BadInput(f"{path}: not readable: must hold a JSON object, got {json.dumps(loaded)[:40]}")
    return loaded


def read_or_empty(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file, or an empty one if the file is missing or unreadable."""
    try:
        return read_json(path) or {}
    except BadInput:
        return {}


def runs_in(study: Path) -> list[Path]:
    """Return the run folders in a study's folder, sorted, without hidden ones."""
    return sorted(file.parent for file in study.glob(f"*/{CONFIG}") if not file.parent.name.startswith("."))


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary.json of the run folder ``path``."""
    write_json(path / SUMMARY, summary)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_atomically(path, to_json(values, indent=2) + "\n")


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Replace the file: a reader sees the old content or the new one, even after a crash at any moment.

    shared: other processes may write it too, so the temporary file gets a name of its own.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{_TEMPORARY}" if shared else path.name + _TEMPORARY)
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def finite_or_none(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def to_json(values: Mapping[str, Any], *, indent: int | None = None, ascii_only: bool = False) -> str:
    """Return JSON text in which every number that is not finite is null, at any depth.

    ascii_only: escape all other characters, so that the text can be printed in any stream's encoding.
    """
    return json.dumps(_finite(values), indent=indent, allow_nan=False, ensure_ascii=ascii_only)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return finite_or_none(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _acquire(path: Path) -> int:
    tries = 0
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not (path / CONFIG).exists() and not all(map(_is_nothing_yet, path.iterdir())):
                raise BadInput(f"{path}: is not empty and has no run's {CONFIG}; choose another folder")
            descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            for there in (path, *path.parents):
                if there.exists() and not there.is_dir():
                    raise BadInput(f"{there}: is a file, but a run needs a folder there") from error
                if there.is_symlink() and not there.exists():
                    raise BadInput(f"{there}: is a broken link") from error
            continue  # another process moved it aside in between
        except OSError as error:
            raise storage_error(error, path) or BadInput(f"{path}: cannot be written: {error.strerror}") from error
        try:
            flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, path)
        except StorageError:
            os.close(descriptor)
            raise
        except BlockingIOError as error:
            os.close(descriptor)
            if (tries := tries + 1) <= _TRIES:
                time.sleep(_TRY_SECONDS)
                continue
            raise FolderInUse(f"{path}: another process is running in this folder") from error
        if is_at(descriptor, path / LOCK):
            return descriptor
        os.close(descriptor)  # moved aside between open and lock: take the new folder


def _is_nothing_yet(entry: Path) -> bool:
    """Return whether a start that died before writing its config.yaml may have left this entry.

    Hydra writes before us if asked for a log (``hydra/job_logging``) or its YAML files (``hydra.output_subdir``).
    """
    return entry.name in _NOTHING_YET or entry.suffix == ".log" or (entry / _HYDRA).is_file()


def is_of_hydra(config: Path) -> bool:
    """Return whether Hydra wrote this config.yaml into ``hydra.output_subdir``, so that it is not a run's."""
    return config.with_name(_HYDRA).is_file()


def is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file is the one at ``path``, which may have been moved or replaced since."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def shown(path: Path) -> str:
    """Return the path as a user would type it from here."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # "here" was deleted, or the path is elsewhere
        return str(path.relative_to(Path.cwd()))
    return str(path)


def result_line(summary: Mapping[str, Any]) -> str:
    if summary["val_loss"] is None:
        return "no finite val_loss"
    return loss_text(summary["val_loss"], summary["val_bpb"])


def loss_text(val_loss: float, val_bpb: float | None) -> str:
    """Return a held-out loss in words; val_bpb is None if tokens do not stand for bytes."""
    return f"val_loss {val_loss:.4f} nats/token" + ("" if val_bpb is None else f" = {val_bpb:.4f} bits/byte")
