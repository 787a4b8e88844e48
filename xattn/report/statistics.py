"""Differences between arms, paired by seed, with their uncertainty. The tests come from scipy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special, stats

from xattn.report.design import Cell, Design, Factor
from xattn.report.metric import Metric
from xattn.report.selection import Chosen

if TYPE_CHECKING:
    from xattn.report.two_stage import TwoStage
    from xattn.report.worth import Worth

LEVEL = 0.95
POWER = 0.8
BOOTSTRAP_FROM = 20  # seeds; with fewer, BCa covers too little (70 % at 3, 84 % at 5, 90 % at 10)
_RESAMPLES = 9999
EXACT_TO = 13  # seeds; from 14, sign flips outnumber the resamples and are drawn at random


@dataclass(frozen=True)
class Paired:
    """Statistics of paired differences d₁ … d_n with true mean δ; None where n or a spread of zero allows none."""

    seeds: int
    difference: float | None = None
    """their mean d̄"""
    ci_low: float | None = None
    """d̄ ± t(0.975, n − 1) · s/√n (Student)"""
    ci_high: float | None = None
    p: float | None = None
    """two-sided, of t = d̄ √n / s under δ = 0"""
    p_signflip: float | None = None
    """two-sided, of d̄ among its 2ⁿ sign flips (Fisher; 9,999 random ones from n = 14); at least 2^(1−n)"""
    spread: float | None = None
    """s"""
    bootstrap: tuple[float, float] | None = None
    """BCa interval (Efron 1987), from 20 seeds"""


@dataclass(frozen=True)
class Effect:
    """One comparison, arm − baseline, over the cells of the other factors that both have.

    For an interaction, factor and arm are written ``a × b``. Its difference is how much larger (a's arm − a's baseline)
    is under b's arm than under b's baseline, and its two means are these two differences.
    """

    factor: str
    arm: Any
    baseline: Any
    metric: str
    paired: Paired
    arm_mean: float | None = None
    """over the pairs alone, so that ``difference == arm_mean − baseline_mean``"""
    baseline_mean: float | None = None
    left_out: int = 0
    """runs with a value at the chosen settings that belong to no pair"""
    baseline_left_out: int = 0
    p_holm: float | None = None
    """p after Holm's correction over the `comparisons` of its family (:attr:`Design.families`)"""
    comparisons: int = 1
    detectable: float | None = None
    """see :func:`detectable`; corrected as p_holm is, unlike the interval"""
    diverged: int = 0
    ended: int = 0
    """runs of the arm that are done or diverged"""
    baseline_diverged: int = 0
    baseline_ended: int = 0
    cells: int = 1
    """how many cells the difference is averaged over"""
    cells_left_out: int = 0
    why_not: str = ""
    """why existing values are not comparable"""
    by_seed: Mapping[Any, float] = field(default_factory=dict)
    """seed → difference, in the order of seeds; :attr:`paired` describes these"""
    stage: TwoStage | None = None
    """the result of Stein's procedure, where ``sweep.half_width`` chose the number of seeds"""
    worth: Worth | None = None
    """what the arm is worth in baseline steps, where the baseline has runs of several lengths"""

    @property
    def counts(self) -> tuple[str, str]:
        """Return table cells: runs left out (the arm's + the baseline's), and how many of the arm's runs diverged."""
        return f"{self.left_out} + {self.baseline_left_out}", f"{self.diverged} of {self.ended}"

    @property
    def more_diverged(self) -> float:
        """Return the share of the arm's ended runs that diverged, minus the baseline's share."""
        return self.diverged / max(1, self.ended) - self.baseline_diverged / max(1, self.baseline_ended)


