"""Token ids on disk, made once: content-addressed shards in the user's cache folder, mapped into memory.

A shard is raw little-endian ids, ``00007.bin``, and a record, ``00007.json``: the number of ids, SHA-256, and whether
the tokens decode to the text. If some tokens cover other numbers of bytes than they stand for by themselves,
``00007.sizes`` has the numbers, uint32 (N,). All are written under temporary names, synced and renamed, the record
last: a shard that has a .json is whole. A killed process continues at its next start with the shard it was at. A shard
that fails its digest is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from xattn.data.tokenizer import Encoded
from xattn.errors import Preempted, StorageError
from xattn.runs.run_folder import flock, fsync, write_atomically
from xattn.system.cache import cache_folder
from xattn.tracking.display import Screen

Encode = Callable[[int], Iterator[Encoded]]  # shard number → its encoded pieces
SizesOf = Callable[[np.ndarray], np.ndarray]  # ids → how many bytes each stands for by itself
_SIZES = np.dtype("<u4")


class Tokens:
    """Arrays of ids laid end to end: ``tokens[a:b]`` copies, ``part(a, b)`` does not.

    sizes: for each array, the bytes of text its tokens cover; None: as many as they stand for by themselves.
    gives_back: whether the tokens decode to the text that they were made from.
    """

    def __init__(
        self, arrays: Sequence[np.ndarray], sizes: Sequence[np.ndarray | None] | None = None, *, gives_back: bool = True
    ):
        paired = zip(arrays, [None] * len(arrays) if sizes is None else sizes, strict=True)
        self._arrays = [(array, size) for array, size in paired if len(array)] or [(np.zeros(0, np.uint8), None)]
        self._ends = np.cumsum([len(array) for array, _ in self._arrays])
        self.gives_back = gives_back

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        found = [array for array, _ in self._within(part)]
        return np.concatenate(found) if found else self._arrays[0][0][:0]

    def sizes(self, part: slice, sizes_of: SizesOf) -> np.ndarray:
        """Return how many bytes of text each of these tokens covers."""
        found = [sizes_of(array) if size is None else size for array, size in self._within(part)]
        return np.concatenate([np.zeros(0, _SIZES), *found])

    def part(self, start: int, stop: int) -> Tokens:
        within = list(self._within(slice(start, stop)))
        return Tokens([array for array, _ in within], [size for _, size in within], gives_back=self.gives_back)

    def _within(self, part: slice) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        start, stop, _ = part.indices(len(self))
        first = int(np.searchsorted(self._ends, start, side="right"))
        for (array, size), end in zip(self._arrays[first:], self._ends[first:].tolist(), strict=True):
            begin = end - len(array)
            if begin >= stop:
                break
            here = slice(max(start - begin, 0), stop - begin)
            yield array[here], None if size is None else size[here]


def tokens_folder() -> Path | None:
    """Return the cache folder of tokens, or None if it can't be written or locked."""
    folder = cache_folder("tokens")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as lock:
            flock(lock.fileno(), fcntl.LOCK_SH, folder)
    except (OSError, StorageError):
        return None
    return folder


@dataclass(frozen=True)
class Content:
    """Ids to store, and how they are made."""

    key: str
    """Names the content."""
    shards: int
    """Number of shards."""
    encode: Encode
    dtype: np.dtype
    """Of the stored ids."""
    sizes_of: SizesOf


def stored_tokens(content: Content, *, say: Callable[[str], None], stop: Callable[[], bool]) -> Tokens:
    """Return the ids of all shards. Whole shards come from the cache; others are encoded and stored there.

    Without a cache, the ids live in a temporary folder until this process ends. A second process waits for the first
    one. Raises :class:`Preempted` if ``stop()``, which is called between shards, is true.
    """
    shards, dtype = range(content.shards), content.dtype
    with _folder_for(content.key) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        with _held(folder / ".lock", say, stop):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                found = list(pool.map(lambda number: _whole(folder, number, dtype), shards))
            damaged = [number for number, state in enumerate(found) if state == "damaged"]
            if damaged:
                say(f"warning: rebuilding damaged token shards in {folder}: {len(damaged)}")
            todo = [number for number, state in enumerate(found) if state != "whole"]
            with _bar(len(todo)) as advance:
                for number in todo:
                    if stop():
                        raise Preempted("stopped while the corpus was tokenised; the same command continues from there")
                    _write(folder, number, content)
                    advance()
            files = [folder / f"{number:05d}.bin" for number in shards]
            records = [_record(file) or {} for file in files]
            return Tokens(
                [_mapped(file, dtype) for file in files],
                [
                    None if record["sizes"] is None else _mapped(file.with_suffix(".sizes"), _SIZES)
                    for file, record in zip(files, records, strict=True)
                ],
                gives_back=all(record["gives_back"] for record in records),
            )


