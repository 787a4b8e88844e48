"""A study: runs that answer one question, trained in this process so that they share compiled programs."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shlex
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xattn.config
from xattn.errors import ExitCode, FolderInUse, Preempted, StorageError, XattnError
from xattn.runs import run_folder
from xattn.runs.desk import run_pack
from xattn.runs.job import Job
from xattn.runs.run_folder import shown
from xattn.runs.same_training import Trainings, answer, answered, in_turn
from xattn.sweep.labels import Label, labels, varying_keys
from xattn.sweep.packing import is_finished, summary_of, take_pack
from xattn.sweep.planned import Plan
from xattn.sweep.table import loss_of, print_table
from xattn.sweep.view import StudyView, runs_to_go
from xattn.system import entry
from xattn.system.screen import say
from xattn.system.signals import interruption

_POLL_SECONDS = 1.0

Outcomes = dict[Path, ExitCode]
"""Run folder → the outcome of its last attempt. A study fills it in as runs end."""
_ENDED_WELL = {ExitCode.DONE, ExitCode.DIVERGED, ExitCode.IN_USE}  # IN_USE: another process trained the run


def exit_code(codes: Iterable[ExitCode]) -> ExitCode:
    """Return the exit code of a sweep: done if every run is done, pruned or diverged, or in use by another process."""
    found = set(codes)
    if ExitCode.PREEMPTED in found:
        return ExitCode.PREEMPTED
    return ExitCode.DONE if found <= _ENDED_WELL else ExitCode.ERROR


def start(jobs: Sequence[Job]) -> list[ExitCode]:
    """Train the runs of one pack. Here an error ends a run, and not the study.

    A refused pack is halved, until only the runs at fault are refused, and too large a pack fits in memory.
    """
    try:
        return run_pack(jobs, stop=lambda: interruption.requested, quiet=True)
    except FolderInUse as error:
        return [error.exit_code] * len(jobs)
    except XattnError as error:
        if len(jobs) > 1 and not isinstance(error, StorageError):
            half = len(jobs) // 2
            return start(jobs[:half]) + start(jobs[half:])
        entry.tell(error)
        return [error.exit_code] * len(jobs)
    except Exception:  # anything that run_pack() does not catch is our own fault
        traceback.print_exc()
        return [ExitCode.ERROR] * len(jobs)


@contextlib.contextmanager
def table_at_the_end(jobs: Sequence[Job], outcomes: Outcomes, plan: Plan | None = None) -> Iterator[None]:
    """Print the table of all runs at the end, however the study ends, and how to continue it.

    ``jobs`` may grow until then. ``plan`` is the command's; it is updated with the jobs that another run answers for.
    """
    try:
        yield
    except SystemExit:
        resumes = sorted({f"xattn resume {shlex.quote(shown(job.folder.absolute().parent))}" for job in jobs})
        if plan is None or len(resumes) != 1:
            say("stopped; the same command continues with the unfinished runs")
        else:
            say("stopped; the same command continues with the unfinished runs, and so does", resumes[0])
        raise
    finally:
        asked = {job.folder: job.config for job in jobs}
        by_others = answers(jobs, outcomes)
        if plan is not None:
            plan.answered(by_others)
            plan.write()
        print_table(list(asked), varying_keys(list(asked.values())), asked, by_others)
    if jobs:
        from xattn.report.propose import report_command  # imported late: scipy would slow the start

        studies: dict[Path, list[Path]] = {}
        for folder in asked:
            run = by_others[folder][0] if folder in by_others else folder
            studies.setdefault(run.absolute().parent, []).append(run)
        for study, runs in studies.items():
            say("for a report on them:", report_command(study, runs))


def train_each_once(jobs: Sequence[Job], outcomes: Outcomes, *, start_at: float = 0.0) -> None:
    """:func:`make` the runs, without jobs that need no training.

    A job needs none if a finished run, older or of this study, was trained bit for bit as the job asks
    (:mod:`xattn.runs.same_training`); what it wants measured is then measured from that run. If several jobs share a
    training, the first is made, and the next only if that one failed. For ``start_at`` see :func:`make`.
    """
    label, left, missing = labels(jobs), list(jobs), {job.folder for job in to_be_made(jobs)}
    with StudyView(len(jobs), len(jobs) - len(missing)) as view:
        while left:
            trainings = Trainings(left)
            unanswered = []
            for job in left:
                if is_answered(job, trainings, outcomes, label, view.say):
                    if job.folder in missing:  # else it was counted from the start
                        view.found(failed=outcomes[job.folder] != ExitCode.DONE)
                else:
                    unanswered.append(job)
            now, left = in_turn(unanswered)
            make(now, outcomes, view, label, loss_of([job.config for job in now]), start_at=start_at)
            if interruption.requested and left:
                raise SystemExit(ExitCode.PREEMPTED)


def to_be_made(jobs: Sequence[Job]) -> list[Job]:
    """Return the unfinished jobs that no finished run of the same training answers for completely."""
    unfinished = [job for job in jobs if not is_finished(job)]
    trainings = Trainings(unfinished)
    return [job for job in unfinished if answered(trainings.find(job)) is None]


def is_answered(
    job: Job,
    trainings: Trainings,
    outcomes: Outcomes,
    label: Label,
    say: Callable[[str], None],
    *,
    measures: bool = True,
) -> bool:
    """Return whether a finished run of the same training answers for the job, and record that in ``outcomes``.

    It is also True if measuring failed. Without ``measures``, only runs that have everything already are considered.
    """
    found = [each for each in trainings.find(job) if measures or not each.overrides]
    lines: list[str] = []
    code = ExitCode.DONE
    try:
        if answer(found, lines.append) is None:
            return False
    except Preempted:
        raise SystemExit(ExitCode.PREEMPTED) from None
    except XattnError as error:
        entry.tell(error)
        code = error.exit_code
    except Exception:  # our own fault ends this job and not the study
        traceback.print_exc()
        code = ExitCode.ERROR
    finally:
        for line in lines:
            say(f"  {label(job)}: {line}")
    outcomes[job.folder] = code
    return True


def answers(jobs: Sequence[Job], outcomes: Outcomes) -> dict[Path, tuple[Path, dict[str, Any]]]:
    """Return the folder and summary of the answering run, for each job that a run of the same training answered for."""
    asked = [job for job in jobs if outcomes.get(job.folder) == ExitCode.DONE and not is_finished(job)]
    trainings = Trainings(asked)
    found = {job.folder: answered(trainings.find(job)) for job in asked}
    return {folder: answer for folder, answer in found.items() if answer is not None}


def make(
    jobs: Sequence[Job], outcomes: Outcomes, view: StudyView, label: Label, metric: str, *, start_at: float = 0.0
) -> None:
    """Train the jobs. Runs of one program follow each other in the order given, or train as a pack.

    If another process is training a run, wait for it, and take the run over if that process dies. If a run fails, here
    or there, report it and continue with the others. ``metric`` is the loss shown for each run that ends. ``start_at``
    is where to start, from 0 to 1, so that processes that share a study compile different programs.
    """
    waiting_for: set[Path] = set()
    jobs = [dataclasses.replace(job, watch=(*job.watch, view)) for job in jobs]
    unfinished = [job for job in jobs if not is_finished(job)]
    queue = deque(by_program(unfinished))
    queue.rotate(-int(start_at * len(queue)))
    failures = {job.folder: summary_of(job).get("failures") for job in queue}
    while queue:
        if summary_of(queue[0]).get("failures") not in (None, failures[queue[0].folder]):  # try once per sweep
            outcomes[queue[0].folder] = ExitCode.ERROR
            view.ended(label(queue.popleft()), "failed in another process", failed=True)
            continue
        if queue[0].folder in waiting_for:
            if is_finished(queue[0]):
                view.ended(label(queue.popleft()), "done by another process")
                continue
            if all(job.folder in waiting_for for job in queue):
                time.sleep(_POLL_SECONDS)  # nothing else is left to do
        pack = take_pack(queue, jobs)
        at_work = [job for job in pack if not is_finished(job)]
        begins_at = max(map(_saved_step, at_work), default=0)
        view.began([label(job) for job in at_work], pack[0].config.trainer.steps, begins_at)
        outcomes.update(zip((job.folder for job in pack), start(pack), strict=True))
        for job in at_work:
            code = outcomes[job.folder]
            if code == ExitCode.PREEMPTED:
                view.say(f"  {label(job)}: stopped at step {_saved_step(job)} and saved")
                continue
            if code != ExitCode.IN_USE:
                view.ended(label(job), _outcome(job, code, metric), failed=code not in _ENDED_WELL)
                continue
            if job.folder not in waiting_for:
                view.say(f"  {label(job)}: another process is training it")
            waiting_for.add(job.folder)
            queue.append(job)
        if interruption.requested and (queue or ExitCode.PREEMPTED in outcomes.values()):
            raise SystemExit(ExitCode.PREEMPTED)


def by_program(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs with those of one program together, and otherwise in the order given."""
    programs: dict[str, list[Job]] = {}
    for job in jobs:
        programs.setdefault(xattn.config.program_key(job.config), []).append(job)
    return list(itertools.chain.from_iterable(programs.values()))


