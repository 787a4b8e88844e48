"""Existing token ids: ``.bin`` and ``.npy`` files, mapped into memory."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from xattn.data.config import MemmapConfig
from xattn.errors import BadInput

_BLOCK = 2**22
_LOOK = 2**16  # ids at the beginning of a file to look at
_ENOUGH = 64  # fewer ids show nothing
_PRINTABLE = (*range(32, 127), *b"\t\n\r")


class MappedIds:
    """One file's ids (N,). Raises :class:`BadInput` if it is not a flat array of integers."""

    def __init__(self, file: Path, dtype: str):
        self.file = file
        try:
            if file.suffix == ".npy":
                ids = np.load(file, mmap_mode="r", allow_pickle=False)
            else:
                size, width = file.stat().st_size, np.dtype(dtype).itemsize
                if size % width:
                    raise ValueError(f"{size} bytes are not a whole number of {dtype} values")
                ids = np.memmap(file, np.dtype(dtype).newbyteorder("<"), "r") if size else np.zeros(0, dtype)
        except (ValueError, EOFError) as error:
            raise BadInput(f"data.path: {file} is not an array of ids: {str(error).splitlines()[0]}") from error
        except OSError as error:
            raise BadInput(f"data.path: {file} cannot be read: {error.strerror}") from error
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise BadInput(f"data.path: {file} is not a flat array of integers: {ids.dtype} of shape {ids.shape}")
        if file.suffix != ".npy" and (other := _something_else(ids[:_LOOK])):
            raise BadInput(f"data.path: {file} read as data.dtype = {dtype}: {other}")
        self.ids: np.ndarray = ids

    def check_ids(self, vocab_size: int) -> str:
        """Return the ids' SHA-256. Raises :class:`BadInput` if one is not below vocab_size; devices clamp silently."""
        digest = hashlib.sha256()
        for start in range(0, len(self.ids), _BLOCK):
            block = self.ids[start : start + _BLOCK]
            wrong = np.flatnonzero((block < 0) | (block >= vocab_size))
            if len(wrong):
                raise BadInput(
                    f"data.path: {self.file}: id {block[wrong[0]]} at position {start + wrong[0]}; "
                    f"data.vocab_size = {vocab_size} allows 0 to {vocab_size - 1}"
                )
            digest.update(block.tobytes())
        return digest.hexdigest()


def _something_else(ids: np.ndarray) -> str:
    """Return what the first ids show if the file has another type; all numbers can be below vocab_size even then.

    The parts of a wider number alternate: low parts vary, and the high parts of a vocabulary below 2^18 are 0 to 3.
    """
    if len(ids) < _ENOUGH:
        return ""
    width = ids.dtype.itemsize
    if width > 1:
        text = ids.tobytes()
        printable = sum(text.count(byte) for byte in _PRINTABLE)
        if printable > 0.99 * len(text):
            return "it is text, not ids; data=text reads it"
    for factor in (4, 2):
        columns = ids[: len(ids) // factor * factor].reshape(-1, factor)
        low, high = columns[:, : factor // 2], columns[:, factor // 2 :]
        wide = {1: "uint8", 2: "uint16", 4: "uint32", 8: "int64"}.get(factor * width)
        if wide and high.min() >= 0 and high.max() <= 3 and len(np.unique(low)) > 4 * len(np.unique(high)):
            part = "second id" if factor == 2 else "third and fourth id"
            return f"every {part} is 0 to {high.max()}, as if the ids were wider; try data.dtype={wide}"
    return ""


def open_memmaps(config: MemmapConfig) -> list[MappedIds]:
    """Return the one file, or those of train and val. Raises :class:`BadInput` if they are missing."""
    where = Path(os.path.expanduser(config.path))
    if os.path.isfile(where):
        return [MappedIds(where, config.dtype)]
    if not os.path.isdir(where):
        raise BadInput(f"data.path = {config.path!r}: no such file or folder")
    found = []
    for split in ("train", "val"):
        files = [where / f"{split}.{kind}" for kind in ("bin", "npy") if (where / f"{split}.{kind}").is_file()]
        if len(files) != 1:
            there = "both" if files else "neither"
            raise BadInput(f"data.path = {config.path!r}: needs either {split}.bin or {split}.npy, but has {there}")
        found.append(MappedIds(files[0], config.dtype))
    return found
