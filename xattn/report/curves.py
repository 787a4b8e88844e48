"""A cell's learning curve over its seeds, against steps, tokens and seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np

from xattn.report.design import Cell
from xattn.report.read import Run
from xattn.report.selection import Chosen

AXES = {"steps": "steps", "tokens": "training tokens", "seconds": "seconds of training"}
POINTS = 300  # at most


@dataclass(frozen=True)
class Curve:
    """Mean, least and greatest over the seeds, at the steps that all of them have. x: axis → where they are on it."""

    key: str
    x: Mapping[str, np.ndarray]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def loss_curves(chosen: Mapping[Cell, Chosen]) -> dict[Cell, Curve]:
    """Of one loss, so that they can be set side by side: val_loss, or train_loss where more cells have that."""
    return max((curves_of(chosen, key) for key in ("val_loss", "train_loss")), key=len)


def curves_of(chosen: Mapping[Cell, Chosen], key: str) -> dict[Cell, Curve]:
    """Of the cells that have one."""
    return {cell: curve for cell, each in chosen.items() if (curve := curve_of(each, key)) is not None}


def curve_of(chosen: Chosen, key: str) -> Curve | None:
    """None where less than two values were logged.

    Of the runs that are done; where none is, of those that diverged, up to there.
    """
    done = [run for run in chosen.runs.values() if run.status == "done"]
    runs = done or [run for run in chosen.runs.values() if run.status == "diverged"]
    points = [each for run in runs if (each := _points(run, key))[0].size > 1]
    steps = reduce(np.intersect1d, [steps for steps, _ in points]) if points else np.empty(0)
    if steps.size < 2:
        return None
    steps = steps[np.unique(np.linspace(0, steps.size - 1, POINTS).round().astype(int))]
    values = np.stack([losses[np.searchsorted(own, steps)] for own, losses in points])
    return Curve(key, _axes(runs, steps), values.mean(0), values.min(0), values.max(0))


def training_seconds(run: Run, steps: np.ndarray) -> np.ndarray | None:
    """Seconds of training alone up to these steps: the sum of tokens ÷ tokens_per_second over the rows before."""
    rate, logged, each = run.curves["tokens_per_second"], run.curves["step"], run.tokens_per_step
    there = rate > 0
    if each is None or not there.any():
        return None
    seconds = np.cumsum(np.diff(logged[there], prepend=0.0) * each / rate[there])
    return np.interp(steps, np.concatenate([[0.0], logged[there]]), np.concatenate([[0.0], seconds]))


def _points(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    there = ~np.isnan(run.curves[key])
    return run.curves["step"][there], run.curves[key][there]


def _axes(runs: list[Run], steps: np.ndarray) -> dict[str, np.ndarray]:
    axes = {"steps": steps}
    sizes = {run.tokens_per_step for run in runs}
    if len(sizes) == 1 and (size := sizes.pop()) is not None:
        axes["tokens"] = steps * size
        seconds = [each for run in runs if (each := training_seconds(run, steps)) is not None]
        if seconds:
            axes["seconds"] = np.mean(seconds, axis=0)
    return axes
