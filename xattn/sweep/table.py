"""Print run folders as a table. This module reads summaries and configs; it imports no jax."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

import xattn.config
from xattn.config import Config
from xattn.errors import BadInput
from xattn.metrics import loss_metric
from xattn.report.read import finite
from xattn.runs import run_folder
from xattn.runs.provenance import other_library
from xattn.runs.run_folder import shown
from xattn.sweep.labels import arm, baseline_of, short_names
from xattn.system.screen import counted
from xattn.tracking.display import Screen

_HASHED = re.compile("[^*?[]*-[0-9a-f]{10}")


@dataclass(frozen=True)
class Row:
    """A run as the table shows it."""

    run: Path
    """The folder that has its result."""
    values: Mapping[str, Any]
    status: str
    summary: Mapping[str, Any]
    other_library: str | None = None
    """A sentence saying that its corpus was another Python's library, if it was."""


@dataclass(frozen=True)
class _Column:
    name: str
    cells: tuple[str, ...]
    is_number: bool = False


def print_table(
    folders: Sequence[Path],
    keys: Sequence[str],
    asked: Mapping[Path, Config] | None = None,
    answers: Mapping[Path, tuple[Path, dict[str, Any]]] | None = None,
) -> None:
    """Print one line for each row of :func:`rows_of`: the values of ``keys``, status, losses, speed, folder.

    Of the two losses, the one by which all runs can be compared comes first. On a terminal that is too narrow, print
    the first of :func:`_forms` that fits.
    """
    metric, rows = rows_of(folders, keys, asked, answers)
    losses = sorted(("val_loss", "val_bpb"), key=lambda loss: loss != metric)
    columns = [_Column(name, tuple(_text(row.values[key]) for row in rows)) for key, name in short_names(keys).items()]
    columns.append(_Column("status", tuple(row.status for row in rows)))
    for name, form in (*((loss, ".4f") for loss in losses), ("step", ""), ("tokens_per_second", ",.0f")):
        cells = tuple(_text(row.summary.get(name), form) for row in rows)
        columns.append(_Column(name.replace("_per_second", "/s"), cells, is_number=True))
    columns.append(_Column("run", tuple(row.run.name for row in rows)))
    screen = Screen()
    forms = [(_as_table(form), notes) for form, notes in _forms(columns, rows, keys, losses[1])]
    table, notes = next((form for form in forms if screen.fits(form[0])), forms[-1])
    screen.print_table(table, folds=not screen.fits(table))
    for note in notes:
        screen.say(note)
    for sentence, count in Counter(row.other_library for row in rows if row.other_library is not None).items():
        screen.say(f"{counted(count, 'run')}: {sentence}")


def _forms(
    columns: Sequence[_Column], rows: Sequence[Row], keys: Sequence[str], second_loss: str
) -> Iterator[tuple[list[_Column], list[str]]]:
    """Yield ever narrower forms of the table, each with the notes to print below it.

    What is redundant goes first: a folder's name except its hash, then columns with a single value (which moves into a
    note), then the values of a baseline. What is shown nowhere else goes last: speed and the second loss.
    """
    now = {column.name: column for column in columns}
    yield [*now.values()], []
    notes = []
    if all(_HASHED.fullmatch(row.run.name) for row in rows):
        now["run"] = _Column("run", tuple(f"*{row.run.name[-10:]}" for row in rows))
        notes = [f"a run's folder is {shown(rows[0].run.absolute().parent)}/{now['run'].cells[0]}"]
        yield [*now.values()], notes
    if alike := [name for name in ("status", "step") if len({*now[name].cells}) == 1 < len(rows)]:
        notes = [f"all runs: {', '.join(f'{name} {now.pop(name).cells[0]}' for name in alike)}", *notes]
        yield [*now.values()], notes
    names = short_names(keys)
    if (baseline := baseline_of([row.values for row in rows], keys)) is not None:
        arms = tuple(arm(row.values, names, baseline) for row in rows)
        now = {"arm": _Column("arm", arms)} | {name: c for name, c in now.items() if name not in names.values()}
        yield [*now.values()], notes
    left_out: list[str] = []
    for name in ("tokens/s", second_loss):
        now.pop(name)
        left_out.append(name)
        yield [*now.values()], [*notes, f"`xattn runs --json` or a wider terminal also shows {' and '.join(left_out)}"]


def _as_table(columns: Sequence[_Column]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.name, justify="right" if column.is_number else "left", overflow="fold")
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, cells))
    return table


def rows_of(
    folders: Sequence[Path],
    keys: Sequence[str],
    asked: Mapping[Path, Config] | None = None,
    answers: Mapping[Path, tuple[Path, dict[str, Any]]] | None = None,
) -> tuple[str, list[Row]]:
    """Return the loss by which all runs can be compared (:func:`loss_of`), and a row for each run.

    The best run comes first; runs with no loss, or equal losses, keep the order given. ``asked`` has configs, also of
    runs that have not begun. ``answers`` has the folder and summary of the run that answers for another.
    """
    shown = {folder: (folder, _summary(folder)) for folder in folders} | dict(answers or {})
    configs = {folder: asked[folder] if asked is not None else read_config(folder) for folder in folders}
    metric = loss_of([config for config in configs.values() if config is not None])
    rows = []
    for folder in sorted(folders, key=lambda folder: _rank(shown[folder][1], metric)):
        (run, summary), config = shown[folder], configs[folder]
        values = {} if config is None else xattn.config.hashed_values(config)
        recorded = run_folder.read_or_empty(run / run_folder.PROVENANCE)
        other = None if config is None else other_library(config.data.name, recorded)
        rows.append(Row(run, {key: values.get(key) for key in keys}, _status(run, summary, config), summary, other))
    return metric, rows


def _status(folder: Path, summary: dict[str, Any], config: Config | None) -> str:
    """Return the status to show. A killed run's summary still has "running", but no process holds its folder."""
    if config is None and (folder / run_folder.CONFIG).is_file():
        own = run_folder.read_or_empty(folder / run_folder.PROVENANCE).get("registered")
        return f"made with {', '.join(own)}" if isinstance(own, dict) and own else "config of another version"
    status = str(summary.get("status", "not begun"))
    return "killed" if status == "running" and not run_folder.is_held(folder) else status


def _summary(folder: Path) -> dict[str, Any]:
    try:
        return run_folder.read_summary(folder) or {}
    except BadInput:
        return {"status": "summary not readable"}


def _rank(summary: dict[str, Any], metric: str) -> float:
    loss = finite(summary.get(metric))
    return math.inf if loss is None else loss


def loss_of(configs: Sequence[Config]) -> str:
    """Return the key of summary.json by which runs of these configs are compared."""
    return loss_metric(map(xattn.config.hashed_values, configs))


def read_config(folder: Path) -> Config | None:
    """Return the config of the run in the folder; None if it is missing or this version cannot read it."""
    try:
        return xattn.config.load(folder / run_folder.CONFIG)
    except BadInput:
        return None


def _text(value: Any, form: str = "") -> str:
    if value is None:
        return "–"
    return format(value, form) if isinstance(value, int | float) else str(value)
