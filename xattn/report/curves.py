"""Learning curves of cells against steps, tokens and seconds, and how the difference of two arms develops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special

from xattn.metrics import BITS, LOSS
from xattn.report.design import Cell
from xattn.report.metric import are_comparable
from xattn.report.read import Run
from xattn.report.selection import Chosen
from xattn.report.statistics import LEVEL, Matched

AXES = {"steps": "steps", "tokens": "training tokens", "seconds": "seconds of training"}
POINTS = 300  # at most


@dataclass(frozen=True)
class Curve:
    """Mean over the seeds with its 95 % t interval, at the steps that all of them have.

    With one seed the interval is empty: low and high equal the mean.
    """

    key: str
    x: Mapping[str, np.ndarray]
    """axis → the steps' positions on it"""
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def loss_curves(chosen: Mapping[Cell, Chosen]) -> dict[Cell, Curve]:
    """Return curves of one loss, so that cells can be compared: of the losses that measure the same thing in all runs,
    the one that most cells have. Empty if there is none."""
    runs = [run for each in chosen.values() for run in each.runs.values()]
    found = [curves_of(chosen, key) for key in (LOSS, BITS, "train_loss") if are_comparable(runs, key)]
    return max(found, key=len, default={})


def curves_of(chosen: Mapping[Cell, Chosen], key: str) -> dict[Cell, Curve]:
    """Return the curves of the cells' finished runs or, if there are none, of the diverged ones up to that point.

    A cell with fewer than two logged values has none.
    """
    curves = {}
    for cell, each in chosen.items():
        done = [run for run in each.runs.values() if run.status == "done"]
        runs = done or [run for run in each.runs.values() if run.status == "diverged"]
        table = _shared([values for run in runs if (values := _logged(run, key)).size > 1])
        if len(table) > 1:
            curves[cell] = Curve(key, _axes(runs, table.index.to_numpy()), *_interval(table.to_numpy().T))
    return curves


def difference_curve(pairs: Matched) -> Curve | None:
    """Return arm − baseline over the seeds, against steps, each seed averaged over the other factors' combinations.

    The loss is the training loss if both sides saw the same batches at the same step, so that batch noise cancels; else
    val_loss or val_bpb, if it measures the same thing. None without a loss, pairs, or common steps.
    """
    both = [[(ours.runs[seed], theirs.runs[seed]) for ours, theirs in pairs.cells] for seed in pairs.seeds]
    all_pairs = [pair for of_seed in both for pair in of_seed]
    losses = [key for key in (LOSS, BITS) if all(are_comparable(pair, key) for pair in all_pairs)]
    if all_pairs and all(_same_batches(ours, theirs) for ours, theirs in all_pairs):
        losses = ["train_loss"]
    if not all_pairs or not losses:
        return None
    key = losses[0]
    logged = {run.folder: _logged(run, key) for pair in all_pairs for run in pair}
    table = _shared([*logged.values()]).set_axis([*logged], axis="columns")
    if len(table) < 2:
        return None
    values = [np.mean([table[a.folder] - table[b.folder] for a, b in of_seed], axis=0) for of_seed in both]
    return Curve(key, {"steps": table.index.to_numpy()}, *_interval(np.stack(values)))


def _same_batches(ours: Run, theirs: Run) -> bool:
    """Return whether the runs see the same tokens at each step: the same data, order and batch shape."""
    keys = {key for run in (ours, theirs) for key in run.config if key.startswith("data.")}
    keys |= {"seed", "backend.context_length", "trainer.batch_size"}
    return all(ours.config.get(key) == theirs.config.get(key) for key in keys)


def training_seconds(run: Run, steps: np.ndarray) -> np.ndarray | None:
    """Return seconds of training alone up to these steps: the sum of tokens ÷ tokens_per_second over earlier rows."""
    rate, logged, each = run.curves["tokens_per_second"], run.curves["step"], run.tokens_per_step
    there = rate > 0
    if each is None or not there.any():
        return None
    seconds = np.cumsum(np.diff(logged[there], prepend=0.0) * each / rate[there])
    return np.interp(steps, np.concatenate([[0.0], logged[there]]), np.concatenate([[0.0], seconds]))


def _shared(logged: Sequence[pd.Series]) -> pd.DataFrame:
    """Return a column for each run, at the steps that all have, thinned out to at most :data:`POINTS`."""
    table = pd.concat(logged, axis="columns", join="inner") if logged else pd.DataFrame()
    shown = np.linspace(0, max(len(table) - 1, 0), min(POINTS, len(table)))
    return table.iloc[shown.round().astype(int)]


def _interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, low and high of (seeds, steps)."""
    mean, seeds = values.mean(0), len(values)
    if seeds == 1:
        return mean, mean, mean
    half = special.stdtrit(seeds - 1, (1 + LEVEL) / 2) * values.std(0, ddof=1) / seeds**0.5
    return mean, mean - half, mean + half


def _logged(run: Run, key: str) -> pd.Series:
    """Return the values of a curve by their steps."""
    there = np.abs(run.curves[key]) < 1e100  # also drops NaN; larger values cannot be drawn
    return pd.Series(run.curves[key][there], index=run.curves["step"][there])


def _axes(runs: list[Run], steps: np.ndarray) -> dict[str, np.ndarray]:
    axes = {"steps": steps}
    sizes = {run.tokens_per_step for run in runs}
    if len(sizes) == 1 and (size := sizes.pop()) is not None:
        axes["tokens"] = steps * size
        seconds = [each for run in runs if (each := training_seconds(run, steps)) is not None]
        if seconds:
            axes["seconds"] = np.mean(seconds, axis=0)
    return axes
