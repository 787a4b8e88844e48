"""Differences between arms, paired by seed, and how sure they are. The tests are scipy's and statsmodels'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import special, stats
from statsmodels.stats.multitest import multipletests

from xattn.report.design import Cell, Design, Factor, pairs_of
from xattn.report.selection import Chosen

LEVEL = 0.95
POWER = 0.8
BOOTSTRAP_FROM = 20  # seeds: below, BCa covers too little (70 % at 3, 84 % at 5, 90 % at 10)
_RESAMPLES = 9999
EXACT_TO = 13  # seeds: from 14 on the flips of signs are more than the resamples, and drawn at random


@dataclass(frozen=True)
class Paired:
    """What paired differences d₁ … d_n say of their mean δ.

    difference: their mean d̄. ci_low, ci_high: d̄ ± t(0.975, n − 1) · s/√n (Student). p: two-sided, of
    t = d̄ √n / s under δ = 0. p_signflip: two-sided, of d̄ among the means under all 2ⁿ flips of the signs (Fisher;
    a random 9,999 of them from n = 14 on); not below 2^(1−n). spread: s. bootstrap: BCa interval (Efron 1987), from 20
    seeds on. None where n, or a spread of zero, lets nothing be said.
    """

    seeds: int
    difference: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    p: float | None = None
    p_signflip: float | None = None
    spread: float | None = None
    bootstrap: tuple[float, float] | None = None


@dataclass(frozen=True)
class Effect:
    """One comparison: arm − baseline, over the cells of the other factors that both have.

    factor and arm are written ``a × b`` where the comparison is an interaction: how much more (a's arm − a's baseline)
    is under b's arm than under b's baseline. p_holm: p after Holm's correction over the factor's comparisons, of which
    there are `comparisons`. detectable: see :func:`detectable`, corrected as p_holm is; the interval is not. diverged,
    baseline_diverged: runs, of as many that ended (done or diverged) as `ended` and `baseline_ended` say. cells: how
    many were averaged.
    """

    factor: str
    arm: Any
    baseline: Any
    metric: str
    paired: Paired
    p_holm: float | None = None
    comparisons: int = 1
    detectable: float | None = None
    diverged: int = 0
    ended: int = 0
    baseline_diverged: int = 0
    baseline_ended: int = 0
    cells: int = 1
    cells_left_out: int = 0

    @property
    def more_diverged(self) -> float:
        """The share of the arm's runs that diverged − the baseline's, of those that ended."""
        return self.diverged / max(1, self.ended) - self.baseline_diverged / max(1, self.baseline_ended)


def smallest_signflip_p(seeds: int) -> float:
    """2^(1−n): all signs as they are, and all flipped."""
    return 2.0 ** (1 - seeds)


def paired(differences: Sequence[float] | np.ndarray) -> Paired:
    """The statistics of paired differences, one for each seed."""
    d = np.asarray(differences, dtype=float)
    if d.size == 0:
        return Paired(0)
    mean = float(d.mean())
    if d.size == 1:
        return Paired(1, mean)
    spread = float(d.std(ddof=1))
    if spread <= 1e-12 * max(abs(mean), np.finfo(float).tiny):  # all seeds say the same: no error to compare with
        return Paired(d.size, mean)
    test = stats.ttest_1samp(d, 0.0)
    interval = test.confidence_interval(LEVEL)
    flips = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=_RESAMPLES, rng=np.random.default_rng(0)
    )
    return Paired(
        seeds=d.size,
        difference=mean,
        ci_low=float(interval.low),
        ci_high=float(interval.high),
        p=float(test.pvalue),
        p_signflip=float(flips.pvalue),
        spread=spread,
        bootstrap=_bootstrap(d) if d.size >= BOOTSTRAP_FROM else None,
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment (1979) of those that are there: it keeps the family's error at the level."""
    known = [p for p in p_values if p is not None]
    adjusted = iter(multipletests(known, method="holm")[1]) if known else iter(())
    return [None if p is None else float(next(adjusted)) for p in p_values]


