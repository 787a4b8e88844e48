"""Run a sweep with several processes on this machine, each with its own GPU or CPU core.

Every process runs the whole study (:mod:`xattn.sweep.study`), and the locks of the run folders divide the work, just as
they do if a user types the same command in two terminals. Importing this module imports no jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from xattn.errors import BadInput, ExitCode, FolderInUse
from xattn.registry import Addition
from xattn.runs import run_folder
from xattn.runs.job import Job
from xattn.runs.record import move_older_aside
from xattn.sweep import study
from xattn.sweep.check import check_data, check_devices
from xattn.sweep.labels import labels
from xattn.sweep.packing import is_finished, summary_of
from xattn.sweep.planned import Plan
from xattn.sweep.study import Outcomes
from xattn.sweep.view import StudyView
from xattn.system.device import compute_with, environment
from xattn.system.screen import say
from xattn.system.signals import interruption

_POLL_SECONDS = 0.5
# The first process asks the others to save and leave by this signal. SLURM signals every process of a job, so they may
# have been asked before: a second SIGTERM would end them immediately, unsaved, while a repeated USR1 has no effect.
_REQUEST = signal.SIGUSR1


class Seat(NamedTuple):
    """The GPU or CPU core that one of the processes has to itself, if any."""

    gpu: str | None = None
    """Its name in CUDA_VISIBLE_DEVICES."""
    core: int | None = None


def run_study(jobs: Sequence[Job], plan: Plan | None = None, additions: Sequence[Addition] = ()) -> Outcomes:
    """Run :func:`xattn.sweep.study.run_study` by as many processes as ``sweep.workers`` says; see :func:`train_all`."""
    outcomes: Outcomes = {}
    train_all(jobs, outcomes, plan, additions, around=study.table_at_the_end(jobs, outcomes, plan))
    return outcomes


def train_all(
    jobs: Sequence[Job],
    outcomes: Outcomes,
    plan: Plan | None = None,
    additions: Sequence[Addition] = (),
    *,
    around: contextlib.AbstractContextManager[None] = contextlib.nullcontext(),  # noqa: B008  # has no state
) -> None:
    """Train every run that has no result yet.

    Args:
        plan: the command's plan; it is written once every run is accepted.
        additions: what each process registers. They are needed if this process was not started with the user's script,
            since the others then do not import it.
        around: entered once every run is accepted.

    Raise :class:`BadInput`, and start nothing, if one of the runs cannot be made.
    """
    unfinished = [job for job in jobs if not is_finished(job)]
    check_data(unfinished)
    unfinished = study.to_be_made(unfinished)
    seats_for = {threads: seats(group) for threads, group in _by_threads(unfinished).items()}
    if sum(map(len, seats_for.values())) <= 1:
        for threads in seats_for:
            compute_with(threads)
        check_devices(unfinished)
        _keep(plan, jobs)
        with around:
            study.train_each_once(jobs, outcomes)
        return
    if all(seat.gpu is None for each in seats_for.values() for seat in each):
        check_devices(unfinished)  # looking at a GPU would take it
    _keep(plan, jobs)
    jobs = [_started_over(job) for job in jobs]
    with around:
        for threads, group in _by_threads(jobs).items():
            if threads in seats_for:
                _train_in_processes(group, study.to_be_made(group), seats_for[threads], additions, outcomes)


def _keep(plan: Plan | None, jobs: Sequence[Job]) -> None:
    if plan is not None:
        plan.add(jobs)
        plan.write()


def _by_threads(jobs: Sequence[Job]) -> dict[int | None, list[Job]]:
    """Group the jobs by ``trainer.threads``: a process cannot change its number of threads."""
    groups: dict[int | None, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.config.trainer.threads, []).append(job)
    return groups


def seats(unfinished: Sequence[Job]) -> list[Seat]:
    """Return one seat per process: as ``sweep.workers`` says, or for ``auto`` one per GPU, or else one per core if runs
    compute with one thread."""
    trainer, asked = unfinished[0].config.trainer, unfinished[0].config.sweep.workers
    spread = [job.config for job in unfinished if set(job.config.parallel.axes().values()) != {1}]
    if asked == "auto" and (spread or len(unfinished) == 1):
        return [Seat()]
    found = [] if asked == 1 else gpus()
    if found and spread:
        sizes = ", ".join(f"parallel.{axis} = {size}" for axis, size in spread[0].parallel.axes().items() if size != 1)
        raise BadInput(
            f"sweep.workers = {asked}: each worker has one GPU, but a run needs several: {sizes}; allowed: 1, auto"
        )
    each = [Seat(gpu=gpu) for gpu in found]
    if not found and asked == "auto" and trainer.threads == 1:
        each = [Seat(core=core) for core in cores()]
    workers = min(max(1, len(each)) if asked == "auto" else asked, len(unfinished))
    return [each[i % len(each)] if each else Seat() for i in range(workers)]


def cores() -> list[int]:
    """Return the cores that this process may use; none if the system cannot pin a process to a core, as on macOS."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def gpus() -> list[str]:
    """Return the GPUs that jax would use here, by their names in CUDA_VISIBLE_DEVICES, without asking jax: it would
    take them. There are none if jax has no CUDA plugin, or if JAX_PLATFORMS puts another platform first."""
    first, _, _ = os.environ.get("JAX_PLATFORMS", "").partition(",")
    has_plugin = any("cuda" in plugin.name for plugin in importlib.metadata.entry_points(group="jax_plugins"))
    if first not in ("", "cuda", "gpu") or not has_plugin:
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in visible.split(",")]
        return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    cards = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]  # not their MIG parts
    return [str(i) for i in range(len(cards))] if not listed.returncode else []


