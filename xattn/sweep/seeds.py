"""Seeds on demand: ``sweep.half_width`` adds paired seeds until each difference is known well enough.

This is Stein's two-stage procedure (:mod:`xattn.report.two_stage`): a pilot of seeds for every arm, then as many more
as its spread asks for. The number depends only on the pilot's results and the half-width, so a study that was killed,
or that two terminals share, ends with the same seeds. If learning rates are swept too, they are first chosen for each
arm on separate seeds, which are not used in the comparison. Importing this module imports no jax.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from xattn.errors import BadInput
from xattn.report.answer import Answer, Question
from xattn.report.defaults import conf_defaults
from xattn.report.design import find_design, groups_of
from xattn.report.judge import judge
from xattn.report.read import CURVES, Run, Study, flatten, read_run
from xattn.report.selection import Selection
from xattn.report.statistics import matched
from xattn.report.two_stage import comparisons_of, pilot_size
from xattn.report.words import verdict
from xattn.runs import run_folder
from xattn.runs.job import Job
from xattn.sweep import study
from xattn.sweep.packing import summary_of
from xattn.sweep.planned import Plan
from xattn.sweep.study import Outcomes
from xattn.sweep.workers import seats
from xattn.system.screen import counted, say

TUNING_SEEDS = 4
_AT_ONCE = 8  # seeds added between two looks at the clock

TrainAll = Callable[[Sequence[Job], Outcomes], None]
Compose = Callable[[Sequence[tuple[int, int]]], Sequence[Job]]  # (arm's number, seed) → its job, for each pair


class SeedStudy:
    """A study with as many seeds as it needs.

    arms: one job for each arm, all with the first seed. train_all: trains the runs that have no result yet, and records
    their outcomes. plan: the command's plan; it grows until the last seeds are known.

    Raises :class:`BadInput` if the arms cannot be compared.
    """

    def __init__(self, arms: Sequence[Job], compose: Compose, train_all: TrainAll, plan: Plan):
        self._compose, self._train_all, self._plan, self._began = compose, train_all, plan, time.monotonic()
        self._outcomes: Outcomes = {}
        self._first, self._sweep = _first_seed(arms), arms[0].config.sweep
        comparisons, self._is_tuned = _comparisons(arms)
        self._pilot = self._sweep.pilot_seeds or pilot_size(comparisons)
        self._judged: Collection[int] = range(len(arms))
        self._jobs: dict[tuple[int, int], Job] = {}  # those asked for so far, by arm number and seed

    def run(self) -> Outcomes:
        """Train the study, print a sentence for each comparison, and return the outcomes."""
        jobs: list[Job] = []
        with study.table_at_the_end(jobs, self._outcomes, self._plan):
            try:
                self._run()
            finally:
                jobs += self._jobs.values()
        if self._arm_of():
            for effect in self._found().effects:
                say(f"{effect.factor}: {verdict(effect)}")
        return self._outcomes

    def _run(self) -> None:
        first = self._first
        if self._is_tuned:
            self._add(dict.fromkeys(self._judged, TUNING_SEEDS), first)
            self._judged, first = self._chosen(), first + TUNING_SEEDS
        pilot = dict.fromkeys(self._judged, self._pilot)
        if not self._grow(dict.fromkeys(pilot, 0), pilot, first):
            return
        needed = self._needed()
        if more := max(needed.values()) - self._pilot:
            minutes = self._seconds({arm: count - self._pilot for arm, count in needed.items()}) / 60
            say(f"after {self._pilot} seeds: up to {counted(more, 'more seed')} per arm, about {minutes:.0f} minutes")
        self._plan.grows = more > 0 and self._sweep.budget_minutes is not None  # else the next jobs are the last
        self._plan.grows = not self._grow(pilot, needed, first)

    def _grow(self, made: Mapping[int, int], needed: Mapping[int, int], first: int) -> bool:
        """Train each arm up to ``needed`` seeds, while time is left; return whether it sufficed."""
        while any(made[arm] < needed[arm] for arm in needed):
            least = min(made[arm] for arm in needed if made[arm] < needed[arm])
            if (more := self._seeds_in_time([arm for arm in needed if made[arm] < needed[arm]])) == 0:
                say(f"sweep.budget_minutes = {self._sweep.budget_minutes:g}: time is up; stopped with the seeds so far")
                return False
            made = {arm: max(made[arm], min(needed[arm], least + more)) for arm in needed}
            self._add(made, first)
        return True

    def _add(self, seeds: Mapping[int, int], first: int) -> None:
        """Train the seeds that each arm still lacks up to these numbers."""
        wanted = [(arm, first + i) for i in range(max(seeds.values())) for arm, count in seeds.items() if i < count]
        new = [key for key in wanted if key not in self._jobs]
        for key, job in zip(new, self._compose(new), strict=True):
            sweep = job.config.sweep.model_copy(update={"pilot_seeds": self._pilot})
            self._jobs[key] = dataclasses.replace(job, config=job.config.model_copy(update={"sweep": sweep}))
        self._train_all([self._jobs[key] for key in new], self._outcomes)

    def _found(self, selection: Selection | None = None) -> Answer:
        """Return the report's answer on the runs asked for so far."""
        runs = {run.folder: run for run in map(read_run, dict.fromkeys(self._arm_of()))}
        folder = next(iter(self._jobs.values())).folder.absolute().parent
        assert self._sweep.half_width is not None
        question = Question(selection=selection, two_stage=(self._sweep.half_width, self._pilot))
        return judge(Study(folder, tuple(runs.values())), question)

    def _arm_of(self) -> dict[Path, int]:
        """Return the arm's number for each run folder that exists: the job's own, or that of the same training."""
        answers = study.answers([*self._jobs.values()], self._outcomes)
        found = {}
        for (arm, _), job in self._jobs.items():
            folder = answers[job.folder][0] if job.folder in answers else job.folder
            if (folder / run_folder.CONFIG).is_file():
                found[folder] = arm
        return found

    def _chosen(self) -> list[int]:
        """Return the arms with the best value of what is tuned, one for each combination of the other keys."""
        arm_of = self._arm_of()
        cells = [chosen for each in self._found("same").comparisons for chosen in each.chosen.values()]
        return sorted({arm_of[run.folder] for chosen in cells for run in chosen.runs.values()})

    def _needed(self) -> dict[int, int]:
        """Return how many seeds each arm needs: the most that any of its comparisons asks for."""
        arm_of, needed = self._arm_of(), dict.fromkeys(self._judged, self._pilot)
        for each in self._found().comparisons:
            for factor in each.design.factors:
                for effect in each.of(factor):
                    if effect.stage is None:
                        continue
                    pairs = matched(each.design, each.chosen, factor, effect.arm, each.metric)
                    folders = [run.folder for pair in pairs.cells for side in pair for run in side.runs.values()]
                    for arm in {arm_of[folder] for folder in folders}:
                        needed[arm] = max(needed[arm], effect.stage.needed)
        return needed

    def _seconds(self, seeds: Mapping[int, int]) -> float:
        """Estimate how many seconds that many more seeds of each arm take.

        A run is counted at the median time of its arm, or of all runs if none of the arm has ended yet. The sum is
        divided by the number of runs that train side by side.
        """
        took: dict[int, list[float]] = {}
        for (arm, _), job in self._jobs.items():
            if (seconds := summary_of(job).get("wall_seconds")) is not None:
                took.setdefault(arm, []).append(seconds)
        if not took:
            return 0.0
        of_all = statistics.median(chain.from_iterable(took.values()))
        total = sum(count * (statistics.median(took[arm]) if arm in took else of_all) for arm, count in seeds.items())
        return total / len(seats([*self._jobs.values()]))

    def _seeds_in_time(self, arms: Collection[int]) -> int:
        """Return how many more seeds of each arm may start now. With a budget, it is a few at a time."""
        if self._sweep.budget_minutes is None:
            return sys.maxsize
        left = 60 * self._sweep.budget_minutes - (time.monotonic() - self._began)
        seconds = self._seconds(dict.fromkeys(arms, 1)) if self._jobs else 0.0
        return _AT_ONCE if not seconds else max(0, min(_AT_ONCE, math.floor(left / seconds)))


def _first_seed(arms: Sequence[Job]) -> int:
    seeds = sorted({job.config.seed for job in arms})
    if len(seeds) > 1:
        raise BadInput(
            f"seed = {','.join(map(str, seeds))}: sweep.half_width adds seeds by itself; give only the first, or omit "
            "sweep.half_width"
        )
    return seeds[0]


def _comparisons(arms: Sequence[Job]) -> tuple[int, bool]:
    """Return the number of differences between the arms, and whether something is tuned for each arm."""
    runs = [_not_begun(job) for job in arms]
    designs = [find_design(group.runs, conf_defaults()) for group in groups_of(runs)]
    comparisons = comparisons_of([factor for design in designs for factor in design.factors])
    if not comparisons:
        raise BadInput("sweep.half_width: nothing differs between the runs; give two or more values of a key")
    return comparisons, any(design.tuned for design in designs)


def _not_begun(job: Job) -> Run:
    """Return the job as the report would read it before it begins."""
    config = flatten(job.config.model_dump(mode="json"))
    empty: dict[str, np.ndarray] = {name: np.empty(0) for name in CURVES}
    return Run(job.folder, config, job.overrides, {}, {}, empty, (), "not begun", ())
