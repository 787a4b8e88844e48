"""The destinations of metric rows. The loop knows only :class:`Tracker`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

from xattn.runs.run_folder import fsync, shown, to_json, write_atomically

Row = Mapping[str, Any]


class Tracker(Protocol):
    """Takes each row of metrics once, in the order of its ``step``."""

    def log(self, row: Row) -> None: ...


@dataclass(frozen=True)
class Rows:
    """The intact rows of a metrics.jsonl."""

    lines: Mapping[int, str]
    """Step → its line, ordered by step; if a step has several rows, the last one."""
    damaged: tuple[int, ...] = ()
    """Numbers, from 1, of the lines that are not rows or repeat a step."""
    in_order: bool = True
    """Whether the steps of the rows ascend."""


def read_rows(path: Path) -> Rows:
    """Return the rows of a metrics.jsonl, even after a crash or a power cut; none if the file is missing.

    A last line without a line end is still being written or was cut short: it is neither a row nor damage.
    """
    found: dict[int, tuple[int, str]] = {}
    damaged = []
    content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        step = _step_of(line)
        if step is None:
            damaged.append(number)
            continue
        if step in found:
            damaged.append(found[step][0])
        found[step] = number, line.decode("utf-8")
    steps = sorted(found)
    numbers = [found[step][0] for step in steps]
    return Rows({step: found[step][1] for step in steps}, tuple(sorted(damaged)), numbers == sorted(numbers))


def _step_of(line: bytes) -> int | None:
    """Return the row's step, or None if it is no row: a JSON object of numbers and nulls, with a whole ``step``."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return None
    return row["step"] if all(value is None or type(value) in (int, float) for value in row.values()) else None


class MetricsFile:
    """metrics.jsonl: one JSON object per line, handed to the operating system before :meth:`log` returns.

    after: the step that the run continues from. Rows beyond it, damaged lines and a truncated last line are dropped, so
    every step is there exactly once and in order. say: called with a message about damage; a copy of the file is kept.
    """

    def __init__(self, path: Path, *, after: int, say: Callable[[str], None] = lambda text: None):
        self._path, self._say = path, say
        self._file = self._reopened(after)

    def log(self, row: Row) -> None:
        self._file.write(to_json(row) + "\n")
        self._file.flush()

    def rewind(self, after: int) -> None:
        """Drop the rows beyond this step."""
        self._file.close()
        self._file = self._reopened(after)

    def close(self) -> None:
        self._file.close()

    def _reopened(self, after: int) -> TextIO:
        rows = read_rows(self._path)
        if rows.damaged or not rows.in_order:
            kept = self._path.with_name(f"{self._path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
            shutil.copyfile(self._path, kept)
            what = f"damaged or repeated lines: {brief(rows.damaged)}" if rows.damaged else "rows out of order"
            self._say(f"warning: {shown(self._path)}: {what}; repaired, with the original in {kept.name}")
        if self._path.exists():
            write_atomically(self._path, "".join(f"{line}\n" for step, line in rows.lines.items() if step <= after))
        return self._path.open("a", encoding="utf-8")


def sync_rows(path: Path) -> None:
    """Flush the rows of a metrics.jsonl to disk, and the file's name too."""
    fsync(path)
    fsync(path.parent)


def brief(numbers: Sequence[int]) -> str:
    """Format the numbers for a sentence; of many, only the first few."""
    more = f" and {len(numbers) - 5} more" if len(numbers) > 6 else ""
    return ", ".join(map(str, numbers[:5] if more else numbers)) + more
