"""The weights that a run starts from if they are not random: the files of a Llama folder, and a hash of them.

Importing this module does not import jax.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from xattn.errors import BadInput, needs_extra
from xattn.section import Section

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[\w.-]+\.safetensors")  # a name without a path, so an index can't point outside its folder


class Initial(Section):
    """``model.init_from``: a run is identified by the weights it starts from, wherever they are stored."""

    path: str = Field(min_length=1)
    """The folder, as typed."""
    weights_sha256: str = Field(pattern="^[0-9a-f]{16}$")
    """First 16 digits of the weight files' SHA-256; filled in when a path is typed, and written to config.yaml."""


def initial(path: str) -> dict[str, str]:
    """Return the values of :class:`Initial` for a folder. Raise :class:`BadInput` if it holds no weights."""
    if not Path(path).is_dir():
        raise BadInput(f"model.init_from = {path}: no such folder; give one with config.json and {WEIGHTS}")
    return {"path": path, "weights_sha256": weights_sha256(Path(path))}


def shards(folder: Path) -> dict[Path, set[str] | None]:
    """Return each weight file with the names of the tensors that the index places in it; None without an index.

    If both a single file and an index exist, use the single file, as transformers does. Raise :class:`BadInput`.
    """
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: None}
    if not (folder / INDEX).is_file():
        raise BadInput(f"{folder}: holds neither {WEIGHTS} nor {INDEX}")
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise BadInput(f"{folder / INDEX}: has no weight_map of tensors to files")
    found: dict[Path, set[str] | None] = {}
    for tensor, name in listed.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise BadInput(
                f"{folder / INDEX}: {tensor} is in {name!r}, which must be a .safetensors file beside the index"
            )
        found[folder / name] = (found.get(folder / name) or set()) | {tensor}
    if missing := [file.name for file in found if not file.is_file()]:
        raise BadInput(f"{folder / INDEX}: lists {missing[0]}, which does not exist (missing files: {len(missing)})")
    return found


def weights_sha256(folder: Path) -> str:
    """Return the first 16 digits of the SHA-256 over names and bytes of the weight files. Raise :class:`BadInput`."""
    try:
        stats = [(file, file.stat()) for file in sorted(shards(folder))]
        return _digest(tuple((file.absolute(), stat.st_size, stat.st_mtime_ns) for file, stat in stats))
    except OSError as error:
        raise BadInput(f"{error.filename}: cannot be read: {error.strerror}") from error


@lru_cache(maxsize=32)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash the files. The result is cached while size and time stay the same, since a sweep asks once per run."""
    whole = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            whole.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n".encode())
    return whole.hexdigest()[:16]


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raise :class:`BadInput` if there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path}: must be a JSON object, not {type(found).__name__}")
    return found


class TensorHead(NamedTuple):
    """What a weight file says about a tensor before its numbers."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def tensor_heads(folder: Path) -> dict[str, TensorHead]:
    found: dict[str, TensorHead] = {}
    for path, listed in shards(folder).items():
        with opened(path) as file:
            names = set(file.keys())
            if listed is not None and names != listed:
                raise BadInput(f"{path}: this file and the index beside it disagree on {some_of(names ^ listed)}")
            slices = {name: file.get_slice(name) for name in names}
            found |= {
                name: TensorHead(path, each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()
            }
    return found


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a weight file. safetensors itself checks that it is whole."""
    try:
        import ml_dtypes  # noqa: F401 — makes bfloat16 a dtype of NumPy, without which safetensors cannot read it
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise needs_extra("reading safetensors", "hf", error) from error
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: not a complete safetensors file: {error}") from error


def some_of(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return first if not others else f"{first} and {len(others)} more"
