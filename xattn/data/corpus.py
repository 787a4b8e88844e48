"""Corpora: from the ``data`` group to two byte strings, training and validation, and the hash of what was read."""

from __future__ import annotations

import glob
import gzip
import hashlib
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xattn.data.config import DataConfig, PythonStdlibConfig
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
    if isinstance(config, PythonStdlibConfig):
        train, validation = _split_by_file(_standard_library(), config.validation_fraction)
        source = "data=python_stdlib"
    else:
        train, validation = _split_at_end(_text(config.path), config.validation_fraction)
        source = f"data.path = {config.path!r}"
    for split, text in (("training", train), ("validation", validation)):
        if len(text) < context_length + 1:
            raise BadInput(
                f"{source}: its {split} part has {len(text)} bytes; at least backend.context_length + 1 = "
                f"{context_length + 1} are needed"
            )
    digest = hashlib.sha256(train + validation).hexdigest()
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8), digest)


def _standard_library() -> dict[str, bytes]:
    """Path below the library's folder → source, of every module but the tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _NOT_LIBRARY.isdisjoint(name.parts):
            files[name.as_posix()] = path.read_bytes()
    if not files:
        raise BadInput(f"data=python_stdlib: this Python has no sources in {root}; use data=text data.path=…")
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


def _text(path: str) -> bytes:
    where = Path(path).expanduser()
    if where.is_file():
        files = [where]
    elif where.is_dir():
        files = sorted(file for file in where.rglob("*") if file.is_file() and not file.name.startswith("."))
    else:
        files = sorted(Path(file) for file in glob.glob(str(where), recursive=True) if Path(file).is_file())
    if not files:
        kind = "the folder has no files" if where.is_dir() else "no such file or folder, and no file matches it"
        raise BadInput(f"data.path = {path!r}: {kind}")
    return b"".join(_read(file) for file in files)


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
