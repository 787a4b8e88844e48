"""The launcher of ``python train.py -m``. Hydra finds plugins in this package only; the logic is in xattn.sweep."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

import xattn.config
from xattn.attempt import Job, prunes_nothing
from xattn.backend import activations
from xattn.errors import BadInput, ExitCode
from xattn.sweep.study import carry_out_elsewhere, outcomes
from xattn.sweep.workers import carry_out
from xattn.tracking.tracker import Row


class XattnLauncher(Launcher):
    """Validates every job before the first starts, then makes the runs in this process or in one for each GPU."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        jobs = each_once(jobs_of(self.context, self.config, job_overrides, initial_job_idx))
        carry_out(jobs)
        return [
            JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=outcomes.get(job.folder))
            for job in jobs
        ]


class WithActivations:
    """A task that takes the user's own activations along: they are registered where it is unpickled."""

    def __init__(self, rows: Sequence[activations.Activation], task: TaskFunction):
        self.rows, self.task = rows, task

    def __call__(self, config: DictConfig) -> object:
        return self.task(config)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for row in self.rows:
            activations.add(row)


class ElsewhereLauncher(Launcher):
    """Validates every job, skips those that are done, hands the others to a launcher of SLURM or Ray, and reads what
    came of them from the run folders."""

    def __init__(self, launcher: Launcher):
        self._launcher = launcher

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        if own := [row for row in activations.rows() if row.file is not None]:
            task_function = WithActivations(own, task_function)
        self._launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        asked = jobs_of(self.context, self.config, job_overrides, initial_job_idx)
        by_folder = {job.folder: overrides for job, overrides in zip(asked, job_overrides, strict=True)}
        jobs = each_once(asked)

        def launch(unfinished: Sequence[Job]) -> None:
            self._launcher.launch([list(by_folder[job.folder]) for job in unfinished], initial_job_idx)

        if self.config.hydra.runtime.choices["hydra/sweeper"] == "optuna":  # the tuner wants a run for each trial
            jobs = [dataclasses.replace(job, answerable=False) for job in jobs]
        carry_out_elsewhere(jobs, launch)
        return [JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=0) for job in jobs]


def jobs_of(
    context: HydraContext,
    config: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    first: int = 0,
    *,
    prunes: Sequence[Callable[[Row], bool]] | None = None,
) -> list[Job]:
    """The runs that these overrides ask for, one for each. Raises :class:`BadInput` where one of them is bad.

    prunes: for each, what may end it early.
    """
    jobs: list[Job] = []
    for number, overrides in enumerate(job_overrides, first):
        try:
            composed = context.config_loader.load_sweep_config(config, list(overrides))
            with open_dict(composed):
                composed.hydra.job.id = composed.hydra.job.num = number
            validated = xattn.config.from_hydra(composed)
            folder = Path(*(OmegaConf.select(composed, f"hydra.sweep.{part}") for part in ("dir", "subdir")))
            folder = xattn.config.folder_of(validated, folder)
        except (BadInput, *xattn.config.COMPOSITION_ERRORS) as error:
            told = xattn.config.explain(error, overrides)
            none_is = f"of {len(job_overrides)} runs none is started: " if len(job_overrides) > 1 else ""
            raise BadInput(f"{none_is}{told}") from error
        prune = prunes[number - first] if prunes else prunes_nothing
        jobs.append(Job(validated, folder, tuple(filter_overrides(overrides)), prune=prune))
    return jobs


def each_once(jobs: Sequence[Job]) -> list[Job]:
    """Without those that are the same run as another. Raises :class:`BadInput` where two runs have one folder."""
    by_folder: dict[Path, Job] = {}
    for job in jobs:
        other = by_folder.setdefault(job.folder, job)
        if xattn.config.run_hash(other.config) != xattn.config.run_hash(job.config):
            keys = ", ".join(xattn.config.varying_keys([other.config, job.config]))
            raise BadInput(f"{job.folder}: is the folder of runs that differ in {keys}; hydra.sweep.subdir must differ")
    return list(by_folder.values())


@contextlib.contextmanager
def own_faults() -> Iterator[None]:
    """Around what is not composing: train.py would take these for malformed overrides, and they are faults of ours."""
    try:
        yield
    except (ValueError, TypeError):
        traceback.print_exc()
        raise SystemExit(ExitCode.ERROR) from None
