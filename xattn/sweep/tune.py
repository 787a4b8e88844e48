"""Tuning: optuna draws trials, and each trial is an ordinary run. optuna comes with the extra ``tune``.

optuna calls a search a study. It is kept in the folder of the runs, but a trial's run folder is what counts. A trial
whose process died is drawn again with the same values, and its run resumes where it stopped. Several processes may
share one search (:mod:`xattn.sweep.presence`). Importing this module raises :class:`BadInput` if optuna is missing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xattn.config
from xattn.config import Config
from xattn.errors import BadInput, ExitCode, needs_extra
from xattn.keys import naming, naming_before_matmul_precision, renamed, stored_name
from xattn.report.propose import report_command
from xattn.runs import run_folder
from xattn.sweep.config import IN_ROWS, Dimension, Tuning
from xattn.sweep.planned import write_trials
from xattn.sweep.presence import drawing, is_present, present
from xattn.sweep.table import print_table
from xattn.sweep.view import StudyView
from xattn.system import entry
from xattn.system.screen import say
from xattn.system.signals import interruption
from xattn.tracking.tracker import Row

try:
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState
except ImportError as error:
    raise needs_extra("hydra/sweeper=optuna", "tune", error) from error

STORAGE = "tuning.journal"
_POLL_SECONDS = 1.0

# Takes a list of overrides for each trial, and a function for each that may prune its run. Returns the runs' folders,
# where two may be the same, and a function that makes the runs and shows them on the view. Raises BadInput.
Plan = Callable[[list[list[str]], list[Any]], tuple[list[Path], Callable[[StudyView], None]]]


@dataclass(frozen=True)
class _Tuner:
    """A search, and what it was begun for."""

    search: optuna.Study
    tuning: Tuning
    space: Mapping[str, Dimension]
    folder: Path

    @property
    def wanted(self) -> int:
        """The number of trials after which it ends."""
        if self.tuning.sampler != "grid":
            return self.tuning.n_trials
        points = math.prod(len(dimension.choices or ()) for dimension in self.space.values())
        return min(self.tuning.n_trials, points)


def tune(tuning: Tuning, space: Mapping[str, Dimension], base: Config, folder: Path, plan: Plan) -> None:
    """Draw and train trials until ``n_trials`` of this search have ended, and print their table.

    Points that make an invalid config are reported and left out. Raise :class:`BadInput` if no others were drawn.
    ``tuning.objective`` is a number of summary.json here, not ``auto``.
    """
    if base.resume == "never":
        raise BadInput("resume = never: tuning always continues its study; for a new one, give another study=<name>")
    space = {stored_name(key): dimension for key, dimension in space.items()}  # as in the journal
    search = _search(tuning, space, base, folder)
    tuner = _Tuner(search, tuning, space, folder)
    try:
        with present(folder) as me, StudyView(tuner.wanted, len(_over(search))) as view:
            _draw_and_make(tuner, plan, me, view)
    except SystemExit:
        say("stopped; the same command continues with the unfinished trials")
        raise
    finally:
        runs = [folder / t.user_attrs["run"] for t in search.get_trials(deepcopy=False) if "run" in t.user_attrs]
        if runs:
            print_table(list(dict.fromkeys(runs)), [renamed(key) for key in space])
    over = _over(search)
    if finite := [trial for trial in over if trial.value is not None and math.isfinite(trial.value)]:
        complete = [trial for trial in finite if trial.state.name == "COMPLETE"] or finite
        best = (min if tuning.direction == "minimize" else max)(complete, key=lambda trial: trial.value or 0.0)
        values = " ".join(f"{renamed(key)}={value}" for key, value in best.params.items())
        say(f"best of {len(over)} trials: {tuning.objective} {best.value:.4f} with {values}")
    if runs:
        say("for a report on them:", report_command(folder, runs))


def _draw_and_make(tuner: _Tuner, plan: Plan, me: str, view: StudyView) -> None:
    """Draw and train trials until enough have ended. Wait for those of other processes; if one dies, take its over."""
    search, tuning, folder = tuner.search, tuner.tuning, tuner.folder
    distributions = {key: _distribution(key, dimension) for key, dimension in tuner.space.items()}
    failed = 0  # in this process: they do not count as ended, but they limit how many are drawn
    refused: list[str] = []  # reasons; others are drawn in their place, at most as many as there are trials
    with drawing(folder):
        search.sampler = _sampler(tuning, drawn=len(search.get_trials(deepcopy=False)))
        _draw_again(search, folder)
        if tuning.sampler == "grid":
            _enqueue_grid(search, tuner.space)
    while True:
        with drawing(folder):
            _draw_again(search, folder)
            write_trials(folder, tuner.wanted, len(_over(search)))
            elsewhere = len(search.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
            left = tuner.wanted - len(_over(search)) - elsewhere - failed
            if tuning.sampler == "grid":
                left = min(left, len(search.get_trials(deepcopy=False, states=(TrialState.WAITING,))))
            trials = [search.ask(distributions) for _ in range(min(left, tuning.at_once))]
            for trial in trials:
                trial.set_user_attr("by", me)
        if trials:
            failed += _make(tuner, trials, plan, view, refused)
        elif elsewhere:
            time.sleep(_POLL_SECONDS)
        else:
            break
        if len(refused) > tuner.wanted:
            break
        if interruption.requested:
            with drawing(folder):
                write_trials(folder, tuner.wanted, len(_over(search)))
            raise SystemExit(ExitCode.PREEMPTED)
    if refused and not _over(search):
        raise BadInput(refused[0])
    for reason in dict.fromkeys(refused):
        entry.tell(f"left out: {reason}")


def _make(
    tuner: _Tuner,
    trials: Sequence[optuna.Trial],
    plan: Plan,
    view: StudyView,
    refused: list[str],
) -> int:
    """Train the trials; return how many failed. Trials with an invalid config do not count: ``refused`` gets why."""
    overrides = [[f"{renamed(key)}={value}" for key, value in trial.params.items()] for trial in trials]
    try:
        folders, make = plan(overrides, [_pruner_of(trial, tuner.tuning) for trial in trials])
    except BadInput as error:
        if len(trials) > 1:
            return sum(_make(tuner, [trial], plan, view, refused) for trial in trials)
        tuner.search.tell(trials[0], state=TrialState.FAIL)
        refused.append(str(error))
        return 0
    for trial, run in zip(trials, folders, strict=True):
        trial.set_user_attr("run", run.name)
    make(view)
    return sum(not _tell(tuner, trial, run) for trial, run in zip(trials, folders, strict=True))


def _over(search: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return search.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _search(tuning: Tuning, space: Mapping[str, Dimension], base: Config, folder: Path) -> optuna.Study:
    """Return the search for this objective and space, and for everything else in the config that affects a result.

    If any of these differ, it is another search in the same folder.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    dimensions = {key: dimension.model_dump() for key, dimension in space.items()}

    def name_of(values: Mapping[str, Any]) -> str:
        others = {
            key: value
            for key, value in values.items()
            if not any(key == drawn or key.startswith(f"{drawn}.") for drawn in space)
        }
        objective = "val_loss" if tuning.objective == "auto" else tuning.objective  # as in older versions
        question = [objective, tuning.direction, others, dimensions]
        return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:10]

    values = xattn.config.hashed_values(base)
    name, of_before = name_of(naming(values)), naming_before_matmul_precision(values)
    _mend(folder)
    storage = JournalStorage(JournalFileBackend(str(folder / STORAGE)))
    known = optuna.get_all_study_names(storage)
    if name not in known and of_before is not None and name_of(of_before) in known:
        name = name_of(of_before)  # an older version began it, under its own name
    return optuna.create_study(
        storage=storage, study_name=name, direction=tuning.direction, load_if_exists=True, pruner=_pruner(tuning, base)
    )


