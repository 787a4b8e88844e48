"""Runs side by side, as ``xattn compare`` shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xattn.keys import has_effect, show
from xattn.metrics import loss_metric
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
    """Return (columns, rows), a column per run: the differing keys that affect the computation, then what was measured.

    The difference to the first run is in val_loss, or in val_bpb if the runs' tokens differ. It needs the same text and
    sequences on both sides.
    """
    rows = [[key, *map(show, values)] for key, values in _differing(runs).items()]
    rows.append(["status", *(run.status for run in runs)])
    metric = _metric(runs)
    for key, form in _measured(runs).items():
        rows.append([key, *(number(run.number(key), form) for run in runs)])
        if key == metric.name and len(runs) > 1:
            differences = (number(difference, "+.4f") for difference in _to_the_first(runs, metric)[1:])
            rows.append(["  − the first's", "", *differences])
    return ["", *(run.name for run in runs)], rows


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the same for programs: an object per run, with its ``difference`` in ``metric`` to the first run."""
    metric, differing, measured = _metric(runs), _differing(runs), _measured(runs)
    return {
        "schema_version": 1,
        "metric": metric.name,
        "runs": [
            {
                "run": str(run.folder),
                "status": run.status,
                "values": {key: values[i] for key, values in differing.items()},
                "measured": {key: run.number(key) for key in measured},
                "difference": difference,
            }
            for i, (run, difference) in enumerate(zip(runs, _to_the_first(runs, metric), strict=True))
        ],
    }


def _differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the differing keys that affect the computation → the value of each run."""
    keys = dict.fromkeys(key for run in runs for key in run.config if has_effect(key))
    values = {key: [run.config.get(key) for run in runs] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _measured(runs: Sequence[Run]) -> dict[str, str]:
    """Return the numbers to show from the summaries → their formats."""
    return _ROWS | dict.fromkeys((key for run in runs for key in run.summary if key.startswith("probe/")), ".4g")


def _metric(runs: Sequence[Run]) -> Metric:
    return Metric(loss_metric(run.config for run in runs))


def _to_the_first(runs: Sequence[Run], metric: Metric) -> list[float | None]:
    """Return the differences to the first run's loss, where both measure the same thing; None for the first."""
    differences: list[float | None] = [None]
    first = runs[0].number(metric.name)
    for run in runs[1:]:
        loss = run.number(metric.name)
        same = metric.why_not(unit_of(runs[0]), unit_of(run)) is None
        differences.append(loss - first if same and loss is not None and first is not None else None)
    return differences
