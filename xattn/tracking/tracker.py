"""Where rows of metrics go. The loop knows :class:`Tracker` and nothing behind it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from xattn.run_folder import to_json

Row = Mapping[str, Any]


class Tracker(Protocol):
    """Takes each row of metrics once, in the order of its ``step``."""

    def log(self, row: Row) -> None: ...


class MetricsFile:
    """metrics.jsonl: a JSON object a line, each there for good when :meth:`log` returns to the operating system."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: Row) -> None:
        self._file.write(to_json(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
