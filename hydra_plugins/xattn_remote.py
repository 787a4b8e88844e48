"""The launcher of ``hydra/launcher=slurm``, ``slurm_local`` and ``on_ray``: runs go to submitit's or Ray's launcher.

Hydra finds plugins only in this package; the logic is in xattn.sweep.cluster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import subprocess
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.xattn_launcher import (
    Asked,
    XattnLauncher,
    composed_jobs,
    each_once,
    environment,
    loader,
    plan_of,
)
from xattn import registry
from xattn.errors import BadInput, ExitCode, XattnError, first_line
from xattn.runs.job import Job
from xattn.sweep import cluster, study, workers
from xattn.sweep.packing import is_finished
from xattn.sweep.planned import Plan
from xattn.system import entry
from xattn.system.signals import interruption

Numbered = tuple[int, list[str]]  # a run's number in the sweep, and its overrides


class Handed:
    """The task of a launcher's job: one run, by the task of :func:`hydra.main`, or a group of runs.

    The user's registrations are pickled with it, and repeated where it is unpickled.

    groups: job number → its runs. at: when the runs were handed over.
    """

    def __init__(self, context: HydraContext, config: DictConfig, task: TaskFunction):
        self.additions, self.task = registry.additions(), task
        self.context, self.config = context, config
        self.groups: dict[int, list[Numbered]] = {}
        self.at = datetime.now(UTC).isoformat(timespec="seconds")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for addition in self.additions:
            addition.repeat()

    def __call__(self, config: DictConfig) -> object:
        group = self.groups[HydraConfig.get().job.num]
        try:
            code = self._make_one(config, group) if len(group) == 1 else self._make(group)
            if code == ExitCode.PREEMPTED:
                cluster.queue_again()
        except (subprocess.SubprocessError, OSError) as error:  # from scontrol, which submitit's handler calls
            entry.tell(f"the job was not requeued: {first_line(error)}; the same command resumes its runs")
            return ExitCode.PREEMPTED
        return code

    def _make_one(self, config: DictConfig, group: Sequence[Numbered]) -> object:
        if config.resume == "never" and all(cluster.begun_since(self.at, job) for job, _ in self._asked(group)):
            config.resume = "auto"
        return self.task(config)

    def _make(self, group: Sequence[Numbered]) -> ExitCode:
        """Execute the runs like a sweep on one machine: with a process for each GPU or core, and in packs."""
        with interruption.listening():
            try:
                asked = self._asked(group)
                jobs = each_once([job for job, _ in asked])
                _take_away_unless_of(jobs, Path(HydraConfig.get().runtime.output_dir))
                jobs = [cluster.resuming(job) if cluster.begun_since(self.at, job) else job for job in jobs]
                if _is_tuned(self.config):
                    jobs = _not_answerable(jobs)
                here = XattnLauncher()
                here.setup(hydra_context=self.context, task_function=self.task, config=self.config)
                outcomes: study.Outcomes = {}
                with here.as_hydra_does(asked, outcomes):
                    outcomes |= workers.run_study(jobs, additions=self.additions)
            except XattnError as error:
                entry.tell(error)
                return error.exit_code
            except SystemExit:
                return ExitCode.PREEMPTED
            except Exception:  # a bug of ours, which Hydra would not show
                traceback.print_exc()
                return ExitCode.ERROR
        return study.exit_code(outcomes.values())

    def _asked(self, group: Sequence[Numbered]) -> list[Asked]:
        setup_globals()
        load = loader(self.context, self.config)
        asked = (composed_jobs(self.context, self.config, [typed], number, load=load) for number, typed in group)
        return list(itertools.chain.from_iterable(asked))


def _take_away_unless_of(jobs: Sequence[Job], made: Path) -> None:
    """Remove the folder that Hydra made for the job, unless one of its runs uses it."""
    if made not in {job.folder.absolute() for job in jobs}:
        with contextlib.suppress(OSError):  # it may hold a log
            made.rmdir()


def _is_tuned(config: DictConfig) -> bool:
    return bool(config.hydra.runtime.choices["hydra/sweeper"] == "optuna")


def _not_answerable(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs so that no other run stands in for them: a tuner needs a run for each trial."""
    return [dataclasses.replace(job, answerable=False) for job in jobs]


class ElsewhereLauncher(Launcher):
    """A launcher that validates all jobs, skips finished ones, and hands the rest to the launcher of SLURM or Ray.

    Results are read from the run folders. launcher: the one of SLURM or Ray. runs_per_job: how many runs one of its
    jobs executes, like a sweep on one machine. planned: see :class:`XattnLauncher`.
    """

    planned: Sequence[Job] = ()

    def __init__(self, launcher: Launcher, runs_per_job: int = 1):
        self.launcher, self._runs_per_job = launcher, runs_per_job

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        self._settings = settings_of(config)
        self._runs_per_job = cluster.check_group(self._runs_per_job, self._settings)
        self._handed = Handed(hydra_context, config, task_function)
        if self._runs_per_job > 1:  # callbacks are called for each run, not for the job
            hydra_context = HydraContext(config_loader=hydra_context.config_loader, callbacks=Callbacks())
        self.launcher.setup(hydra_context=hydra_context, task_function=self._handed, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        asked = composed_jobs(self.context, self.config, job_overrides, initial_job_idx)
        if self._runs_per_job > 1:
            with environment(asked):
                pass  # they can share a process
        typed: dict[Path, Numbered] = {
            job.folder: (number, list(overrides))
            for number, ((job, _), overrides) in enumerate(zip(asked, job_overrides, strict=True), initial_job_idx)
        }
        jobs = each_once([job for job, _ in asked])
        if (half_width := jobs[0].config.sweep.half_width) is not None:
            raise BadInput(
                f"sweep.half_width = {half_width:g}: only the machine that trains the runs can add seeds; omit "
                "hydra/launcher, or give seeds instead"
            )
        if not all(map(is_finished, jobs)):
            cluster.check_resources(self._settings)

        def launch(unfinished: Sequence[Job]) -> None:
            groups = cluster.groups(unfinished, self._runs_per_job)
            runs = ([typed[job.folder] for job in group] for group in groups)
            self._handed.groups = dict(enumerate(runs, initial_job_idx))
            cluster.say_where(groups, self._settings)
            self.launcher.launch([typed[group[0].folder][1] for group in groups], initial_job_idx)

        plan: Plan | None = plan_of(self.planned)
        if _is_tuned(self.config):
            jobs = _not_answerable(jobs)
            plan = None  # the tuner has its own plan
        outcomes = study.run_study_elsewhere(jobs, launch, plan)
        return [
            JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=outcomes.get(job.folder))
            for job in jobs
        ]


def settings_of(config: DictConfig) -> Mapping[str, Any]:
    """Return ``hydra.launcher``, resolved."""
    settings = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}
