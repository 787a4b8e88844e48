"""What is measured of a run's model after its training: the rows of its evaluations.jsonl.

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
from xattn.errors import BadInput, IntegrityError, storage_error
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
    """The row of evaluations.jsonl for these overrides, measured and appended if it is not there; whether it was.

    Processes that ask for the same take turns, and the first measures. On data that the overrides name, which may have
    changed since, it is measured each time, and appended where it differs.

    step: of the parameters; None takes those of the checkpoint. config_dir: as of :meth:`LoadedRun.evaluate`.

    Raises :class:`IntegrityError` where no checkpoint of that step is whole, and what :func:`xattn.load` and
    :meth:`LoadedRun.evaluate` raise.
    """
    run = run.absolute()
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
            raise IntegrityError(f"{run}: has no whole checkpoint of step {step}")
        there = None if may_change else equal_row(rows, opened.step, overrides)
        if there is not None:
            return there, True
        row = measured(opened, overrides, config_dir)
        if row not in rows:
            _append(file, row)
        return row, False


def stored_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of the run's evaluations.jsonl; lines that are cut short or no JSON objects are passed over."""
    try:
        with (run / run_folder.EVALUATIONS).open(encoding="utf-8", errors="replace") as file:
            return _rows(file)
    except FileNotFoundError:
        return []


def equal_row(rows: Sequence[dict[str, Any]], step: int | None, overrides: Sequence[str]) -> dict[str, Any] | None:
    """The last row of that step and these overrides, in whichever order they stand."""
    wanted = _by_key(overrides)
    for row in reversed(rows):
        typed = row.get("overrides")
        if row.get("step") == step and isinstance(typed, list) and _by_key(typed) == wanted:
            return row if isinstance(row.get("results"), dict) else None
    return None


def in_a_line(results: Mapping[str, float | None]) -> str:
    """Names and values; of the attention statistics, a few for each head, only how many there are."""
    told = [f"{name} {shown_value(value)}" for name, value in results.items() if not name.startswith("attention/")]
    statistics = len(results) - len(told)
    return "  ".join([*told, *([f"and {statistics} statistics of attention/…"] if statistics else [])])


def shown_value(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def measured(opened: LoadedRun, overrides: Sequence[str], config_dir: Path | None) -> Row:
    results = opened.evaluate(overrides, config_dir=config_dir)
    return {"step": opened.step, "overrides": list(overrides), "results": results}


def check(run: Path, overrides: Sequence[str], config_dir: Path | None) -> dict[str, Any]:
    """The run's summary. Raises :class:`BadInput` for overrides that do not fit it, before anything is loaded."""
    config, summary = read(run.absolute())
    xattn.config.amend(config, overrides, may_differ=MAY_DIFFER, config_dir=config_dir)
    return summary


def _by_key(overrides: Sequence[Any]) -> dict[str, str]:
    return dict(str(override).partition("=")[::2] for override in overrides)


def _rows(file: TextIO) -> list[dict[str, Any]]:
    file.seek(0)
    rows = []
    for line in file:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


@contextlib.contextmanager
def _held(path: Path) -> Iterator[TextIO]:
    """The file, open to read and append, while no other process has it so. It is removed if nothing is in it then."""
    with _opened(path) as file:
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)


def _opened(path: Path) -> TextIO:
    try:
        while True:
            file = path.open("a+", encoding="utf-8", errors="replace")
            run_folder.flock(file.fileno(), fcntl.LOCK_EX, path)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            file.close()  # another process removed it between the open and the lock
    except OSError as error:
        raise storage_error(error, path) or BadInput(f"{path}: cannot be written: {error.strerror}") from error


def _append(file: TextIO, row: Row) -> None:
    """Adds a row in one write, on a line of its own even where an earlier one was cut short."""
    try:
        file.seek(0)
        text = file.read()
        file.write(("" if not text or text.endswith("\n") else "\n") + run_folder.to_json(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(error, Path(file.name)) or BadInput(
            f"{file.name}: cannot be written: {error.strerror}"
        ) from error