def _sampler(tuning: Tuning, *, drawn: int) -> optuna.samplers.BaseSampler:
    seed = tuning.seed + drawn  # so that a resumed search does not draw its first points again
    match tuning.sampler:
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, constant_liar=tuning.at_once > 1)
        case "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        case _:
            return optuna.samplers.RandomSampler(seed=seed)


def _pruner(tuning: Tuning, base: Config) -> optuna.pruners.BasePruner:
    match tuning.pruner:
        case "median":
            return optuna.pruners.MedianPruner()
        case "hyperband":
            trainer = base.trainer
            return optuna.pruners.HyperbandPruner(min_resource=trainer.eval_every, max_resource=trainer.steps)
        case _:
            return optuna.pruners.NopPruner()


def _distribution(key: str, dimension: Dimension) -> optuna.distributions.BaseDistribution:
    if dimension.choices is not None:
        return CategoricalDistribution(dimension.choices)
    try:
        if isinstance(dimension.low, int) and isinstance(dimension.high, int):
            return IntDistribution(dimension.low, dimension.high, log=dimension.log)
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    except ValueError as error:
        raise BadInput(f"{key}: from {dimension.low} to {dimension.high}: {error}") from error


def _mend(folder: Path) -> None:
    """Cut off a last line left incomplete by a full disk or a power cut: optuna would always refuse the file."""
    journal = folder / STORAGE
    with drawing(folder):
        if journal.is_file() and not any(is_present(folder, lock.name) for lock in folder.glob(".tuning-*")):
            content = journal.read_bytes()
            if not content.endswith(b"\n"):
                with journal.open("r+b") as file:
                    file.truncate(content.rfind(b"\n") + 1)


