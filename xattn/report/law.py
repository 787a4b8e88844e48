"""The law L(C) = E + a · C^(−b) of losses over training lengths, and the bootstrap over seeds for its uncertainty.

The form is that of Hoffmann et al. (arXiv 2203.15556) for one size of model, with a, b > 0 and C in steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special
from scipy.optimize import elementwise

from xattn.report.statistics import LEVEL

LENGTHS = 3  # needed for a law
RESAMPLES = 2000
_EXPONENTS = np.geomspace(1e-3, 10, 200)
_NO_END = np.log(1000)  # an interval's end beyond this counts as infinite

Columns = Sequence[Mapping[Any, float]]  # seed → value


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Law:
    """L(C) = e + a · C^(−b), with an element for each row of fitted losses; NaN where no such law fits."""

    e: np.ndarray
    a: np.ndarray
    b: np.ndarray

    def loss(self, steps: float | np.ndarray) -> np.ndarray:
        return np.asarray(self.e + self.a * steps**-self.b)

    def log_steps(self, loss: np.ndarray) -> np.ndarray:
        """Return the log of the steps that reach the loss; infinite for a loss that the law never reaches."""
        with np.errstate(divide="ignore", over="ignore"):
            return np.asarray(np.log(self.a / np.maximum(loss - self.e, 0.0)) / self.b)


def fit(steps: Sequence[int], losses: np.ndarray) -> Law:
    """Fit the law to each row of losses by least squares; through all points if they are three and such a law exists.

    For a given b, E and a are those of a line. The residual is smallest where the losses' fall, as a vector, lies most
    along that of C^(−b). So only b is searched for: first on a grid, then between the best point's neighbours.
    """
    log_c = np.log(np.asarray(steps, dtype=float))
    offset = log_c.mean()
    log_c = log_c - offset
    centred = losses - losses.mean(axis=1, keepdims=True)

    def powers(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return C^(−b) and its direction, with C in units of the geometric mean length."""
        x = np.exp(-b[..., None] * log_c)
        z = x - x.mean(axis=-1, keepdims=True)
        return x, z / np.linalg.norm(z, axis=-1, keepdims=True)

    along = centred @ powers(_EXPONENTS)[1].T
    best = along.argmax(axis=1)
    fits = (along.max(axis=1) > 0) & (best > 0) & (best < _EXPONENTS.size - 1)
    e, a, b = np.full((3, len(losses)), np.nan)
    if fits.any():
        bracket = tuple(_EXPONENTS[best[fits] + i] for i in (-1, 0, 1))
        b[fits] = elementwise.find_minimum(
            lambda b, *of_length: -(np.stack(of_length, axis=-1) * powers(b)[1]).sum(axis=-1),
            bracket,
            args=tuple(centred[fits].T),
        ).x
        x, direction = powers(b[fits])
        slope = (centred[fits] * direction).sum(axis=1) / np.linalg.norm(x - x.mean(axis=1, keepdims=True), axis=1)
        e[fits] = losses[fits].mean(axis=1) - slope * x.mean(axis=1)
        a[fits] = slope * np.exp(b[fits] * offset)
    return Law(e, a, b)


def misfit(steps: Sequence[int], losses: np.ndarray, law: Law) -> float:
    """Return how often the residual of noise is at least that of the first row's losses from its law.

    Noise is the resamples' deviation. A fit absorbs the part of it along the law's derivatives, here at its estimate.
    """
    if len(steps) <= LENGTHS:
        return 1.0
    c = np.asarray(steps, dtype=float)
    left = losses[0] - (law.e[0] + law.a[0] * c ** -law.b[0])
    x = (c / c.mean()) ** -law.b[0]
    taken, _ = np.linalg.qr(np.stack([np.ones_like(x), x, x * np.log(c / c.mean())], axis=-1))
    noise = losses[1:] - losses[0]
    noise = noise - noise @ taken @ taken.T
    return float(np.mean((noise**2).sum(axis=1) >= (left**2).sum()))


def resampled(columns: Columns, resamples: int = RESAMPLES) -> np.ndarray:
    """Return the columns' means in the first row, and a bootstrap of them over seeds below it.

    In a resample a seed has one normal weight for all its columns, so that pairs stay pairs. The deviations are
    stretched by √(ν / χ²_ν), ν = n − 1, with the same quantile of χ² in all columns. The interval of anything linear in
    the means is therefore Student's; drawing seeds with replacement covers too little with few of them.
    """
    seeds = list(dict.fromkeys(seed for column in columns for seed in column))
    table = np.array([[column.get(seed, np.nan) for column in columns] for seed in seeds])
    counts = (~np.isnan(table)).sum(axis=0)
    means = np.nanmean(table, axis=0)
    deviations = np.where(np.isnan(table), 0.0, table - means) / np.sqrt(counts * (counts - 1))
    rng = np.random.default_rng(0)
    weights, quantiles = rng.standard_normal((resamples, len(seeds))), rng.random((resamples, 1))
    stretch = np.sqrt((counts - 1) / special.chdtri(counts - 1, quantiles))
    return np.vstack([means, means + stretch * (weights @ deviations)])


def interval(logs: np.ndarray) -> Interval | str:
    """Return the percentile interval around the first element. A resample without a law counts against both ends."""
    tail = int((logs.size - 1) * (1 - LEVEL) / 2)
    failed = np.isnan(logs[1:])
    low = np.sort(np.where(failed, -np.inf, logs[1:]))[tail - 1]
    high = np.sort(np.where(failed, np.inf, logs[1:]))[-tail]
    if not np.isfinite(low):
        return f"no E + a·C^(−b) with a, b > 0 fits {failed.mean():.0%} of the resamples of its seeds"
    if high > _NO_END:
        return "in some resamples, the baseline never reaches the arm's loss, or needs over 1,000 times the steps"
    return Interval(*np.exp([logs[0], low, high]).tolist())


def t_interval(logs: Sequence[float]) -> Interval:
    """Return Student's interval of the geometric mean."""
    mean, n = float(np.mean(logs)), len(logs)
    half = float(special.stdtrit(n - 1, (1 + LEVEL) / 2)) * float(np.std(logs, ddof=1)) / n**0.5
    return Interval(*np.exp([mean, mean - half, mean + half]).tolist())
