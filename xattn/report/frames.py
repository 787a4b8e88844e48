"""A study and a run's metrics as pandas frames, for notebooks and for questions that the report does not ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from xattn.errors import BadInput
from xattn.report.answer import Question
from xattn.report.judge import judge
from xattn.report.read import finite, read_metrics, read_study
from xattn.report.tables import effects_table, results_table
from xattn.runs import run_folder
from xattn.system.screen import counted

_LEADING = ("step", "train_loss", "val_loss", "val_bpb")  # metric columns that come first, if present


@dataclass(frozen=True, repr=False)
class LoadedStudy:
    """A study's runs, as tidy frames."""

    path: Path
    runs: pd.DataFrame
    """one row per run, with the columns of the report's results.csv: name and status, the hashed keys that differ
    between runs, the numbers of summary.json, and the provenance"""
    metrics: pd.DataFrame
    """one row per run and step of metrics.jsonl: ``run``, ``step``, and each number that some row has, or NaN"""
    effects: pd.DataFrame
    """one row per comparison of two arms, with the columns and numbers of the report's effects.csv"""

    def __repr__(self) -> str:
        states = Counter(self.runs["status"])
        ended = ", ".join(f"{count} {status}" for status, count in states.items())
        return "\n".join(
            [
                f"LoadedStudy {run_folder.shown(self.path)}: {counted(len(self.runs), 'run')} ({ended})",
                *(
                    f"  .{name:8}{len(frame)} rows × {len(frame.columns)} columns"
                    for name, frame in (("runs", self.runs), ("metrics", self.metrics), ("effects", self.effects))
                ),
            ]
        )


def load_study(path: str | Path) -> LoadedStudy:
    """Read the runs of ``outputs/<study>`` and judge them as ``xattn report`` does by default. Imports no jax.

    Raises :class:`BadInput` if there is no such folder, or no run in it.
    """
    folder = Path(path).absolute()
    if (folder / run_folder.CONFIG).is_file():
        raise BadInput(f"{path}: is a run; xattn.load opens it, and its study is {run_folder.shown(folder.parent)}")
    study = read_study(folder)
    comparisons = judge(study, Question()).comparisons
    rows = [{**row, "run": run.name} for run in study.runs for row in read_metrics(run.folder, [])]
    return LoadedStudy(
        path=folder,
        runs=_frame(*results_table(study.runs, comparisons)),
        metrics=_metrics(rows, ("run", *_LEADING)),
        effects=_frame(*effects_table(comparisons)),
    )


def metrics_of(run: Path) -> pd.DataFrame:
    """Return the run's metrics.jsonl: a row per step, a column per number that some row has; NaN if a row lacks it."""
    return _metrics(read_metrics(run, []), _LEADING)


def _metrics(rows: Sequence[Mapping[str, Any]], leading: Collection[str]) -> pd.DataFrame:
    found = dict.fromkeys(key for row in rows for key in row)
    as_they_are = ("run", "step")  # every row has these
    columns = [key for key in leading if key in found or key in as_they_are]
    columns += [key for key in found if key not in leading]
    return pd.DataFrame(
        {key: [row[key] if key in as_they_are else finite(row.get(key)) for row in rows] for key in columns},
    ).astype({key: float for key in columns if key not in as_they_are})


def _frame(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> pd.DataFrame:
    """Return a table of the report. Empty cells in a column of numbers, and all cells of an empty column, are NaN."""
    frame = pd.DataFrame(list(rows), columns=list(columns))
    empty = [key for key in frame.columns if frame[key].isna().all()]
    return frame.astype(dict.fromkeys(empty, float))
