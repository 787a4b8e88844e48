"""Chooses the setting of the tuned keys (the learning rate) at which a cell is judged, and the seeds that judge it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from xattn.report.design import Cell, Design, Setting, in_order
from xattn.report.metric import Metric, Unit
from xattn.report.read import Run, finite

CHOSEN_BY = "val_loss"
Selection = Literal["same", "heldout"]


@dataclass(frozen=True)
class Candidate:
    """A setting of the tuned keys in one cell."""

    setting: Setting
    losses: Mapping[Any, float]
    """seed → final validation loss"""
    diverged: tuple[Any, ...]
    """the seeds that diverged"""

    def mean(self, seeds: Collection[Any]) -> float | None:
        """Return the mean over those of the seeds that did not diverge."""
        losses = [loss for seed, loss in self.losses.items() if seed in seeds]
        return float(np.mean(losses)) if losses else None

    @property
    def ended(self) -> tuple[Any, ...]:
        """Return the seeds that have a result, including those that diverged."""
        return (*self.losses, *self.diverged)

    def rank(self, seeds: Collection[Any]) -> tuple[float, float]:
        """Return the share of runs with these seeds that diverged, then the others' mean loss; lower is better."""
        losses = [loss for seed, loss in self.losses.items() if seed in seeds]
        diverged = sum(seed in seeds for seed in self.diverged)
        return (diverged / max(1, diverged + len(losses)), float(np.mean(losses)) if losses else np.inf)


@dataclass(frozen=True)
class Chosen:
    """A cell at its chosen setting."""

    cell: Cell
    setting: Setting
    candidates: tuple[Candidate, ...]
    """all of the cell's settings, as the choosing seeds saw them"""
    best: Candidate
    shared: frozenset[Any]
    """the seeds that the candidates were compared on"""
    diverged: tuple[Any, ...]
    """judging seeds with a diverged run"""
    runs: Mapping[Any, Run]
    at_edge: tuple[str, ...]
    """tuned keys for which the smallest or largest of several tried values was chosen"""
    values: Mapping[Any, float] = field(default_factory=dict)
    """seed → metric, for the judging seeds with a finished run that has it"""
    units: Mapping[Any, Unit | None] = field(default_factory=dict)
    """seed → what the value measures"""

    @property
    def ended(self) -> int:
        """Return how many of the runs have a result, including those that diverged."""
        return sum(run.status in ("done", "diverged") for run in self.runs.values())


def split(design: Design, selection: Selection) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the seeds to choose on and those to judge by.

    For ``same`` both are all seeds. For ``heldout``, seeds run with several settings choose and those run with one
    alone judge, as ``sweep.half_width`` makes them; if all have several, the first half chooses and the rest judges.
    Judging by other seeds is a data split: given the choice, the differences are as independent as without one. A t
    interval therefore keeps its coverage, for the difference between the chosen settings.
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
    """Return each cell at the setting with the least mean validation loss over the choosing seeds.

    Its values of the metric are those of the judging seeds. A diverged run is worse than any finite loss, so fewer
    diverged seeds come first. If runs are missing, settings are compared on the seeds that they share; one with less
    than half the seeds of another is skipped. Cells without an ended run are left out.
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
        chosen[cell] = Chosen(
            cell=cell,
            setting=best.setting,
            candidates=candidates,
            best=best,
            shared=frozenset(seeds),
            diverged=tuple(in_order(seed for seed, run in runs.items() if run.status == "diverged")),
            runs=runs,
            at_edge=_at_edge(design.tuned, best.setting, [c.setting for c in in_question]),
        )
    return with_metric(chosen, metric)


def with_metric(chosen: Mapping[Cell, Chosen], metric: Metric) -> dict[Cell, Chosen]:
    """Return the same settings and runs, with their values of another metric."""
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
    """Return what a wrong learning rate costs: the mean over the grid of min(ℓ, ℓ₀) − min ℓ.

    ℓ is a setting's mean validation loss over the seeds that settings were compared on. A diverged run counts as ℓ₀,
    its first logged training loss (Wortsman et al., arXiv 2309.14322, section 2.2). Only cells with the same grid are
    comparable. None with fewer than two settings, or if a run has not logged.
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
    """Return the settings to choose among, and the seeds to choose by."""
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