def _enqueue_grid(search: optuna.Study, space: Mapping[str, Dimension]) -> None:
    """Enqueue every point of the grid that has not been drawn, or has failed."""
    for key, dimension in space.items():
        if dimension.choices is None:
            raise BadInput(f"{key}: hydra.sweeper.sampler=grid takes choice(…) and range(…), not an interval")
    there = [_params(trial) for trial in search.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]
    for values in itertools.product(*(dimension.choices or () for dimension in space.values())):
        if (point := dict(zip(space, values, strict=True))) not in there:
            search.enqueue_trial(point)


def _draw_again(search: optuna.Study, folder: Path) -> None:
    """Enqueue again the running trials whose process has died. Leave alone those of living processes."""
    for trial in search.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if (by := trial.user_attrs.get("by")) is None or not is_present(folder, by):
            search.tell(trial.number, state=TrialState.FAIL)
            search.enqueue_trial(_params(trial))


def _params(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Return the trial's values. Those of an enqueued trial are known before it is drawn."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def _pruner_of(trial: optuna.Trial, tuning: Tuning) -> Callable[[Row], bool]:
    reported: set[int] = set()

    def prune(row: Row) -> bool:
        value = row.get(IN_ROWS.get(tuning.objective, tuning.objective))
        if tuning.pruner == "none" or value is None or not math.isfinite(value) or row["step"] in reported:
            return False
        reported.add(row["step"])
        trial.report(value, row["step"])
        return trial.should_prune()

    return prune


def _tell(tuner: _Tuner, trial: optuna.Trial, run: Path) -> bool:
    """Report the run's outcome to optuna; return whether the run has ended."""
    tuning, summary = tuner.tuning, run_folder.read_summary(run) or {}
    # Without working locks, another process may have ended it.
    tell = partial(tuner.search.tell, trial, skip_if_finished=True)
    match summary.get("status"):
        case "done":
            if not isinstance(summary.get(tuning.objective), int | float):
                numbers = [key for key, value in summary.items() if isinstance(value, int | float)]
                raise BadInput(
                    f"hydra.sweeper.objective = {tuning.objective!r}: not a number in summary.json; allowed: "
                    f"{', '.join(numbers)}"
                )
            tell(summary[tuning.objective])
        case "pruned":
            tell(state=TrialState.PRUNED)
        case "diverged":
            tell(math.inf if tuning.direction == "minimize" else -math.inf)
        case _:
            tell(state=TrialState.FAIL)
            if interruption.requested:
                tuner.search.enqueue_trial(trial.params)
            return False
    return True
