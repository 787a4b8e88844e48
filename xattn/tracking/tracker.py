"""Where rows of metrics go. The loop knows :class:`Tracker` and nothing behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from xattn.run_folder import to_json, write_atomically

Row = Mapping[str, Any]


class Tracker(Protocol):
    """Takes each row of metrics once, in the order of its ``step``."""

    def log(self, row: Row) -> None: ...


class MetricsFile:
    """metrics.jsonl: a JSON object a line, each handed to the operating system before :meth:`log` returns.

    after: the step that the run goes on from; rows beyond it, and a last line that was cut short, are dropped, so that
    every step stands there exactly once.
    """

    def __init__(self, path: Path, *, after: int):
        self._path = path
        self._file = self._reopened(after)

    def log(self, row: Row) -> None:
        self._file.write(to_json(row) + "\n")
        self._file.flush()

    def rewind(self, after: int) -> None:
        """Drops the rows beyond that step."""
        self._file.close()
        self._file = self._reopened(after)

    def close(self) -> None:
        self._file.close()

    def _reopened(self, after: int) -> TextIO:
        if self._path.exists():
            kept = [
                line for line in self._path.read_text("utf-8").split("\n")[:-1] if json.loads(line)["step"] <= after
            ]
            write_atomically(self._path, "".join(f"{line}\n" for line in kept))
        return self._path.open("a", encoding="utf-8")
