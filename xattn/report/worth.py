"""What an arm is worth: the baseline steps that reach its loss, and whether these pay for the cost of its own steps.

A law (:mod:`xattn.report.law`) is fitted to the baseline's mean losses at three or more values of ``trainer.steps``,
each trained with its own schedule. An arm is worth n times the baseline's steps if, by that law, the baseline needs n
times as many steps as the arm to reach the arm's loss. This is a compute multiplier if a step costs the same on both
sides. Divided by the actual ratio of costs, it is the net worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from xattn.keys import short, show
from xattn.metrics import LOSSES
from xattn.report.answer import Comparison
from xattn.report.cost import why_speeds_differ
from xattn.report.design import STEPS, Cell
from xattn.report.law import LENGTHS, RESAMPLES, Columns, Interval, Law, fit, interval, misfit, resampled, t_interval
from xattn.report.read import Run, finite
from xattn.report.selection import Chosen
from xattn.report.statistics import Effect

SEEDS = 3  # at least
MISFIT = 0.01  # the p below which a law of more than three lengths is refused
_ROUNDING = 1e-9  # of a loss


@dataclass(frozen=True)
class Worth:
    """What one arm is worth. Each number is a ratio to the baseline."""

    steps: Interval | None = None
    """the baseline's steps that reach the arm's loss ÷ the arm's own steps"""
    step_cost: Interval | None = None
    """seconds per step"""
    net: Interval | None = None
    """steps ÷ step_cost"""
    why_not: str = ""
    """why `steps` is missing or, if it is not, why `step_cost` and `net` are; empty if none is missing"""


@dataclass(frozen=True)
class Track:
    """Runs that differ from the baseline's in one factor's arm and in length, keyed by ``trainer.steps``."""

    where: Cell
    """the arms of all factors except the length, with the baseline in place of the arm"""
    baseline: Mapping[int, Chosen]
    arm: Mapping[int, Chosen]

    @property
    def judged(self) -> Mapping[int, Chosen]:
        """Return the arm at its lengths between the baseline's shortest and longest; at all if there are none.

        At the ends of the law, a better or a worse arm lies outside it, whatever it is worth.
        """
        inner = {steps: at for steps, at in self.arm.items() if min(self.baseline) < steps < max(self.baseline)}
        return inner or self.arm

    @property
    def anchor(self) -> int:
        """Return the baseline's length with the most seeds."""
        return max(self.baseline, key=lambda steps: len(self.baseline[steps].values))

    @property
    def cells(self) -> Iterator[tuple[str, int, Chosen]]:
        """Yield each cell's side, its steps, and what was found there."""
        yield from (("the baseline", steps, at) for steps, at in self.baseline.items())
        yield from (("the arm", steps, at) for steps, at in self.judged.items())


@dataclass(frozen=True)
class Fitted:
    """A law, the points that it was fitted to, and the arms that it is applied to."""

    label: str
    steps: np.ndarray
    losses: np.ndarray
    law: Law
    arms: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """name → steps and loss at each of its lengths"""


def with_worth(comparison: Comparison) -> Comparison:
    """Return the comparison with a :class:`Worth` for each effect that has several baseline lengths."""
    return replace(comparison, effects=[replace(each, worth=worth(comparison, each)) for each in comparison.effects])