def detectable(spread: float, seeds: int, comparisons: int) -> float:
    """The |δ| that is found with probability 0.8, by Holm at level 0.05 among so many comparisons, if s is the spread.

    That of the t test at level 0.05 / comparisons, at which Holm rejects whatever the others say: where some of the
    others are rejected too, it is found more often. The chance of rejecting on the wrong side is left out (< 10⁻⁵).
    """
    threshold = special.stdtrit(seeds - 1, 1 - (1 - LEVEL) / 2 / comparisons)
    return spread * float(special.nctdtrinc(seeds - 1, 1 - POWER, threshold)) / seeds**0.5


def main_effects(design: Design, chosen: Mapping[Cell, Chosen], factor: Factor, metric: str) -> list[Effect]:
    """Each arm of the factor against its baseline."""
    effects = [_effect(design, chosen, factor, arm, metric) for arm in factor.arms if arm != factor.baseline]
    return _adjusted(effects)


def interactions(design: Design, chosen: Mapping[Cell, Chosen], metric: str) -> list[Effect]:
    """For every two factors that cross, (a, b) − (a₀, b) − (a, b₀) + (a₀, b₀) of each two arms, a₀ and b₀ baselines.

    Taken where the other factors are at their baselines. Holm is over the arms of the two factors.
    """
    found = []
    for a, b in pairs_of(design.factors):
        effects = []
        for arm_a in a.arms:
            for arm_b in b.arms:
                if arm_a == a.baseline or arm_b == b.baseline:
                    continue
                corners = [
                    chosen.get(
                        tuple({a.key: x, b.key: y}.get(factor.key, factor.baseline) for factor in design.factors)
                    )
                    for x, y in ((arm_a, arm_b), (a.baseline, arm_b), (arm_a, b.baseline), (a.baseline, b.baseline))
                ]
                if any(corner is None for corner in corners):
                    continue
                both, only_b, only_a, neither = (corner.values for corner in corners if corner is not None)
                seeds = [s for s in design.seeds if all(s in values for values in (both, only_b, only_a, neither))]
                differences = [both[s] - only_b[s] - only_a[s] + neither[s] for s in seeds]
                names = (f"{a.key} × {b.key}", (arm_a, arm_b), (a.baseline, b.baseline))
                effects.append(Effect(*names, metric, paired(differences)))
        found += _adjusted(effects)
    return found


def _effect(design: Design, chosen: Mapping[Cell, Chosen], factor: Factor, arm: Any, metric: str) -> Effect:
    """d_s is the mean over the cells of the other factors that both arms have, of arm − baseline with seed s."""
    cells, judged = [], 0
    for others in design.others(factor):
        ours = chosen.get(design.cell(factor, arm, others))
        theirs = chosen.get(design.cell(factor, factor.baseline, others))
        if ours and theirs:
            judged += 1
            cells.append((ours, theirs))
    usable = [(ours, theirs) for ours, theirs in cells if ours.values.keys() & theirs.values.keys()]
    seeds = [s for s in design.seeds if usable and all(s in o.values and s in t.values for o, t in usable)]
    differences = [float(np.mean([ours.values[s] - theirs.values[s] for ours, theirs in usable])) for s in seeds]
    return Effect(
        factor.key,
        arm,
        factor.baseline,
        metric,
        paired(differences),
        diverged=sum(len(ours.diverged) for ours, _ in cells),
        ended=sum(ours.ended for ours, _ in cells),
        baseline_diverged=sum(len(theirs.diverged) for _, theirs in cells),
        baseline_ended=sum(theirs.ended for _, theirs in cells),
        cells=len(usable),
        cells_left_out=judged - len(usable),
    )


def _adjusted(effects: Sequence[Effect]) -> list[Effect]:
    adjusted = holm([effect.paired.p for effect in effects])
    judged = sum(p is not None for p in adjusted)
    return [
        replace(
            effect,
            p_holm=p,
            comparisons=judged,
            detectable=effect.paired.spread and detectable(effect.paired.spread, effect.paired.seeds, judged),
        )
        for effect, p in zip(effects, adjusted, strict=True)
    ]


def _bootstrap(d: np.ndarray) -> tuple[float, float]:
    result = stats.bootstrap(
        (d,), np.mean, confidence_level=LEVEL, method="BCa", n_resamples=_RESAMPLES, rng=np.random.default_rng(0)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