def run_study_elsewhere(
    jobs: Sequence[Job], launch: Callable[[Sequence[Job]], None], plan: Plan | None = None
) -> Outcomes:
    """Have ``launch`` train every run that has no result yet, on other machines.

    The outcomes are read from the run folders, which all machines see. ``plan`` is the command's, if it is to be kept.
    """
    outcomes: Outcomes = {}
    unfinished = [job for job in jobs if not is_finished(job)]
    print(runs_to_go(len(jobs), len(jobs) - len(to_be_made(jobs))))
    label, left = labels(jobs), unfinished
    if plan is not None:
        plan.add(jobs)
        plan.write()
    with table_at_the_end(jobs, outcomes, plan):
        try:
            while left:
                trainings = Trainings(left)
                asked_for = [
                    job for job in left if not is_answered(job, trainings, outcomes, label, say, measures=False)
                ]
                now, left = in_turn(asked_for)
                with interruption.breaking():
                    if now:
                        launch(now)
        except KeyboardInterrupt:
            say("the submitted runs continue; they have to be stopped where they run")
            raise SystemExit(ExitCode.PREEMPTED) from None
        except Exception as error:  # the launcher's own; the folders show the outcomes anyway
            entry.tell(traceback.format_exception_only(error)[-1].strip())
        codes = {"done": ExitCode.DONE, "diverged": ExitCode.DIVERGED, "preempted": ExitCode.PREEMPTED}
        trainings = Trainings(unfinished)
        for job in unfinished:
            if answered(trainings.find(job)) is not None:
                outcomes[job.folder] = ExitCode.DONE
                continue
            status = summary_of(job).get("status", "not begun")
            outcomes[job.folder] = codes.get(status, ExitCode.ERROR)
            if outcomes[job.folder] == ExitCode.ERROR:
                log, theirs = job.folder / run_folder.LOG, job.folder.parent / ".submitit"
                where = [f"; see {shown(path)}" for path in (log, theirs) if path.exists()][:1]
                entry.tell(f"{job.folder.name}: {status}{''.join(where)}")
    return outcomes


def _saved_step(job: Job) -> int:
    saved = None if job.config.resume == "never" else summary_of(job).get("committed_step")
    return saved or 0


def _outcome(job: Job, code: ExitCode, metric: str) -> str:
    summary = summary_of(job)
    shown_metric = metric if summary.get(metric) is not None else "val_loss"
    if code in (ExitCode.DONE, ExitCode.DIVERGED) and summary.get(shown_metric) is not None:
        return f"{summary['status']}, {shown_metric} {summary[shown_metric]:.4f}"
    return code.name.lower()
