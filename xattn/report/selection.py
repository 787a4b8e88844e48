"""Which setting of the tuned keys (the learning rate) each cell is judged at, and by which seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from xattn.report.design import Cell, Design, Setting, in_order
from xattn.report.metric import Metric, Unit
from xattn.report.read import Run, finite

CHOSEN_BY = "val_loss"
Selection = Literal["same", "heldout"]


@dataclass(frozen=True)
class Candidate:
    """A setting of the tuned keys in one cell. losses: seed → final validation loss. diverged: the seeds that did."""

    setting: Setting
    losses: Mapping[Any, float]
    diverged: tuple[Any, ...]

    def mean(self, seeds: Collection[Any]) -> float | None:
        """Over those of the seeds that did not diverge."""
        losses = [loss for seed, loss in self.losses.items() if seed in seeds]
        return float(np.mean(losses)) if losses else None

    @property
    def ended(self) -> tuple[Any, ...]:
        """The seeds that have a result, be it that they diverged."""
        return (*self.losses, *self.diverged)

    def rank(self, seeds: Collection[Any]) -> tuple[float, float]:
        """The less the better: the share of its runs with these seeds that diverged, then the others' mean loss."""
        losses = [loss for seed, loss in self.losses.items() if seed in seeds]
        diverged = sum(seed in seeds for seed in self.diverged)
        return (diverged / max(1, diverged + len(losses)), float(np.mean(losses)) if losses else np.inf)


@dataclass(frozen=True)
class Chosen:
    """A cell at its chosen setting.

    candidates: all of the cell's settings, as the choosing seeds saw them. best: the one chosen. shared: the seeds that
    they were compared on. values: seed → metric, of the judging seeds
    whose run is done and has it. units: what each of them is of. diverged: judging seeds whose run diverged. at_edge:
    tuned keys whose chosen value is the smallest or largest that was tried, of more than one.
    """

    cell: Cell
    setting: Setting
    candidates: tuple[Candidate, ...]
    best: Candidate
    shared: frozenset[Any]
    values: Mapping[Any, float]
    units: Mapping[Any, Unit | None]
    diverged: tuple[Any, ...]
    runs: Mapping[Any, Run]
    at_edge: tuple[str, ...]

    @property
    def ended(self) -> int:
        """How many of the runs have a result, be it that they diverged."""
        return sum(run.status in ("done", "diverged") for run in self.runs.values())


def split(design: Design, selection: Selection) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The seeds to choose on and those to judge by: all and all; or for ``heldout`` those with which several settings
    were run and those with one alone, as ``sweep.half_width`` makes them; where all have several, the first half and
    the others.

    Judging by other seeds is a data split: given the choice, the differences are as independent as without one, so that
    a t interval keeps its coverage, for the difference between the settings that were chosen.
    """
    seeds = tuple(design.seeds)
    if selection == "same" or not design.tuned:
        return seeds, seeds
    counts = [
        Counter(seed for of_setting in settings.values() for seed in of_setting) for settings in design.runs.values()
    ]
    several = {seed for count in counts for seed, settings in count.items() if settings > 1}
    choosing = tuple(seed for seed in seeds if seed in several)
    if len(choosing) == len(seeds):
        choosing = seeds[: len(seeds) // 2]
    return choosing, tuple(seed for seed in seeds if seed not in choosing)


def choose(design: Design, metric: Metric, selection: Selection = "same") -> dict[Cell, Chosen]:
    """For each cell the setting with the least mean validation loss over the choosing seeds, and its values of the
    metric for the judging ones.

    A diverged run is worse than any finite loss, so fewer diverged seeds come first. Where runs are missing, settings
    are compared on the seeds that they share; one with less than half the seeds of another is passed over. Cells in
    which no run has ended are left out.
    """
    choosing, judging = split(design, selection)
    by = replace(metric, name=CHOSEN_BY)
    chosen = {}
    for cell, settings in design.runs.items():
        candidates = tuple(_candidate(setting, runs, choosing, by) for setting, runs in settings.items())
        in_question, seeds = _comparable(candidates)
        if not seeds:
            continue
        best = min(in_question, key=lambda candidate: candidate.rank(seeds))
        runs = {seed: run for seed, run in settings[best.setting].items() if seed in judging}
        results = {seed: found for seed, run in runs.items() if (found := metric.of(run)) is not None}
        chosen[cell] = Chosen(
            cell=cell,
            setting=best.setting,
            candidates=candidates,
            best=best,
            shared=frozenset(seeds),
            values={seed: value for seed, (value, _) in results.items()},
            units={seed: unit for seed, (_, unit) in results.items()},
            diverged=tuple(in_order(seed for seed, run in runs.items() if run.status == "diverged")),
            runs=runs,
            at_edge=_at_edge(design.tuned, best.setting, [c.setting for c in in_question]),
        )
    return chosen


def with_metric(chosen: Mapping[Cell, Chosen], metric: Metric) -> dict[Cell, Chosen]:
    """The same settings and runs, with their values of another metric."""
    found = {}
    for cell, each in chosen.items():
        results = {seed: result for seed, run in each.runs.items() if (result := metric.of(run)) is not None}
        found[cell] = replace(
            each,
            values={seed: value for seed, (value, _) in results.items()},
            units={seed: unit for seed, (_, unit) in results.items()},
        )
    return found


def sensitivity(chosen: Chosen, runs: Mapping[Setting, Mapping[Any, Run]]) -> float | None:
    """How much a wrong learning rate costs: the mean over the grid of min(ℓ, ℓ₀) − min ℓ.

    ℓ is a setting's mean validation loss over the seeds that settings were compared on, where a diverged run counts as
    ℓ₀, its first logged training loss (Wortsman et al., arXiv 2309.14322, section 2.2). Comparable only between cells
    with the same grid. None with fewer than two settings, or where a run has not logged.
    """
    means = []
    for candidate in chosen.candidates:
        losses = []
        for seed in (seed for seed in candidate.ended if seed in chosen.shared):
            logged = runs[candidate.setting][seed].curves["train_loss"]
            start = finite(float(logged[0])) if logged.size else None
            if start is None:
                return None
            losses.append(min(candidate.losses.get(seed, start), start))
        if losses:
            means.append(float(np.mean(losses)))
    return float(np.mean(means) - min(means)) if len(means) > 1 else None


def _candidate(setting: Setting, runs: Mapping[Any, Run], seeds: Sequence[Any], by: Metric) -> Candidate:
    ended = {seed: runs[seed] for seed in seeds if seed in runs}
    losses = {seed: by.value(run) for seed, run in ended.items()}
    return Candidate(
        setting=setting,
        losses={seed: loss for seed, loss in losses.items() if loss is not None},
        diverged=tuple(seed for seed, run in ended.items() if run.status == "diverged"),
    )


def _comparable(candidates: Sequence[Candidate]) -> tuple[list[Candidate], set[Any]]:
    """The settings to choose among, and the seeds to choose by."""
    most = max(len(candidate.ended) for candidate in candidates)
    for share in (0.5, 1.0):
        enough = [candidate for candidate in candidates if len(candidate.ended) >= share * most]
        shared = set.intersection(*(set(candidate.ended) for candidate in enough))
        if shared:
            return enough, shared
    return enough, {seed for candidate in enough for seed in candidate.ended}


def _at_edge(tuned: Sequence[str], best: Setting, settings: Sequence[Setting]) -> tuple[str, ...]:
    found = []
    for i, key in enumerate(tuned):
        values = in_order({setting[i] for setting in settings})
        if len(values) > 1 and best[i] in (values[0], values[-1]):
            found.append(key)
    return tuple(found)
