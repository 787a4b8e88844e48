"""What safetensors files hold: dtype and shape of each tensor, read without its numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from xattn.errors import BadInput, needs_extra
from xattn.model.initial import shards


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
