"""Measurements of a run's model after its training: the rows of its evaluations.jsonl.

Importing this module imports no jax.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import xattn.config
from xattn.errors import IntegrityError, writing
from xattn.keys import renamed
from xattn.runs import run_folder
from xattn.runs.loaded_run import MAY_DIFFER, LoadedRun, load, read

Row = Mapping[str, Any]


def evaluate_once(
    run: Path,
    overrides: Sequence[str],
    *,
    checkpoint: Literal["last", "best"] = "last",
    step: int | None = None,
    config_dir: Path | None = None,
) -> tuple[Row, bool]:
    """Return the row of evaluations.jsonl for these overrides, and whether it was there already.

    A missing row is measured and appended. Processes that want the same row take turns, and the first one measures it.
    Data that the overrides name may have changed, so there the row is always measured, and appended if it differs.

    step: step of the parameters; None takes the checkpoint's. config_dir: see :meth:`LoadedRun.evaluate`.

    Raises :class:`IntegrityError` if the run has no intact checkpoint of that step, and whatever :func:`xattn.load` and
    :meth:`LoadedRun.evaluate` raise.
    """
    run, overrides = run.absolute(), xattn.config.arguments_under_new_names(overrides)
    summary = check(run, overrides, config_dir)
    known = summary.get("step") if checkpoint == "last" and summary.get("status") == "done" else None
    may_change = any(override.lstrip("+~").startswith("data") for override in overrides)
    with _held(run / run_folder.EVALUATIONS) as file:
        rows = _rows(file)
        there = None if may_change else equal_row(rows, known, overrides)
        if there is not None:
            return there, True
        opened = load(run, checkpoint=checkpoint)
        if step not in (None, opened.step):
            raise IntegrityError(f"{run}: has no intact checkpoint of step {step}")
        there = None if may_change else equal_row(rows, opened.step, overrides)
        if there is not None:
            return there, True
        row = measured(opened, overrides, config_dir)
        if row not in rows:
            _append(file, row)
        return row, False


def stored_rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of the run's evaluations.jsonl, skipping lines that are cut short or not JSON objects."""
    try:
        with (run / run_folder.EVALUATIONS).open(encoding="utf-8", errors="replace") as file:
            return _rows(file)
    except FileNotFoundError:
        return []


def equal_row(rows: Sequence[dict[str, Any]], step: int | None, overrides: Sequence[str]) -> dict[str, Any] | None:
    """Return the last row of that step and these overrides, in any order. None if there is none with results."""
    wanted = _by_key(overrides)
    for row in reversed(rows):
        typed = row.get("overrides")
        if row.get("step") == step and isinstance(typed, list) and _by_key(typed) == wanted:
            return row if isinstance(row.get("results"), dict) else None
    return None


def in_a_line(results: Mapping[str, float | None]) -> str:
    """Return names and values in one line. Attention statistics, several per head, are only counted."""
    parts = [f"{name} {shown_value(value)}" for name, value in results.items() if not name.startswith("attention/")]
    statistics = len(results) - len(parts)
    return "  ".join([*parts, *([f"and {statistics} statistics of attention/…"] if statistics else [])])


def shown_value(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def measured(opened: LoadedRun, overrides: Sequence[str], config_dir: Path | None) -> Row:
    results = opened.evaluate(overrides, config_dir=config_dir)
    return {"step": opened.step, "overrides": list(overrides), "results": results}


def check(run: Path, overrides: Sequence[str], config_dir: Path | None) -> dict[str, Any]:
    """Return the run's summary. Raises :class:`BadInput` for overrides that do not fit it, before loading anything."""
    config, summary = read(run.absolute())
    xattn.config.amend(config, overrides, may_differ=MAY_DIFFER, config_dir=config_dir)
    return summary


def _by_key(overrides: Sequence[Any]) -> dict[str, str]:
    return dict(renamed(str(override)).partition("=")[::2] for override in overrides)


def _rows(file: TextIO) -> list[dict[str, Any]]:
    file.seek(0)
    rows = []
    for line in file:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


@contextlib.contextmanager
def _held(path: Path) -> Iterator[TextIO]:
    """Hold the file open for reading and appending, locked against other processes; remove it if it ends up empty."""
    with _opened(path) as file:
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)


def _opened(path: Path) -> TextIO:
    with writing(path):
        while True:
            file = path.open("a+", encoding="utf-8", errors="replace")
            run_folder.flock(file.fileno(), fcntl.LOCK_EX, path)
            if run_folder.is_at(file.fileno(), path):
                return file
            file.close()  # another process removed it between the open and the lock


def _append(file: TextIO, row: Row) -> None:
    """Append a row in one write, on a line of its own even if the previous line was cut short."""
    with writing(Path(file.name)):
        file.seek(0)
        text = file.read()
        file.write(("" if not text or text.endswith("\n") else "\n") + run_folder.to_json(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
