"""Corpora: from the ``data`` group to two byte strings, training and validation, and the hash of what was read."""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xattn.data.config import DataConfig, PythonStdlibConfig
from xattn.data.task_config import TaskConfig
from xattn.errors import BadInput

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """train, validation: token ids, uint8 (N,), one a byte. sha256: of all bytes that were read, in order."""

    train: np.ndarray
    validation: np.ndarray
    sha256: str


def load_corpus(config: DataConfig, context_length: int) -> Corpus:
    """Reads the corpus and splits it, the same way every time.

    Raises :class:`BadInput` for what is missing, unreadable, or too short for one window of context_length tokens
    and their successors in each split.
    """
    assert not isinstance(config, TaskConfig)
    files = find_files(config)
    if isinstance(config, PythonStdlibConfig):
        train, validation = _split_by_file(
            {name: _read(file) for name, file in files.items()}, config.validation_fraction
        )
        source = "data=python_stdlib"
    else:
        train, validation = _split_at_end(b"".join(map(_read, files.values())), config.validation_fraction)
        source = f"data.path = {config.path!r}"
    for split, text in (("training", train), ("validation", validation)):
        if len(text) < context_length + 1:
            raise BadInput(
                f"{source}: its {split} part has {len(text)} bytes; at least backend.context_length + 1 = "
                f"{context_length + 1} are needed"
            )
    digest = hashlib.sha256(train + validation).hexdigest()
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8), digest)


def find_files(config: DataConfig) -> dict[str, Path]:
    """The corpus's files by name, sorted, not read yet. Raises :class:`BadInput` where there are none."""
    if isinstance(config, TaskConfig):
        return {}  # it makes its own sequences
    if isinstance(config, PythonStdlibConfig):
        root = Path(sysconfig.get_path("stdlib"))
        modules = {file.relative_to(root): file for file in root.rglob("*.py")}
        files = {name.as_posix(): file for name, file in modules.items() if _NOT_LIBRARY.isdisjoint(name.parts)}
        if not files:
            raise BadInput(f"data=python_stdlib: this Python has no sources in {root}; use data=text data.path=…")
        return dict(sorted(files.items()))
    where = os.path.expanduser(config.path)
    is_folder = os.path.isdir(where)
    if is_folder:
        found = [file for file in Path(where).rglob("*") if not file.name.startswith(".")]
    elif os.path.isfile(where):
        found = [Path(where)]  # though its name may look like a glob
    else:
        found = [Path(file) for file in glob.glob(where, recursive=True)]
    files = {str(file): file for file in sorted(found) if file.is_file()}
    if not files:
        kind = "the folder has no files" if is_folder else "no such file or folder, and no file matches it"
        raise BadInput(f"data.path = {config.path!r}: {kind}")
    return files


def _split_by_file(files: dict[str, bytes], validation_fraction: float) -> tuple[bytes, bytes]:
    """Holds out files, in the order of the hashes of their names, until they are that fraction of the bytes."""
    held_out, wanted = set[str](), validation_fraction * sum(map(len, files.values()))
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if wanted <= 0:
            break
        held_out.add(name)
        wanted -= len(files[name])
    train = b"".join(text for name, text in files.items() if name not in held_out)
    return train, b"".join(text for name, text in files.items() if name in held_out)


def _read(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        return gzip.decompress(content) if file.suffix == ".gz" else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(f"data.path: {file} is not whole gzip: {error}") from error
    except OSError as error:
        raise BadInput(f"data.path: {file} cannot be read: {error.strerror}") from error


def _split_at_end(text: bytes, validation_fraction: float) -> tuple[bytes, bytes]:
    border = len(text) - int(len(text) * validation_fraction)
    return text[:border], text[border:]
