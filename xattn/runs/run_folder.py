"""The run folder: who may write in it, what state it is in, and how its files are written so that no reader sees half.

Standard library only, so that everyone may import it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xattn.errors import BadInput, FolderInUse, StorageError, looking_at, storage_error

CONFIG, OVERRIDES, PROVENANCE = "config.yaml", "overrides.yaml", "provenance.json"
METRICS, SUMMARY, LOG = "metrics.jsonl", "summary.json", "log.txt"
EVALUATIONS = "evaluations.jsonl"
CHECKPOINTS, ARTIFACTS = "checkpoints", "artifacts"
WINDOW_LOSSES, SAMPLE, ATTENTION_MAPS = "window_losses.npy", "sample.txt", "attention_maps.png"  # among the artifacts
FOLDERS = (CHECKPOINTS, ARTIFACTS, "wandb")
TOKENIZER = "tokenizer.json"
LOCK = ".lock"
SUPERSEDED = ".superseded"
_TEMPORARY = ".tmp"
# Who only looks whether a folder is held (is_held) holds it for that moment.
_TRIES, _TRY_SECONDS = 5, 0.01
# What a start that died before its config.yaml may have left: a folder with no more than this counts as empty.
_NOTHING_YET = {LOCK, LOG, CONFIG + _TEMPORARY}
_HYDRA = "hydra.yaml"
REPORT = "report"  # the folder in a study's that its report is written to, and so no run's


class RunFolder:
    """A run's folder, held by this process until :meth:`release` or the end of the process.

    The lock is the kernel's (flock): it goes with the process, however that ends, and a stale one cannot exist.
    Raises :class:`FolderInUse` where another process holds it, :class:`BadInput` where the path cannot be a folder, or
    is one that is not empty and not a run's: that is neither written nor moved.
    """

    def __init__(self, path: Path):
        self.path = path.absolute()
        self._lock = _acquire(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def release(self) -> None:
        os.close(self._lock)

    def withdraw(self) -> None:
        """Takes the lock file away, and the folder with it if that leaves it empty, its study's and outputs/ alike."""
        (self / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds something, or is gone already
            self.path.rmdir()
            if self.path.parent.parent.name == "outputs":
                self.path.parent.rmdir()
                self.path.parent.parent.rmdir()

    def summary(self) -> dict[str, Any] | None:
        """summary.json, or None where no run has written one yet."""
        return read_summary(self.path)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in that file, or None where it is not there."""
        return read_json(self / name)

    def is_ours(self) -> bool:
        return (self / CONFIG).is_file()

    def move_aside(self) -> Path:
        """Moves the folder to ``<parent>/.superseded/<name>-<UTC time>`` and begins a new one, held by this process."""
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        target = self.path.parent / SUPERSEDED / f"{self.path.name}-{now}"
        target.parent.mkdir(exist_ok=True)
        self.path.rename(target)
        moved_lock, self._lock = self._lock, _acquire(self.path)
        os.close(moved_lock)
        return target


def is_held(path: Path) -> bool:
    """Whether a process is running in the run folder ``path``; where there are no locks, none can be."""
    try:
        with (path / LOCK).open("rb") as lock:
            flock(lock.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB, path)
    except (FileNotFoundError, StorageError):
        return False
    except BlockingIOError:
        return True
    return False


def flock(descriptor: int, operation: int, path: Path) -> None:
    """The kernel's lock on an open file at ``path``.

    Raises :class:`StorageError` where the file system has none, BlockingIOError where another process has it and the
    operation does not wait.
    """
    with looking_at("lock", path):
        fcntl.flock(descriptor, operation)


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary.json of the run folder ``path``, or None where there is none."""
    return read_json(path / SUMMARY)


def read_provenance(path: Path) -> dict[str, Any] | None:
    """The provenance.json of the run folder ``path``, or None where there is none."""
    return read_json(path / PROVENANCE)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in the file, or None where it is not there. Raises :class:`BadInput` where it holds no object."""
    try:
        loaded = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path}: not readable: {error}") from error
    if not isinstance(loaded, dict):
        raise BadInput(f"{path}: not readable: holds {json.dumps(loaded)[:40]}, and must hold a JSON object")
    return loaded


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Writes the summary.json of the run folder ``path``."""
    write_atomically(path / SUMMARY, to_json(summary, indent=2) + "\n")


def fsync(path: Path) -> None:
    """Pushes a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Replaces the file: a reader, or a crash at any moment, sees the old content or the new one.

    shared: other processes may be writing it too, so the temporary file needs a name of its own.
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
    """JSON text in which every number that is not finite is null, however deep it stands.

    ascii_only: all else is escaped, so that it can be printed whatever encoding a stream has.
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
                raise BadInput(f"{path}: is not empty and holds no {CONFIG} of a run; choose another folder")
            descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            for there in (path, *path.parents):
                if there.exists() and not there.is_dir():
                    raise BadInput(f"{there}: is a file, and a run needs a folder there") from error
                if there.is_symlink() and not there.exists():
                    raise BadInput(f"{there}: is a link to what is not there") from error
            continue  # moved aside by another process in between
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
        if _is_at(descriptor, path / LOCK):
            return descriptor
        os.close(descriptor)  # moved aside between the open and the lock: take the new one


def _is_nothing_yet(entry: Path) -> bool:
    """Whether a start that died before its config.yaml may have left it: we, or Hydra before us, where a log
    (``hydra/job_logging``) or YAML files of its own (``hydra.output_subdir``) are asked for."""
    return entry.name in _NOTHING_YET or entry.suffix == ".log" or (entry / _HYDRA).is_file()


def is_of_hydra(config: Path) -> bool:
    """Whether a config.yaml is one that Hydra wrote into ``hydra.output_subdir``, and not a run's."""
    return config.with_name(_HYDRA).is_file()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def shown(path: Path) -> str:
    """The path as a person would type it from here."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # "here" is gone by now, or the path is elsewhere
        return str(path.relative_to(Path.cwd()))
    return str(path)


def result_line(summary: Mapping[str, Any]) -> str:
    if summary["val_loss"] is None:
        return "no finite val_loss"
    return loss_text(summary["val_loss"], summary["val_bpb"])


def loss_text(val_loss: float, val_bpb: float | None) -> str:
    """A held-out loss for people; val_bpb is None where tokens stand for no bytes."""
    return f"val_loss {val_loss:.4f} nats/token" + ("" if val_bpb is None else f" = {val_bpb:.4f} bits/byte")
