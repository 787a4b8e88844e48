"""``xattn compare RUN RUN…``: a quick look at runs side by side, on the screen."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from xattn.errors import ExitCode
from xattn.report.design import show
from xattn.report.read import Run, read_run
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
_PASSED_OVER = ("tracking.", "study", "resume")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="xattn compare", description="Set runs side by side.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    runs = [read_run(folder) for folder in parser.parse_args(argv).runs]
    Console(highlight=False).print(comparison(runs))
    return ExitCode.DONE


def comparison(runs: Sequence[Run]) -> Table:
    """A column a run: the keys that differ, then what was measured, the probes too. The first run is what val_loss's
    difference is taken to."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold")
    keys = dict.fromkeys(key for run in runs for key in run.config if not key.startswith(_PASSED_OVER))
    for key in keys:
        values = [run.config.get(key) for run in runs]
        if any(value != values[0] for value in values):
            table.add_row(key, *map(show, values), style="cyan")
    table.add_row("status", *(run.status for run in runs))
    probes = dict.fromkeys(key for run in runs for key in run.summary if key.startswith("probe/"))
    for key, form in (_ROWS | dict.fromkeys(probes, ".4g")).items():
        table.add_row(key, *(number(run.number(key), form) for run in runs))
        if key == "val_loss" and len(runs) > 1:
            table.add_row("  − the first's", *_to_the_first(runs))
    return table


def _to_the_first(runs: Sequence[Run]) -> list[str]:
    losses = [run.number("val_loss") for run in runs]
    first = losses[0]
    if first is None:
        return ["–" for _ in runs]
    return ["", *(number(None if loss is None else loss - first, "+.4f") for loss in losses[1:])]
