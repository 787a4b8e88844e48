"""Runs side by side, as ``xattn compare`` shows them."""

from __future__ import annotations

from collections.abc import Sequence

from xattn.keys import has_effect
from xattn.metrics import loss_metric
from xattn.report.design import show
from xattn.report.metric import Metric, unit_of
from xattn.report.read import Run
from xattn.report.words import number

_ROWS = {
    "val_loss": ".4f",
    "val_bpb": ".4f",
    "best_val_loss": ".4f",
    "train_loss": ".4f",
    "step": ",.0f",
    "tokens_per_second": ",.0f",
    "compile_seconds": ".1f",
    "wall_seconds": ",.1f",
    "peak_memory_bytes": ",.0f",
    "num_params": ",.0f",
    "flops_per_step": ",.0f",
}


def comparison(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): a column a run; the keys that differ and say what was computed, then what was measured, the
    probes too. The difference to the first run is of val_loss, or of val_bpb where the runs' tokens differ, and only
    where both are of the same text and windows."""
    keys = dict.fromkeys(key for run in runs for key in run.config if has_effect(key))
    rows = []
    for key in keys:
        values = [run.config.get(key) for run in runs]
        if any(value != values[0] for value in values):
            rows.append([key, *map(show, values)])
    rows.append(["status", *(run.status for run in runs)])
    metric = Metric(loss_metric(run.config for run in runs))
    probes = dict.fromkeys(key for run in runs for key in run.summary if key.startswith("probe/"))
    for key, form in (_ROWS | dict.fromkeys(probes, ".4g")).items():
        rows.append([key, *(number(run.number(key), form) for run in runs)])
        if key == metric.name and len(runs) > 1:
            rows.append(["  − the first's", *_to_the_first(runs, metric)])
    return ["", *(run.name for run in runs)], rows


def _to_the_first(runs: Sequence[Run], metric: Metric) -> list[str]:
    """The differences to the first run's loss, where both are of the same thing."""
    differences: list[float | None] = []
    first = runs[0].number(metric.name)
    for run in runs[1:]:
        loss = run.number(metric.name)
        same = metric.why_not(unit_of(runs[0]), unit_of(run)) is None
        differences.append(loss - first if same and loss is not None and first is not None else None)
    return ["", *(number(difference, "+.4f") for difference in differences)]