@dataclass(frozen=True)
class Matched:
    """The runs of two arms that are compared with each other."""

    cells: tuple[tuple[Chosen, Chosen], ...]
    """for each cell of the other factors: the arm's runs and the baseline's"""
    seeds: tuple[Any, ...]
    """the seeds that all of these have on both sides"""
    in_question: tuple[tuple[Chosen, Chosen], ...]
    """all cells that both arms have, before any was left out"""
    why_not: str

    @property
    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the arm's values and the baseline's, one for each seed: means over the cells."""
        ours, theirs = (
            np.array([np.mean([pair[side].values[seed] for pair in self.cells]) for seed in self.seeds])
            for side in (0, 1)
        )
        return ours, theirs


def paired(differences: Sequence[float] | np.ndarray) -> Paired:
    """Return the statistics of paired differences, one for each seed."""
    d = np.asarray(differences, dtype=float)
    if d.size == 0:
        return Paired(0)
    mean = float(d.mean())
    if d.size == 1:
        return Paired(1, mean)
    spread = float(d.std(ddof=1))
    if spread <= 1e-12 * max(abs(mean), np.finfo(float).tiny):  # all seeds agree: there is no error to compare with
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
    """Return Holm's step-down adjustment (1979) of the known p values; it controls the family-wise error."""
    known = np.array([p for p in p_values if p is not None])
    order = known.argsort()
    adjusted = np.empty_like(known)
    adjusted[order] = np.minimum(np.maximum.accumulate(known[order] * np.arange(known.size, 0, -1)), 1)
    found = iter(adjusted.tolist())
    return [None if p is None else next(found) for p in p_values]


def detectable(spread: float, seeds: int, comparisons: int) -> float:
    """Return the |δ| that Holm's test detects with probability 0.8 at level 0.05, if s equals the spread.

    It is that of the t test at level 0.05 / comparisons, where Holm rejects regardless of the other p values. If some
    of the others are rejected too, the probability is higher. Rejecting on the wrong side (< 10⁻⁵) is ignored.
    """
    threshold = special.stdtrit(seeds - 1, 1 - (1 - LEVEL) / 2 / comparisons)
    return spread * float(special.nctdtrinc(seeds - 1, 1 - POWER, threshold)) / seeds**0.5


def main_effects(design: Design, chosen: Mapping[Cell, Chosen], metric: Metric) -> list[Effect]:
    """Compare each arm of each factor with its baseline. Holm corrects within each of :attr:`Design.families`."""
    effects: list[Effect] = []
    for family in design.families:
        of_family = [
            _effect(design, chosen, factor, arm, metric)
            for factor in family
            for arm in factor.arms
            if arm != factor.baseline
        ]
        effects += _adjusted(of_family)
    return effects


def matched(design: Design, chosen: Mapping[Cell, Chosen], factor: Factor, arm: Any, metric: Metric) -> Matched:
    """Return the runs of an arm and of the factor's baseline that differ in that factor alone.

    If the crossing has holes, combinations of the other factors' arms are added, those with most seeds first, and the
    selection with the most pairs is kept. In it every combination has every seed.
    """
    by_arm = _by_arm(design, chosen, factor)
    theirs = by_arm[factor.baseline]
    in_question = tuple((ours, theirs[others]) for others, ours in by_arm[arm].items() if others in theirs)
    shared = [
        {seed for seed in ours.values if _comparable_seed(seed, (ours, base), metric)} for ours, base in in_question
    ]
    order = sorted((i for i, seeds in enumerate(shared) if seeds), key=lambda i: -len(shared[i]))
    best: tuple[list[int], set[Any]] = ([], set())
    common: set[Any] = set(design.seeds)
    for size, i in enumerate(order, 1):
        common = common & shared[i]
        if size * len(common) >= len(best[0]) * len(best[1]) and common:
            best = (order[:size], common)
    both = [(ours, base, seed) for ours, base in in_question for seed in ours.values.keys() & base.values.keys()]
    reasons = (metric.why_not(ours.units[seed], base.units[seed]) for ours, base, seed in both)
    return Matched(
        cells=tuple(in_question[i] for i in sorted(best[0])),
        seeds=tuple(seed for seed in design.seeds if seed in best[1]),
        in_question=in_question,
        why_not=next((why for why in reasons if why is not None), ""),
    )