def worth(comparison: Comparison, effect: Effect) -> Worth | None:
    """Return the effect's worth; None if the baseline has a single length or the factor is the length itself."""
    tracks = _tracks(comparison, effect)
    lengths = max((len(track.baseline) for track in tracks), default=0)
    if lengths < 2:
        return None
    if (metric := comparison.metric.name) not in LOSSES:
        return Worth(why_not=f"the law is of a loss ({' or '.join(LOSSES)}), which {metric} is not")
    if lengths < LENGTHS:
        return Worth(why_not=f"the baseline has runs of {lengths} lengths, but the law needs {LENGTHS}")
    tracks = [track for track in tracks if len(track.baseline) >= LENGTHS]
    columns = [_columns(track, comparison) for track in tracks]
    if why_not := _too_few(tracks, columns):
        return Worth(why_not=why_not)
    costs = _log_costs(tracks)
    rows = _rows(tracks, columns, {} if isinstance(costs, str) else costs)
    ratios = log_steps([([*track.baseline], [*track.judged]) for track in tracks], rows)
    found = ratios if isinstance(ratios, str) else interval(ratios)
    if isinstance(ratios, str) or isinstance(found, str):
        return Worth(why_not=str(found))
    if isinstance(costs, str):
        return Worth(found, why_not=costs)
    net = interval(ratios - rows[:, -1])
    return Worth(why_not=net) if isinstance(net, str) else Worth(found, t_interval([*costs.values()]), net)


def _too_few(tracks: Sequence[Track], columns: Sequence[Columns]) -> str:
    """Return why the losses give no interval; empty if they do."""
    differ = False
    for track, of_track in zip(tracks, columns, strict=True):
        for (whose, steps, at), values in zip(track.cells, of_track, strict=True):
            if at.diverged:
                return f"runs of {whose} diverged at {steps:,} steps, so its mean covers only the others"
            is_anchor = at is track.baseline[track.anchor]
            if len(values) < SEEDS:
                too = "" if is_anchor else f" that the baseline has at {track.anchor:,} too"
                return f"{SEEDS} seeds are needed, but {whose} has {len(values)} at {steps:,} steps{too}"
            differ |= not is_anchor and float(np.ptp([*values.values()])) > _ROUNDING
    return "" if differ else "all seeds have exactly the same differences"


def log_steps(lengths: Sequence[tuple[Sequence[int], Sequence[int]]], rows: np.ndarray) -> np.ndarray | str:
    """Return the log of the worth in steps for each row, averaged over the arm's lengths; or why there is none.

    lengths: the baseline's and the arm's, for each track; the columns of `rows` are their losses, in this order. The
    first row holds the means, the others are resamples of them.
    """
    ratios, first = [], 0
    for baseline, arm in lengths:
        losses = rows[:, first : first + len(baseline)]
        law = fit(baseline, losses)
        means = ", ".join(f"{loss:.4f} at {steps:,}" for steps, loss in zip(baseline, losses[0], strict=True))
        if np.isnan(law.b[0]):
            return f"no E + a·C^(−b) with a, b > 0 fits the baseline's losses ({means} steps)"
        if (p := misfit(baseline, losses, law)) < MISFIT:
            return f"E + a·C^(−b) misses the baseline's losses ({means} steps) by more than seeds explain, p {p:.3f}"
        first += len(baseline)
        for steps in arm:
            loss, ends = rows[:, first], [law.loss(end)[0] for end in (min(baseline), max(baseline))]
            if not ends[1] <= loss[0] <= ends[0]:
                side = "below" if loss[0] < ends[1] else "above"
                other = "longer" if side == "below" else "shorter"
                return (
                    f"the arm's loss at {steps:,} steps, {loss[0]:.4f}, lies {side} those of the baseline ({means} "
                    f"steps); run a {other} baseline"
                )
            ratios.append(law.log_steps(loss) - np.log(steps))
            first += 1
    return np.asarray(np.mean(ratios, axis=0))


def laws(comparison: Comparison) -> list[Fitted]:
    """Return the laws that some arm's worth rests on, one for each combination of arms that is a baseline."""
    found: dict[Cell, Fitted] = {}
    names = [factor for factor in comparison.design.factors if factor.key != STEPS]
    for effect in comparison.effects:
        if effect.worth is None or effect.worth.steps is None:
            continue
        for track in (track for track in _tracks(comparison, effect) if len(track.baseline) >= LENGTHS):
            label = ", ".join(f"{factor.name} {show(value)}" for factor, value in zip(names, track.where, strict=True))
            steps, count = np.array([*track.baseline]), len(track.baseline)
            losses = _rows([track], [_columns(track, comparison)], {}, 0)[0]
            law = fit([*track.baseline], losses[None, :count])
            of_law = found.setdefault(track.where, Fitted(label, steps, losses[:count], law))
            of_law.arms[f"{short(effect.factor)} {show(effect.arm)}"] = [
                *zip(track.judged, losses[count:].tolist(), strict=True)
            ]
    return [*found.values()]


