"""How many seeds a difference needs, and the interval that these give it: Stein's two-stage procedure.

A pilot of n₀ pairs gives a spread s₀. Then so many pairs are made that the interval, with that spread and its n₀ − 1
degrees of freedom, is no wider than was asked for. For normal differences its coverage is exact, whatever their true
spread is (Stein, A Two-Sample Test for a Linear Hypothesis Whose Power is Independent of the Variance, Annals of
Mathematical Statistics 16, 1945): the mean of a normal sample is independent of its residuals, so that a number of
pairs that rests on residuals alone says nothing about the mean. That holds also where several arms' residuals decide
it, and where fewer pairs are made than were needed, as long as their losses had no say in that.
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
    """What the pairs say of one difference.

    pilot: n₀, the first pairs, of which `spread` is s₀. comparisons: m, of which all intervals hold at once with
    probability 0.95 at least (Bonferroni). pairs: n, of which the interval d̄ ± t(1 − 0.025/m, n₀ − 1) · s₀/√n is.
    half_widths: those that were asked for, the last one last. needed: the pairs that the last one takes.
    """

    pilot: int
    spread: float
    comparisons: int
    pairs: int
    ci_low: float
    ci_high: float
    half_widths: tuple[float, ...]
    needed: int

    @property
    def half_width(self) -> float:
        return (self.ci_high - self.ci_low) / 2

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.ci_low > 0 or self.ci_high < 0

    @property
    def is_reached(self) -> bool:
        return self.pairs >= self.needed


def pilot_size(comparisons: int) -> int:
    """n₀ = 8 + 8 · log₁₀ m, rounded: 8 for one arm besides the baseline, 12 for three, 16 for ten.

    Near the least expected number of runs where the spread is 1 to 2.5 times the half-width (`python -m
    xattn.report.simulate`): the more comparisons, the farther out the quantile of t is, where few degrees of freedom
    cost the most.
    """
    return round(8 + 8 * math.log10(comparisons))


def quantile(pilot: int, comparisons: int) -> float:
    """t(1 − 0.025/m, n₀ − 1)"""
    return float(special.stdtrit(pilot - 1, 1 - (1 - LEVEL) / 2 / comparisons))


def pairs_needed(spread: float, pilot: int, comparisons: int, half_width: float) -> int:
    """max(n₀, ⌈(t(1 − 0.025/m, n₀ − 1) · s₀ / h)²⌉)"""
    return max(pilot, math.ceil((quantile(pilot, comparisons) * spread / half_width) ** 2))


def two_stage(
    differences: Sequence[float] | np.ndarray, pilot: int, comparisons: int, half_widths: Sequence[float]
) -> TwoStage | None:
    """What these differences, in the order of their seeds, say; None where the pilot is too small or has no spread.

    pilot: how many of the first are the pilot's.
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
    """The comparisons, with a :class:`TwoStage` for each effect of those that were made with ``sweep.half_width``.

    asked: the half-width that is asked for now and the size of the pilot; None for what the runs say.
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
    """How many differences are to be known at once: each factor's arms against its baseline. Lengths of training are
    none of them beside another factor, since they are there for what an arm is worth."""
    counts = [(factor.key, len(factor.arms) - 1) for factor in factors]
    others = sum(count for key, count in counts if key != STEPS)
    return others or sum(count for _, count in counts)


def asked_half_widths(runs: Iterable[Run]) -> tuple[float, ...]:
    """``sweep.half_width`` of the runs, each once, in the order in which they were begun."""
    begun = sorted(runs, key=lambda run: str(run.provenance.get("started_at", "")))
    found = (finite(run.config.get("sweep.half_width")) for run in begun)
    return tuple(dict.fromkeys(width for width in found if width is not None))
