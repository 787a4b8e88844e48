"""Runs side by side, as ``xattn compare`` shows them."""

from __future__ import annotations

from collections.abc import Sequence

from xattn.keys import has_effect
from xattn.report.design import show
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
    probes too. The first run is what val_loss's difference is taken to."""
    keys = dict.fromkeys(key for run in runs for key in run.config if has_effect(key))
    rows = []
    for key in keys:
        values = [run.config.get(key) for run in runs]
        if any(value != values[0] for value in values):
            rows.append([key, *map(show, values)])
    rows.append(["status", *(run.status for run in runs)])
    probes = dict.fromkeys(key for run in runs for key in run.summary if key.startswith("probe/"))
    for key, form in (_ROWS | dict.fromkeys(probes, ".4g")).items():
        rows.append([key, *(number(run.number(key), form) for run in runs)])
        if key == "val_loss" and len(runs) > 1:
            rows.append(["  − the first's", *_to_the_first(runs)])
    return ["", *(run.name for run in runs)], rows


def _to_the_first(runs: Sequence[Run]) -> list[str]:
    losses = [run.number("val_loss") for run in runs]
    first = losses[0]
    if first is None:
        return ["–" for _ in runs]
    return ["", *(number(None if loss is None else loss - first, "+.4f") for loss in losses[1:])]