def _tracks(comparison: Comparison, effect: Effect) -> list[Track]:
    """Return the arm's and the baseline's cells with values, by the other factors' arms and then by length."""
    keys = [factor.key for factor in comparison.design.factors]
    if STEPS not in keys or effect.factor == STEPS:
        return []
    own, length = keys.index(effect.factor), keys.index(STEPS)
    sides: dict[Cell, tuple[dict[int, Chosen], dict[int, Chosen]]] = {}
    for cell, at in comparison.chosen.items():
        steps = finite(cell[length])
        if not at.values or steps is None or steps <= 0 or cell[own] not in (effect.baseline, effect.arm):
            continue
        where = tuple(effect.baseline if i == own else value for i, value in enumerate(cell) if i != length)
        sides.setdefault(where, ({}, {}))[cell[own] == effect.arm][int(steps)] = at
    return [
        Track(where, dict(sorted(baseline.items())), dict(sorted(arm.items())))
        for where, (baseline, arm) in sides.items()
        if baseline and arm
    ]


def _columns(track: Track, comparison: Comparison) -> Columns:
    """Return seed → loss − the baseline's at the anchor, for each of the track's cells; the anchor keeps its loss.

    Pairs thus stay pairs where a length has fewer seeds than the anchor: what a seed does to all runs cancels.
    """
    anchor = track.baseline[track.anchor]
    return [
        {
            seed: value if at is anchor else value - anchor.values[seed]
            for seed, value in at.values.items()
            if seed in anchor.values and comparison.metric.why_not(anchor.units[seed], at.units[seed]) is None
        }
        for _, _, at in track.cells
    ]


def _rows(
    tracks: Sequence[Track], columns: Sequence[Columns], costs: Mapping[Any, float], resamples: int = RESAMPLES
) -> np.ndarray:
    """Return :func:`resampled` losses, a column for each cell of the tracks, and then any costs."""
    every = [values for of_track in columns for values in of_track]
    rows = resampled([*every, costs] if costs else every, resamples)
    first = 0
    for track, of_track in zip(tracks, columns, strict=True):
        anchor = first + [*track.baseline].index(track.anchor)
        others = [i for i in range(first, first + len(of_track)) if i != anchor]
        rows[:, others] += rows[:, [anchor]]
        first += len(of_track)
    return rows


def _log_costs(tracks: Sequence[Track]) -> dict[Any, float] | str:
    """Return seed → log(arm's seconds per step ÷ the baseline's), averaged over the lengths; or why there is none."""
    pairs = [
        (at, track.baseline[steps]) for track in tracks for steps, at in track.judged.items() if steps in track.baseline
    ]
    if not pairs:
        return "the baseline has no runs of the arm's length"
    if (why_not := why_speeds_differ(at for pair in pairs for at in pair)) is not None:
        return why_not
    seconds = [[{seed: _seconds(run) for seed, run in at.runs.items()} for at in pair] for pair in pairs]
    costs = {}
    for seed in seconds[0][0]:
        both = [(ours.get(seed), theirs.get(seed)) for ours, theirs in seconds]
        ratios = [np.log(ours / theirs) for ours, theirs in both if ours is not None and theirs is not None]
        if len(ratios) == len(pairs):
            costs[seed] = float(np.mean(ratios))
    return costs if len(costs) >= SEEDS else f"fewer than {SEEDS} pairs of runs have a speed"


def _seconds(run: Run) -> float | None:
    """Return the seconds of a step."""
    speed, tokens = run.result("tokens_per_second"), run.tokens_per_step
    return tokens / speed if speed and tokens else None
