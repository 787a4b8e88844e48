"""The sweeper of ``-m``, and ``hydra/sweeper=optuna``. Hydra finds plugins in this package only; the logic of tuning is
in xattn.sweep.tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.xattn_launcher import XattnLauncher, jobs_of
from xattn.errors import BadInput
from xattn.sweep import study
from xattn.sweep.tune import Dimension, Tuning, tune


class GridSweeper(BasicSweeper):
    """Hydra's own, which composes every job's config only to see that it can be; the launcher does it once more, and
    for many runs that are done that is all the time there is."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        pass


class OptunaSweeper(Sweeper):
    """Draws trials from a search space, by what the runs before them came to."""

    def __init__(self, params: Mapping[str, Any] | None = None, **options: Any):
        self._params = {str(key): str(value) for key, value in (params or {}).items()}
        self._options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._config = hydra_context, config
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        tuning = Tuning.model_validate(self._options)
        typed = {key: f"{key}={value}" for key, value in self._params.items()}
        typed |= {argument.partition("=")[0]: argument for argument in arguments}
        parsed = OverridesParser.create().parse_overrides(list(typed.values()))
        space = {each.key_or_group: _dimension(each) for each in parsed if each.is_sweep_override()}
        fixed = [each.input_line or "" for each in parsed if not each.is_sweep_override()]
        if not space:
            raise BadInput("hydra/sweeper=optuna: no key has several values; write key=choice(a,b) or interval(a,b)")
        base = jobs_of(self._context, self._config, [fixed])[0]

        def make(trials: list[list[str]], prunes: list[Any]) -> list[Path]:
            jobs = jobs_of(self._context, self._config, [[*fixed, *trial] for trial in trials], prunes=prunes)
            if isinstance(self._launcher, XattnLauncher):
                study.make(jobs)
            else:
                self._launcher.launch([[*fixed, *trial] for trial in trials], initial_job_idx=0)
            return [job.folder for job in jobs]

        folder = Path(OmegaConf.select(self._config, "hydra.sweep.dir"))
        tune(tuning, space, fixed, base.config, folder, make)


def _dimension(override: Override) -> Dimension:
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return Dimension(choices=[Override._get_value_element_as_str(choice) for choice in value.list])
    log = "log" in getattr(value, "tags", ())
    if isinstance(value, RangeSweep):
        return Dimension(choices=[str(number) for number in value.range()])
    assert isinstance(value, IntervalSweep)
    assert value.start is not None
    assert value.end is not None
    return Dimension(low=value.start, high=value.end, log=log)