def _started_over(job: Job) -> Job:
    """For ``resume=never``: move the earlier run aside, and return a job with ``resume=auto`` for the processes."""
    if job.config.resume != "never":
        return job
    while (job.folder / run_folder.CONFIG).is_file():
        try:
            folder = run_folder.RunFolder(job.folder)
        except FolderInUse:
            if interruption.requested:
                raise SystemExit(ExitCode.PREEMPTED) from None
            time.sleep(_POLL_SECONDS)
            continue
        say(f"moved an earlier run to {run_folder.shown(folder.move_aside())}")
        folder.release()
    move_older_aside(job.config, job.folder, print)
    return dataclasses.replace(job, config=job.config.model_copy(update={"resume": "auto"}), answerable=False)


def _train_in_processes(
    jobs: Sequence[Job],
    unfinished: Sequence[Job],
    seats: Sequence[Seat],
    additions: Sequence[Addition],
    outcomes: Outcomes,
) -> None:
    context = multiprocessing.get_context("spawn")
    results, pickled = context.SimpleQueue(), _pickled(jobs, additions)
    processes = []
    for i, seat in enumerate(seats):
        with environment({} if seat.gpu is None else {"CUDA_VISIBLE_DEVICES": seat.gpu}):
            processes.append(context.Process(target=_work, args=(*pickled, results, seat.core, i / len(seats))))
            processes[-1].start()
    label, pending, is_asked = labels(jobs), list(unfinished), False
    with StudyView(len(jobs), len(jobs) - len(unfinished)) as view:
        failures = {job.folder: summary_of(job).get("failures") for job in pending}
        while alive := [process for process in processes if process.is_alive()]:
            running = sum(run_folder.is_held(job.folder) for job in pending)
            view.began(["a run"] * running, 1, title=f"{len(alive)} processes")
            wait([process.sentinel for process in alive], _POLL_SECONDS)
            for job in pending[:]:
                found = summary_of(job)
                failed = found.get("failures") not in (None, failures[job.folder])
                if failed or is_finished(job):
                    pending.remove(job)
                    view.ended(label(job), found["status"], failed=failed)
            if interruption.requested and not is_asked:
                is_asked = True
                for process in alive:
                    if process.pid is not None:
                        os.kill(process.pid, _REQUEST)
            while not results.empty():
                _merge(results.get(), outcomes)
        while not results.empty():
            _merge(results.get(), outcomes)
        answers = study.answers(pending, outcomes)
        for job in pending:
            if job.folder in answers:
                view.say(f"  {label(job)}: already trained in {run_folder.shown(answers[job.folder][0])}")
                view.found()
    if interruption.requested:
        raise SystemExit(ExitCode.PREEMPTED)
    for job in unfinished:
        if not is_finished(job):  # the processes that trained it died
            outcomes.setdefault(job.folder, ExitCode.ERROR)


def _merge(found: Outcomes, outcomes: Outcomes) -> None:
    """Add one process's outcomes to the others'. If a run was in use for that one, another process has trained it."""
    for folder, code in found.items():
        if code != ExitCode.IN_USE or folder not in outcomes:
            outcomes[folder] = code


def _pickled(jobs: Sequence[Job], additions: Sequence[Addition]) -> tuple[bytes, bytes]:
    """Pickle the user's registrations, and the jobs, which need them when they are unpickled.

    With additions both are pickled by value, since the other process does not import the file with their code.
    """
    if not additions:
        return pickle.dumps(()), pickle.dumps(list(jobs))
    cloudpickle = importlib.import_module("cloudpickle")  # submitit and Ray, which bring additions, depend on it
    return cloudpickle.dumps(tuple(additions)), cloudpickle.dumps(list(jobs))


def _work(registered: bytes, pickled_jobs: bytes, results: Any, core: int | None, start_at: float) -> None:
    """Run the study in one of the processes. Its signals come from its parent, never from the terminal."""
    os.setsid()
    signal.signal(_REQUEST, signal.SIG_DFL)  # otherwise it is ignored if the parent ignores it
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the process lives
    if core is not None:
        os.sched_setaffinity(0, {core})
    for addition in pickle.loads(registered):
        addition.repeat()
    jobs = pickle.loads(pickled_jobs)
    outcomes: Outcomes = {}
    with interruption.listening(), contextlib.suppress(SystemExit):
        study.train_each_once(jobs, outcomes, start_at=start_at)
    results.put(outcomes)


def _leave_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), _REQUEST)
    time.sleep(60)
    os._exit(128 + signal.SIGTERM)