@contextlib.contextmanager
def _folder_for(key: str) -> Iterator[Path]:
    """Yield the content's folder in the cache, or a temporary one if there is no cache."""
    if (cache := tokens_folder()) is not None:
        yield cache / key
        return
    with tempfile.TemporaryDirectory(prefix="xattn-tokens-") as folder:  # files that are mapped outlive their names
        yield Path(folder)


def stored_text(key: str, make: Callable[[], str]) -> str:
    """Return a text that takes long to make, from the cache if it is there and whole."""
    cache = tokens_folder()
    if cache is None:
        return make()
    file = cache / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(file.read_text("utf-8"))
        if hashlib.sha256(kept["text"].encode()).hexdigest() == kept["sha256"]:
            return str(kept["text"])
    with _held(cache / f"{key}.lock", lambda text: None, lambda: False):
        text = make()
        write_atomically(file, json.dumps({"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}))
    return text


def _record(file: Path) -> dict[str, Any] | None:
    """Return a shard's record; None if there is none. Raises ValueError if it is damaged."""
    try:
        recorded = json.loads(file.with_suffix(".json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    if not isinstance(recorded, dict) or recorded.keys() != {"ids", "sha256", "sizes", "gives_back"}:
        raise ValueError(f"{file}: not a shard's record")
    return recorded


def _whole(folder: Path, number: int, dtype: np.dtype) -> str:
    file = folder / f"{number:05d}.bin"
    try:
        if (recorded := _record(file)) is None:
            return "missing"
        digest, count = _digest(file), file.stat().st_size // dtype.itemsize
        sizes = None if recorded["sizes"] is None else _digest(file.with_suffix(".sizes"))
    except (ValueError, FileNotFoundError):
        return "damaged"
    same = recorded | {"ids": count, "sha256": digest, "sizes": sizes} == recorded
    return "whole" if same else "damaged"


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write(folder: Path, number: int, content: Content) -> None:
    file = folder / f"{number:05d}.bin"
    file.with_suffix(".json").unlink(missing_ok=True)
    counts, sizes, gives_back = list[int](), list[np.ndarray | None](), True

    def ids() -> Iterator[np.ndarray]:
        nonlocal gives_back
        for block in content.encode(number):
            counts.append(len(block.ids))
            sizes.append(block.sizes)
            gives_back &= block.gives_back
            yield block.ids.astype(content.dtype)

    digest, digest_of_sizes = _write_arrays(file, ids()), None
    if any(size is not None for size in sizes):
        parts = np.split(_mapped(file, content.dtype), np.cumsum(counts)[:-1])
        filled = (content.sizes_of(part) if size is None else size for part, size in zip(parts, sizes, strict=True))
        digest_of_sizes = _write_arrays(file.with_suffix(".sizes"), (size.astype(_SIZES) for size in filled))
    record = {"ids": sum(counts), "sha256": digest, "sizes": digest_of_sizes, "gives_back": gives_back}
    write_atomically(file.with_suffix(".json"), json.dumps(record))
    fsync(folder)


def _write_arrays(file: Path, arrays: Iterator[np.ndarray]) -> str:
    """Write the arrays and return their digest. The file appears once all of it is on disk."""
    temporary, digest = file.with_suffix(".tmp"), hashlib.sha256()
    with temporary.open("wb") as opened:
        for array in arrays:
            content = array.tobytes()
            opened.write(content)
            digest.update(content)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.rename(file)
    return digest.hexdigest()


def _mapped(file: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)


@contextlib.contextmanager
def _held(lock: Path, say: Callable[[str], None], stop: Callable[[], bool]) -> Iterator[None]:
    """Hold the kernel's lock on this file. It is released when the process ends, however it ends."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    is_warned = False
    try:
        while True:
            try:
                flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, lock)
                break
            except BlockingIOError:
                if stop():
                    raise Preempted("stopped while another process tokenised the corpus") from None
                if not is_warned:
                    say("another process is tokenising this corpus; waiting for it")
                is_warned = True
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _bar(shards: int) -> Iterator[Callable[[], None]]:
    console = Screen(stderr=True)
    columns = (
        TextColumn("tokenising"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=shards < 2 or not console.has_bars) as bar:
        task = bar.add_task("", total=shards)
        yield lambda: bar.advance(task)
