"""The launcher of ``python train.py -m``. Hydra finds plugins in this package only; the logic is in xattn.sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

import xattn.config
from xattn.errors import BadInput, ExitCode
from xattn.sweep.study import Job, carry_out


class XattnLauncher(Launcher):
    """Validates every job before the first starts, then carries them out in this process, one program at a time."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        composed: dict[Path, DictConfig] = {}
        jobs: list[Job] = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            typed = filter_overrides(overrides)
            try:
                validated = xattn.config.from_hydra(config)
            except BadInput as error:
                raise BadInput(f"of {len(job_overrides)} runs none is started: {error}") from error
            folder = Path(OmegaConf.select(config, "hydra.sweep.dir"), OmegaConf.select(config, "hydra.sweep.subdir"))
            if folder not in composed:
                jobs.append(Job(validated, folder, tuple(typed)))
            composed[folder] = config
        returns: dict[Path, JobReturn] = {}

        def start(job: Job) -> ExitCode:
            state = Singleton.get_state()
            returned = run_job(
                hydra_context=self._context,
                task_function=self._task,
                config=composed[job.folder],
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
            Singleton.set_state(state)
            returns[job.folder] = returned
            code: ExitCode = returned.return_value
            return code

        carry_out(jobs, start)
        was_there = JobReturn(_return_value=ExitCode.DONE, status=JobStatus.COMPLETED)
        return [returns.get(job.folder, was_there) for job in jobs]
