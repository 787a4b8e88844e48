"""How many seeds a difference needs, and the interval that they give it: Stein's two-stage procedure.

A pilot of n₀ pairs gives a spread s₀. Then enough pairs are added that the interval, with that spread and its n₀ − 1
degrees of freedom, is no wider than requested. For normal differences its coverage is exact, whatever their true spread
(Stein, A Two-Sample Test for a Linear Hypothesis Whose Power is Independent of the Variance, Annals of Mathematical
Statistics 16, 1945). The mean of a normal sample is independent of its residuals, so a number of pairs that depends on
residuals alone says nothing about the mean. This also holds if several arms' residuals decide it, and if fewer pairs
than needed are run, as long as their losses did not influence that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from xattn.report.answer import Comparison
from xattn.report.design import STEPS, Factor
from xattn.report.read import Run, finite
from xattn.report.statistics import LEVEL

SMALLEST_PILOT = 4  # pairs


@dataclass(frozen=True)
class TwoStage:
    """What the pairs show about one difference."""

    pilot: int
    """n₀, the number of first pairs"""
    spread: float
    """s₀, of the pilot"""
    comparisons: int
    """m; all m intervals hold simultaneously with probability at least 0.95 (Bonferroni)"""
    pairs: int
    """n; the interval is d̄ ± t(1 − 0.025/m, n₀ − 1) · s₀/√n"""
    ci_low: float
    ci_high: float
    half_widths: tuple[float, ...]
    """the requested ones, the latest last"""
    needed: int
    """the pairs that the last half-width requires"""

    @property
    def half_width(self) -> float:
        return (self.ci_high - self.ci_low) / 2

    @property
    def is_shown(self) -> bool:
        """Return whether the interval excludes zero."""
        return self.ci_low > 0 or self.ci_high < 0

    @property
    def is_reached(self) -> bool:
        return self.pairs >= self.needed


def pilot_size(comparisons: int) -> int:
    """Return n₀ = 8 + 8 · log₁₀ m, rounded: 8 for one arm besides the baseline, 12 for three, 16 for ten.

    It is near the least expected number of runs if the spread is 1 to 2.5 times the half-width (`python -m
    xattn.report.simulate`). More comparisons move the quantile of t outwards, where few degrees of freedom cost the
    most.
    """
    return round(8 + 8 * math.log10(comparisons))


def quantile(pilot: int, comparisons: int) -> float:
    """Return t(1 − 0.025/m, n₀ − 1)."""
    return float(special.stdtrit(pilot - 1, 1 - (1 - LEVEL) / 2 / comparisons))


def pairs_needed(spread: float, pilot: int, comparisons: int, half_width: float) -> int:
    """Return max(n₀, ⌈(t(1 − 0.025/m, n₀ − 1) · s₀ / h)²⌉)."""
    return max(pilot, math.ceil((quantile(pilot, comparisons) * spread / half_width) ** 2))


def two_stage(
    differences: Sequence[float] | np.ndarray, pilot: int, comparisons: int, half_widths: Sequence[float]
) -> TwoStage | None:
    """Return what these differences, in the order of seeds, show; None if the pilot is too small or has no spread.

    pilot: how many of the first differences form it.
    """
    d = np.asarray(differences, dtype=float)
    pilot = min(pilot, d.size)
    spread = float(d[:pilot].std(ddof=1)) if pilot >= SMALLEST_PILOT else 0.0
    if spread <= 1e-12 * float(np.abs(d).max(initial=0.0)):
        return None
    mean, half = float(d.mean()), quantile(pilot, comparisons) * spread / d.size**0.5
    return TwoStage(
        pilot=pilot,
        spread=spread,
        comparisons=comparisons,
        pairs=d.size,
        ci_low=mean - half,
        ci_high=mean + half,
        half_widths=tuple(half_widths),
        needed=pairs_needed(spread, pilot, comparisons, half_widths[-1]),
    )


def with_stages(comparisons: Sequence[Comparison], asked: tuple[float, int] | None) -> list[Comparison]:
    """Return the comparisons, with a :class:`TwoStage` for each effect of runs made with ``sweep.half_width``.

    asked: the half-width requested now and the size of the pilot; None for what the runs say.
    """
    factors = [factor for each in comparisons for factor in each.design.factors]
    count = comparisons_of(factors)
    has_others = any(factor.key != STEPS for factor in factors)
    found = []
    for each in comparisons:
        pilots = [size for run in each.runs if isinstance(size := run.config.get("sweep.pilot_seeds"), int)]
        half_widths, pilot = asked_half_widths(each.runs), max(pilots, default=pilot_size(max(count, 1)))
        if asked is not None:
            half_widths, pilot = tuple(dict.fromkeys([*half_widths, asked[0]])), asked[1]
        if half_widths:
            effects = [
                effect
                if has_others and effect.factor == STEPS
                else replace(effect, stage=two_stage(list(effect.by_seed.values()), pilot, count, half_widths))
                for effect in each.effects
            ]
            each = replace(each, effects=effects)
        found.append(each)
    return found


def comparisons_of(factors: Sequence[Factor]) -> int:
    """Return how many differences must be known simultaneously: each factor's arms against its baseline. Training
    lengths do not count beside another factor, since they only measure what an arm is worth."""
    counts = [(factor.key, len(factor.arms) - 1) for factor in factors]
    others = sum(count for key, count in counts if key != STEPS)
    return others or sum(count for _, count in counts)


def asked_half_widths(runs: Iterable[Run]) -> tuple[float, ...]:
    """Return the runs' ``sweep.half_width`` values, each once, in the order in which the runs started."""
    begun = sorted(runs, key=lambda run: str(run.provenance.get("started_at", "")))
    found = (finite(run.config.get("sweep.half_width")) for run in begun)
    return tuple(dict.fromkeys(width for width in found if width is not None))