def interactions(design: Design, chosen: Mapping[Cell, Chosen], metric: Metric) -> list[Effect]:
    """Return (a, b) − (a₀, b) − (a, b₀) + (a₀, b₀) for each two arms of every two crossed factors.

    a₀ and b₀ are baselines. The other factors are at their baselines. Holm corrects over the arms of the two factors.
    """
    base = tuple(factor.baseline for factor in design.factors)
    by_factors: dict[tuple[int, int], list[Effect]] = {pair: [] for pair in combinations(range(len(base)), 2)}
    for cell in chosen:
        moved = [i for i, (arm, baseline) in enumerate(zip(cell, base, strict=True)) if arm != baseline]
        if len(moved) != 2:
            continue
        i, j = moved
        corners = [cell, (*cell[:i], base[i], *cell[i + 1 :]), (*cell[:j], base[j], *cell[j + 1 :]), base]
        there = [chosen[corner] for corner in corners if corner in chosen]
        if len(there) < len(corners):
            continue
        seeds = [seed for seed in design.seeds if _comparable_seed(seed, there, metric)]
        values = [np.array([corner.values[seed] for seed in seeds]) for corner in there]
        a, b = design.factors[i], design.factors[j]
        names = (f"{a.key} × {b.key}", (cell[i], cell[j]), (a.baseline, b.baseline), metric.name)
        by_factors[i, j].append(_between(names, values[0] - values[1], values[2] - values[3]))
    return [effect for effects in by_factors.values() for effect in _adjusted(effects)]


def _comparable_seed(seed: Any, chosen: Sequence[Chosen], metric: Metric) -> bool:
    """Return whether all have a value with this seed, and these values measure the same thing."""
    if not all(seed in each.values for each in chosen):
        return False
    first = chosen[0].units[seed]
    return all(metric.why_not(first, each.units[seed]) is None for each in chosen[1:])


def _by_arm(design: Design, chosen: Mapping[Cell, Chosen], factor: Factor) -> dict[Any, dict[Cell, Chosen]]:
    """Return arm → arms of the other factors → the cell there."""
    i = design.factors.index(factor)
    found: dict[Any, dict[Cell, Chosen]] = {arm: {} for arm in factor.arms}
    for cell, each in chosen.items():
        found[cell[i]][cell[:i] + cell[i + 1 :]] = each
    return found


def _effect(design: Design, chosen: Mapping[Cell, Chosen], factor: Factor, arm: Any, metric: Metric) -> Effect:
    """Return the effect. d_s is the mean of arm − baseline with seed s over the cells that both arms have."""
    found = matched(design, chosen, factor, arm, metric)
    ours, theirs = found.means
    pairs = len(found.cells) * len(found.seeds)
    by_arm = _by_arm(design, chosen, factor)
    with_values = [sum(len(each.values) for each in by_arm[side].values()) for side in (arm, factor.baseline)]
    return replace(
        _between((factor.key, arm, factor.baseline, metric.name), ours, theirs),
        left_out=with_values[0] - pairs,
        baseline_left_out=with_values[1] - pairs,
        diverged=sum(len(each.diverged) for each, _ in found.in_question),
        ended=sum(each.ended for each, _ in found.in_question),
        baseline_diverged=sum(len(each.diverged) for _, each in found.in_question),
        baseline_ended=sum(each.ended for _, each in found.in_question),
        cells=len(found.cells),
        cells_left_out=len(found.in_question) - len(found.cells),
        why_not=found.why_not,
        by_seed=dict(zip(found.seeds, (ours - theirs).tolist(), strict=True)),
    )


def _between(names: tuple[str, Any, Any, str], ours: np.ndarray, theirs: np.ndarray) -> Effect:
    """Return the effect from the arm's values and the baseline's, seed by seed."""
    found = paired(ours - theirs)
    if not ours.size:
        return Effect(*names, found)
    means = float(ours.mean()), float(theirs.mean())
    return Effect(*names, replace(found, difference=means[0] - means[1]), *means)


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
