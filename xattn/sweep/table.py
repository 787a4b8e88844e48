"""Run folders as a table on the screen. Reads summaries and configs; imports no jax."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

import xattn.config
from xattn import run_folder
from xattn.config import Config
from xattn.errors import BadInput
from xattn.keys import short
from xattn.tracking.display import Screen


def print_table(
    folders: Sequence[Path],
    keys: Sequence[str],
    asked: Mapping[Path, Config] | None = None,
    answers: Mapping[Path, tuple[Path, dict[str, Any]]] | None = None,
) -> None:
    """One line a run, the best val_loss first: the values of ``keys``, status, losses, speed, folder.

    asked: the configs of runs that may not have begun. answers: for those that another run answers for, that run's
    folder and what its summary is for them.
    """
    shown = {folder: (folder, _summary(folder)) for folder in folders} | dict(answers or {})
    table = Table(box=None, pad_edge=False, header_style="bold")
    numbers = ("val_loss", "val_bpb", "step", "tokens/s")
    for column in (*map(short, keys), "status"):
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("run", no_wrap=True)
    for folder in sorted(folders, key=lambda folder: _rank(*shown[folder])):
        run, summary = shown[folder]
        config = asked[folder] if asked is not None else read_config(folder)
        values = {} if config is None else xattn.config.hashed_values(config)
        speed = summary.get("tokens_per_second")
        table.add_row(
            *(_text(values.get(key)) for key in keys),
            _status(run, summary, config),
            _text(summary.get("val_loss"), ".4f"),
            _text(summary.get("val_bpb"), ".4f"),
            _text(summary.get("step")),
            _text(speed, ",.0f"),
            run.name,
        )
    Screen().print_table(table)


def _status(folder: Path, summary: dict[str, Any], config: Config | None) -> str:
    """As in the summary, but a run that was killed cannot say so itself: nobody holds its folder any more."""
    if config is None and (folder / run_folder.CONFIG).is_file():
        own = (run_folder.read_provenance(folder) or {}).get("registered")
        return f"made with {', '.join(own)}" if own else "config of another version"
    status: str = summary.get("status", "not begun")
    return "killed" if status == "running" and not run_folder.is_held(folder) else status


def _summary(folder: Path) -> dict[str, Any]:
    try:
        return run_folder.read_summary(folder) or {}
    except BadInput:
        return {"status": "summary not readable"}


def _rank(folder: Path, summary: dict[str, Any]) -> tuple[float, str]:
    loss = summary.get("val_loss")
    return (math.inf if loss is None else loss, folder.name)


def read_config(folder: Path) -> Config | None:
    """The config of the run there, None where there is none or this version cannot read it."""
    try:
        return xattn.config.load(folder / run_folder.CONFIG)
    except BadInput:
        return None


def _text(value: Any, form: str = "") -> str:
    return "–" if value is None else format(value, form)
