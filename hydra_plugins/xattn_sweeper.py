"""The sweeper of ``-m``, and ``hydra/sweeper=optuna``. Hydra finds plugins in this package only; the logic of tuning is
in xattn.sweep.tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import InstantiationException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

import xattn.config
from hydra_plugins.xattn_launcher import XattnLauncher, each_once, jobs_of, own_faults
from xattn.errors import BadInput
from xattn.sweep import study
from xattn.sweep.check import check_data
from xattn.sweep.tune import Dimension, Tuning, tune
from xattn.sweep.view import StudyView


def _launcher(context: HydraContext, task: TaskFunction, config: DictConfig) -> Launcher:
    """The chosen launcher. Raises :class:`BadInput` where its library is not installed."""
    try:
        return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ImportError):
            cause = cause.__cause__
        if cause is None:
            raise
        chosen = OmegaConf.select(config, "hydra.runtime.choices")["hydra/launcher"]
        extra = "ray" if "ray" in chosen else "slurm"
        raise BadInput(
            f"hydra/launcher={chosen}: needs the extra {extra} (pip install 'xattn[{extra}]'): {cause}"
        ) from error


class GridSweeper(Sweeper):
    """All combinations, by Hydra's own grammar, in the order in which Hydra's own sweeper has them.

    That one validates each batch when the one before it is done, and leaves a multirun.yaml also where nothing runs.
    """

    def __init__(self, max_batch_size: int | None = None, params: Mapping[str, Any] | None = None):
        self._max_batch_size = max_batch_size
        self._params = [f"{key}={value}" for key, value in (params or {}).items()]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._config = hydra_context, config
        self._launcher = _launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        size = self._max_batch_size
        if size is not None and (not isinstance(size, int) or size < 1):
            raise BadInput(f"hydra.sweeper.max_batch_size = {self._max_batch_size}: must be at least 1, or null")
        parser = OverridesParser.create(config_loader=self._context.config_loader)
        parsed = parser.parse_overrides([*self._params, *arguments])
        batches = BasicSweeper.split_arguments(parsed, self._max_batch_size)
        results: list[Sequence[JobReturn]] = []
        with own_faults():
            if len(batches) > 1:
                each_once(jobs_of(self._context, self._config, [overrides for batch in batches for overrides in batch]))
            for batch in batches:
                results.append(self._launcher.launch(batch, initial_job_idx=sum(map(len, results))))
                for result in results[-1]:
                    _ = result.return_value  # raises what another launcher's job raised
        return results


class OptunaSweeper(Sweeper):
    """Draws trials from a search space, by what the runs before them came to."""

    def __init__(self, params: Mapping[str, Any] | None = None, **options: Any):
        self._params = {str(key): str(value) for key, value in (params or {}).items()}
        self._options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._config = hydra_context, config
        self._launcher = _launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        tuning = xattn.config.section(Tuning, self._options, at="hydra.sweeper")
        typed = {key: f"{key}={value}" for key, value in self._params.items()}
        typed |= {argument.partition("=")[0]: argument for argument in arguments}
        parsed = OverridesParser.create().parse_overrides(list(typed.values()))
        space = {each.key_or_group: _dimension(each) for each in parsed if each.is_sweep_override()}
        self._added = {each.key_or_group for each in parsed if each.is_add()}  # written with a +
        fixed = [each.input_line or "" for each in parsed if not each.is_sweep_override()]
        if not space:
            raise BadInput("hydra/sweeper=optuna: no key has several values; write key=choice(a,b) or interval(a,b)")
        with own_faults():
            self._tune(tuning, space, fixed)

    def _as_typed(self, override: str) -> str:
        return f"+{override}" if override.partition("=")[0] in self._added else override

    def _tune(self, tuning: Tuning, space: Mapping[str, Dimension], fixed: list[str]) -> None:
        base = jobs_of(self._context, self._config, [fixed])[0]
        for key, dimension in space.items():
            choices = dimension.choices or [str(dimension.low)]
            for choice in choices if "." not in key else choices[:1]:
                try:
                    jobs_of(self._context, self._config, [[*fixed, self._as_typed(f"{key}={choice}")]])
                except BadInput as error:  # values that do not fit together are left out later, these are mistyped
                    if isinstance(error.__cause__, xattn.config.COMPOSITION_ERRORS):
                        raise
        if (workers := base.config.sweep.workers) not in ("auto", 1):
            raise BadInput(
                f"sweep.workers = {workers}: a process tunes alone; the same command in {workers} terminals shares the "
                "trials, CUDA_VISIBLE_DEVICES=… a GPU for each"
            )
        if isinstance(self._launcher, XattnLauncher) and not any(key.partition(".")[0] == "data" for key in space):
            check_data([base])

        def plan(trials: list[list[str]], prunes: list[Any]) -> tuple[list[Path], Callable[[StudyView], None]]:
            overrides = [[*fixed, *map(self._as_typed, trial)] for trial in trials]
            asked = jobs_of(self._context, self._config, overrides, prunes=prunes)
            jobs = each_once(asked)

            def make(view: StudyView) -> None:
                if isinstance(self._launcher, XattnLauncher):
                    study.make(jobs, view=view, keys=list(space))
                else:
                    distinct = {job.folder: typed for job, typed in zip(asked, overrides, strict=True)}
                    self._launcher.launch(list(distinct.values()), initial_job_idx=0)

            return [job.folder for job in asked], make

        folder = Path(OmegaConf.select(self._config, "hydra.sweep.dir"))
        tune(tuning, space, base.config, folder, plan)


def _dimension(override: Override) -> Dimension:
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return Dimension(choices=[Override._get_value_element_as_str(choice) for choice in value.list])
    log = "log" in getattr(value, "tags", ())
    if isinstance(value, RangeSweep):
        return Dimension(choices=[str(number) for number in value.range()])
    if not isinstance(value, IntervalSweep):
        raise BadInput(f"{override.input_line}: hydra/sweeper=optuna takes choice(…), range(…) and interval(…)")
    assert value.start is not None
    assert value.end is not None
    return Dimension(low=value.start, high=value.end, log=log)
