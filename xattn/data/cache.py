"""Token ids on disk, made once: content-addressed shards in the user's cache folder, mapped into memory.

A shard is raw little-endian ids, ``00007.bin``, and its number of ids and SHA-256 in ``00007.json``. Both are written
under temporary names, synced and renamed, the ids first: a shard whose .json is there is whole. A process that is
killed goes on at the next start with the shard that it was at; a shard that fails its digest is made again.
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
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from xattn.errors import Preempted
from xattn.run_folder import fsync, write_atomically
from xattn.tracking.display import Screen

Encode = Callable[[int], Iterator[np.ndarray]]  # the ids of a shard, piece after piece


class Tokens:
    """Arrays of ids laid end to end, as one: ``tokens[a:b]`` copies, ``len(tokens)``, and ``part(a, b)`` does not."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._arrays = [array for array in arrays if len(array)] or [np.zeros(0, np.uint8)]
        self._ends = np.cumsum([len(array) for array in self._arrays])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        first = int(np.searchsorted(self._ends, start, side="right"))
        found = []
        for array, end in zip(self._arrays[first:], self._ends[first:].tolist(), strict=True):
            begin = end - len(array)
            if begin >= stop:
                break
            found.append(array[max(start - begin, 0) : stop - begin])
        return np.concatenate(found) if found else self._arrays[0][:0]

    def part(self, start: int, stop: int) -> Tokens:
        ends = self._ends.tolist()
        begins = [end - len(array) for array, end in zip(self._arrays, ends, strict=True)]
        return Tokens(
            [array[max(start - b, 0) : max(stop - b, 0)] for array, b in zip(self._arrays, begins, strict=True)]
        )


def cache_folder() -> Path | None:
    """``xattn/tokens`` of the user's cache folder, or None where it can't be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "xattn" / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def stored_tokens(
    key: str, shards: int, encode: Encode, dtype: np.dtype, *, say: Callable[[str], None], stop: Callable[[], bool]
) -> Tokens:
    """The ids of all shards, from the cache where they are there and whole, else made by ``encode`` and kept there.

    key: names the content. Where there is no cache they live in a temporary folder, which goes with this process.
    A second process waits for the first one. Raises :class:`Preempted` where ``stop()``, asked between shards, says so.
    """
    if (cache := cache_folder()) is not None:
        return _tokens_in(cache / key, shards, encode, dtype, say, stop)
    with tempfile.TemporaryDirectory(prefix="xattn-tokens-") as folder:  # files that are mapped outlive their names
        return _tokens_in(Path(folder), shards, encode, dtype, say, stop)


def stored_text(key: str, make: Callable[[], str]) -> str:
    """A text that is long to make, from the cache where it is there and whole."""
    cache = cache_folder()
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


def _tokens_in(
    folder: Path, shards: int, encode: Encode, dtype: np.dtype, say: Callable[[str], None], stop: Callable[[], bool]
) -> Tokens:
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / ".lock", say, stop):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(lambda number: _whole(folder, number, dtype), range(shards)))
        damaged = [number for number, state in enumerate(found) if state == "damaged"]
        if damaged:
            say(f"warning: {len(damaged)} damaged shards of tokens in {folder} are made again")
        todo = [number for number, state in enumerate(found) if state != "whole"]
        with _bar(len(todo)) as advance:
            for number in todo:
                if stop():
                    raise Preempted("stopped while the corpus was tokenised; the same command goes on from there")
                _write(folder, number, encode(number), dtype)
                advance()
        return Tokens([_mapped(folder / f"{number:05d}.bin", dtype) for number in range(shards)])


def _whole(folder: Path, number: int, dtype: np.dtype) -> str:
    file = folder / f"{number:05d}.bin"
    try:
        recorded = json.loads(file.with_suffix(".json").read_text("utf-8"))
    except FileNotFoundError:
        return "missing"
    except ValueError:
        return "damaged"
    try:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        return "damaged"
    same = recorded == {"ids": file.stat().st_size // dtype.itemsize, "sha256": digest}
    return "whole" if same else "damaged"


def _write(folder: Path, number: int, blocks: Iterator[np.ndarray], dtype: np.dtype) -> None:
    file = folder / f"{number:05d}.bin"
    temporary, digest, count = file.with_suffix(".tmp"), hashlib.sha256(), 0
    file.with_suffix(".json").unlink(missing_ok=True)
    with temporary.open("wb") as opened:
        for block in blocks:
            content = block.astype(dtype).tobytes()
            opened.write(content)
            digest.update(content)
            count += len(block)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.rename(file)
    write_atomically(file.with_suffix(".json"), json.dumps({"ids": count, "sha256": digest.hexdigest()}))
    fsync(folder)


def _mapped(file: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)


@contextlib.contextmanager
def _held(lock: Path, say: Callable[[str], None], stop: Callable[[], bool]) -> Iterator[None]:
    """The kernel's lock on that file: it goes with the process that holds it, however that ends."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    told = False
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop():
                    raise Preempted("stopped while another process tokenised the corpus") from None
                if not told:
                    say("another process is tokenising this corpus; waiting for it")
                told = True
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
