"""Finds the files that a path means: a file, a folder's files, or what a glob matches, each once; and their digests."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from xattn.data.formats import unreadable
from xattn.errors import BadInput

_SMALL = 2**18  # hashing a smaller file takes less time than handing it to a thread
# The origin of a text that experiments use.
_COMES_FROM = {
    "tinyshakespeare.txt": "\nit is https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
    "input.txt, 1,115,394 bytes, sha256 86c4e6aa9db7…"
}
_ANY_DEPTH = re.compile(r"(?:^|(?<=/))\*\*(?:/|$)")


class Found(NamedTuple):
    """The files that a path means, sorted, each once, and for the user a list of what was left out."""

    files: Sequence[str]
    is_folder: bool = False
    left_out: Sequence[str] = ()


def find(path: str, subject: str) -> Found:
    """Return the files that a path means. Raises :class:`BadInput` if there are none. A link counts as the file it
    leads to; a file with several names is read under the first."""
    where = os.path.expanduser(path)
    left_out: list[str] = []
    is_folder = os.path.isdir(where)
    if is_folder:
        found = _below(where, left_out)
    elif os.path.isfile(where):
        found = [where]  # even if its name looks like a glob
    else:
        found = list(_matching(where))
    files, seen, again = list[str](), set[tuple[int, int]](), 0
    for file in sorted(set(found), key=lambda name: name.split(os.sep)):
        try:
            state = os.stat(file)
        except OSError:  # a link to nothing
            continue
        if not stat.S_ISREG(state.st_mode):
            continue
        if (state.st_dev, state.st_ino) in seen:
            again += 1
            continue
        seen.add((state.st_dev, state.st_ino))
        files.append(file)
    if again:
        left_out.append(f"duplicate names of the same files: {again}")
    if not files:
        kind = "the folder has no files" if is_folder else "no such file or folder, and no file matches it"
        raise BadInput(f"{subject}: {kind}{_COMES_FROM.get(os.path.basename(where), '')}")
    return Found(files, is_folder, left_out)


def _below(root: str, left_out: list[str]) -> list[str]:
    """Return all files below a folder except hidden ones. Links to folders are not followed."""
    found, folders = list[str](), [str(Path(root))]
    closed, hidden, links = list[str](), list[str](), list[str]()
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except PermissionError:
            closed.append(folder)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                hidden.append(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_symlink() and not entry.is_file():
                links.append(entry.name)
            else:
                found.append(entry.path)
    for names, what in (
        (hidden, "hidden"),
        (links, "links to folders or broken links"),
        (closed, "unreadable folders"),
    ):
        if names:
            left_out.append(f"{what}: {len(names)} ({some(names)})")
    return found


def _matching(pattern: str) -> Iterator[str]:
    """Yield as ``glob.glob(pattern, recursive=True)``, but ``**`` visits each folder once, whatever links lead to
    it."""
    split = _ANY_DEPTH.split(pattern, maxsplit=1)
    if len(split) == 1:
        yield from glob.glob(pattern)
        return
    before, after = split
    for root in glob.glob(before) if before else [""]:
        for folder in _folders(root):
            yield from _matching(glob.escape(folder) + (after or "*"))


def _folders(root: str) -> Iterator[str]:
    """Yield a folder and those below it, each once and with a trailing slash. Links are followed after real folders."""
    seen, folders, links = set[tuple[int, int]](), deque([root]), deque[str]()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        try:
            state = os.stat(folder or ".")
            entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
        except OSError:  # not readable, a loop, or not a folder: nothing matches there, as in glob
            continue
        if (state.st_dev, state.st_ino) in seen:
            continue
        seen.add((state.st_dev, state.st_ino))
        yield folder
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                (links if entry.is_symlink() else folders).append(f"{folder}{entry.name}/")


def some(names: list[str]) -> str:
    """Return the first few names, sorted, for one line."""
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")


def sha256_of_files(files: Sequence[str], key: str) -> list[str]:
    """Return the digest of each file's bytes, hashing several large files at a time."""

    def digest(name: str) -> str:
        try:
            with open(name, "rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(error, key, name) from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        large = {name for name in files if os.path.isfile(name) and os.path.getsize(name) >= _SMALL}
        begun = {name: pool.submit(digest, name) for name in large}
        return [begun[name].result() if name in begun else digest(name) for name in files]
