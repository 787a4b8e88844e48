"""Run folders as a table on the screen. Reads summaries and configs; imports no jax."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

import xattn.config
from xattn import run_folder
from xattn.config import Config
from xattn.errors import BadInput
from xattn.keys import short
from xattn.metrics import loss_metric
from xattn.provenance import other_library
from xattn.report.read import finite
from xattn.report.words import counted
from xattn.tracking.display import Screen


@dataclass(frozen=True)
class Row:
    """A run as the table shows it: the folder that has its result, and the values of the keys that were asked for."""

    run: Path
    values: Mapping[str, Any]
    status: str
    summary: Mapping[str, Any]
    other_library: str | None = None
    """that its corpus was another Python's library, where it was"""


def print_table(
    folders: Sequence[Path],
    keys: Sequence[str],
    asked: Mapping[Path, Config] | None = None,
    answers: Mapping[Path, tuple[Path, dict[str, Any]]] | None = None,
) -> None:
    """One line a run, as :func:`rows_of` has them: the values of ``keys``, status, losses, speed, folder. The loss that
    all can be compared by is the first of the two."""
    metric, rows = rows_of(folders, keys, asked, answers)
    losses = sorted(("val_loss", "val_bpb"), key=lambda loss: loss != metric)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (*map(short, keys), "status"):
        table.add_column(column, no_wrap=True)
    for column in (*losses, "step", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("run", no_wrap=True)
    for row in rows:
        table.add_row(
            *map(_text, row.values.values()),
            row.status,
            *(_text(row.summary.get(loss), ".4f") for loss in losses),
            _text(row.summary.get("step")),
            _text(row.summary.get("tokens_per_second"), ",.0f"),
            row.run.name,
        )
    Screen().print_table(table)
    for told, count in Counter(row.other_library for row in rows if row.other_library is not None).items():
        print(f"{counted(count, 'run')}: {told}")


def rows_of(
    folders: Sequence[Path],
    keys: Sequence[str],
    asked: Mapping[Path, Config] | None = None,
    answers: Mapping[Path, tuple[Path, dict[str, Any]]] | None = None,
) -> tuple[str, list[Row]]:
    """The loss that all can be compared by (:func:`loss_of`), and a row for each run.

    The best comes first; runs that have no loss, or the same, stand in the order given. asked: the configs of runs that
    may not have begun. answers: for those that another run answers for, that run's folder and what its summary is for
    them.
    """
    shown = {folder: (folder, _summary(folder)) for folder in folders} | dict(answers or {})
    configs = {folder: asked[folder] if asked is not None else read_config(folder) for folder in folders}
    metric = loss_of([config for config in configs.values() if config is not None])
    rows = []
    for folder in sorted(folders, key=lambda folder: _rank(shown[folder][1], metric)):
        (run, summary), config = shown[folder], configs[folder]
        values = {} if config is None else xattn.config.hashed_values(config)
        other = None if config is None else other_library(config.data.name, _provenance(run))
        rows.append(Row(run, {key: values.get(key) for key in keys}, _status(run, summary, config), summary, other))
    return metric, rows


def _status(folder: Path, summary: dict[str, Any], config: Config | None) -> str:
    """As in the summary, but a run that was killed cannot say so itself: nobody holds its folder any more."""
    if config is None and (folder / run_folder.CONFIG).is_file():
        own = _provenance(folder).get("registered")
        return f"made with {', '.join(own)}" if isinstance(own, dict) and own else "config of another version"
    status = str(summary.get("status", "not begun"))
    return "killed" if status == "running" and not run_folder.is_held(folder) else status


def _summary(folder: Path) -> dict[str, Any]:
    try:
        return run_folder.read_summary(folder) or {}
    except BadInput:
        return {"status": "summary not readable"}


def _provenance(folder: Path) -> dict[str, Any]:
    try:
        return run_folder.read_provenance(folder) or {}
    except BadInput:
        return {}


def _rank(summary: dict[str, Any], metric: str) -> float:
    loss = finite(summary.get(metric))
    return math.inf if loss is None else loss


def loss_of(configs: Sequence[Config]) -> str:
    """The key of summary.json that the runs of these configs are compared by."""
    return loss_metric(map(xattn.config.hashed_values, configs))


def read_config(folder: Path) -> Config | None:
    """The config of the run there, None where there is none or this version cannot read it."""
    try:
        return xattn.config.load(folder / run_folder.CONFIG)
    except BadInput:
        return None


def _text(value: Any, form: str = "") -> str:
    if value is None:
        return "–"
    return format(value, form) if isinstance(value, int | float) else str(value)
