"""The sweepers of ``-m``: grids and ``hydra/sweeper=optuna``. Hydra finds plugins only in this package; the logic of
tuning is in xattn.sweep.tune."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import InstantiationException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf

import xattn.config
from hydra_plugins.xattn_launcher import (
    Asked,
    XattnLauncher,
    composed_jobs,
    each_once,
    environment,
    jobs_of,
    own_faults,
)
from hydra_plugins.xattn_remote import ElsewhereLauncher, settings_of
from xattn.config import Config
from xattn.data.config import MemmapConfig, Tokenised
from xattn.errors import BadInput, ExitCode, needs_extra
from xattn.keys import SEED, TUNED
from xattn.sweep import cluster, study
from xattn.sweep.check import check_data
from xattn.sweep.config import Dimension, Tuning
from xattn.sweep.labels import labels
from xattn.sweep.table import loss_of
from xattn.sweep.view import StudyView


def _launcher(context: HydraContext, task: TaskFunction, config: DictConfig) -> Launcher:
    """Return the chosen launcher.

    Raise :class:`BadInput` if its library is not installed, or if this machine cannot submit to its cluster.
    """
    chosen, settings = OmegaConf.select(config, "hydra.runtime.choices")["hydra/launcher"], settings_of(config)
    try:
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ImportError):
            cause = cause.__cause__
        if cause is None:
            raise
        extra = "ray" if "ray" in chosen else "slurm"
        raise needs_extra(f"hydra/launcher={chosen}", extra, cause) from error
    cluster.check_commands(chosen, settings)
    if cluster.is_local(settings):
        submitit: Any = launcher.launcher if isinstance(launcher, ElsewhereLauncher) else launcher
        submitit.params["submitit_folder"] = cluster.without_ids(submitit.params["submitit_folder"])
    return launcher


def _parsed(context: HydraContext, arguments: Sequence[str]) -> list[Override]:
    """Parse the overrides. Raise :class:`BadInput` for a sweep without values."""
    parsed = OverridesParser.create(config_loader=context.config_loader).parse_overrides(list(arguments))
    for each in parsed:
        try:
            has_values = not each.is_discrete_sweep() or any(True for _ in each.sweep_string_iterator())
        except ValueError as error:
            raise BadInput(f"{each.input_line}: {error}") from error
        if not has_values:
            choices = context.config_loader.get_group_options(each.key_or_group)
            there = f"; allowed: {', '.join(choices)}" if choices else ""
            matched = "matches no choice" if isinstance(each.value(), Glob) else "has no value"
            raise BadInput(f"{each.input_line}: {matched}, so there is nothing to run{there}")
    return parsed


def _sweeps(
    context: HydraContext, config: DictConfig, arguments: Sequence[str]
) -> list[tuple[Mapping[str, str], Sequence[str]]]:
    """Return the sweeps that the arguments ask for: for each, its ``hydra.sweeper.params`` and its arguments.

    Usually there is one. If several choices of a group (``experiment=a,b``) bring their own params, there is one for
    each choice, and the study is all of them. Raise :class:`BadInput` if a choice brings its own launcher or sweeper.
    """
    name, loader = config.hydra.job.config_name, context.config_loader
    of_hydra = OmegaConf.to_container(config.hydra.overrides.hydra)  # unresolved: one may refer to ${hydra.job.num}
    assert isinstance(of_hydra, list)
    swept = [
        each
        for each in _parsed(context, arguments)
        if each.is_discrete_sweep()
        and loader.get_group_options(each.key_or_group, config_name=name, overrides=of_hydra)
    ]
    params, how = _how_it_sweeps(config)
    found: list[tuple[Mapping[str, str], Sequence[str]]] = []
    for values in itertools.product(*(each.sweep_string_iterator() for each in swept)):
        chosen = {
            each.input_line: f"{each.get_key_element()}={value}" for each, value in zip(swept, values, strict=True)
        }
        typed = [chosen.get(argument, argument) for argument in arguments]
        try:
            own, own_how = _how_it_sweeps(loader.load_configuration(name, [*of_hydra, *typed], RunMode.MULTIRUN))
        except xattn.config.COMPOSITION_ERRORS as error:
            raise BadInput(xattn.config.explain(error, typed)) from error
        if own_how != how:
            raise BadInput(
                f"{' '.join(chosen.values())}: has its own launcher or sweeper, but a sweep can have only one; sweep "
                "it with a separate command"
            )
        found.append((own, typed))
    return found if any(own != params for own, _ in found) else [(params, arguments)]


def _how_it_sweeps(composed: DictConfig) -> tuple[dict[str, str], object]:
    """Return ``hydra.sweeper.params``, and the rest of the sweeper's and the launcher's settings."""
    sweeper, launcher = (OmegaConf.to_container(composed.hydra[part]) for part in ("sweeper", "launcher"))
    assert isinstance(sweeper, dict)
    params = sweeper.pop("params", None) and OmegaConf.to_container(composed.hydra.sweeper.params, resolve=True)
    return {str(key): str(value) for key, value in (params or {}).items()}, (sweeper, launcher)


class GridSweeper(Sweeper):
    """Sweeps all combinations, in the grammar and order of Hydra's own sweeper.

    Hydra's validates each batch only when the previous one is done, and leaves a multirun.yaml even if nothing runs.
    ``params`` are read in :meth:`sweep`, since each choice of a group may bring its own.

    With ``one_at_a_time``, the first values of all keys are the baseline, and each other value is an arm that differs
    from it in that key alone. Seeds and learning rates are still combined with every arm.
    """

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: Mapping[str, Any] | None = None,
        one_at_a_time: bool = False,
    ):
        self._max_batch_size, self._one_at_a_time = max_batch_size, one_at_a_time

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._config = hydra_context, config
        self._launcher = _launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        size = self._max_batch_size
        if size is not None and (not isinstance(size, int) or size < 1):
            raise BadInput(f"hydra.sweeper.max_batch_size = {self._max_batch_size}: must be at least 1, or null")
        if not isinstance(self._one_at_a_time, bool):
            raise BadInput(f"hydra.sweeper.one_at_a_time = {self._one_at_a_time}: must be true or false")
        jobs: list[list[str]] = []
        for params, typed in _sweeps(self._context, self._config, arguments):
            parsed = _parsed(self._context, [*(f"{key}={value}" for key, value in params.items()), *typed])
            for each in parsed:
                if each.is_sweep_override() and not each.is_discrete_sweep():
                    raise BadInput(
                        f"{each.input_line}: a grid takes choice(…) and range(…); for an interval, use "
                        "hydra/sweeper=optuna"
                    )
            for grid in _arms(parsed) if self._one_at_a_time else [parsed]:
                jobs += BasicSweeper.split_arguments(grid, None)[0]
        batches = list(BasicSweeper.split_overrides_to_chunks(jobs, size))
        results: list[Sequence[JobReturn]] = []
        with own_faults():
            if len(batches) > 1:
                whole = each_once(jobs_of(self._context, self._config, jobs))
                if isinstance(self._launcher, XattnLauncher | ElsewhereLauncher):
                    self._launcher.planned = whole
            for batch in batches:
                results.append(self._launcher.launch(batch, initial_job_idx=sum(map(len, results))))
                for result in results[-1]:
                    _ = result.return_value  # raises what another launcher's job raised
        _leave_unless_done(self._context, self._config, (result.return_value for batch in results for result in batch))
        return results


def _leave_unless_done(context: HydraContext, config: DictConfig, codes: Iterable[ExitCode | None]) -> None:
    """Raise SystemExit with the sweep's exit code unless all is done; Hydra itself drops what its jobs return."""
    if code := study.exit_code(code for code in codes if code is not None):  # None: finished earlier
        context.callbacks.on_multirun_end(config=config)  # Hydra would call it
        raise SystemExit(code)


def _arms(parsed: Sequence[Override]) -> list[list[Override]]:
    """Return the grids of a sweep that varies one key at a time: the baseline's, and one for each arm."""
    last = {each.key_or_group: each for each in parsed}
    values = {
        key: [f"{each.get_key_element()}={value}" for value in each.sweep_string_iterator()]
        for key, each in last.items()
        if each.is_discrete_sweep() and key not in (SEED, *TUNED)
    }
    baseline = {key: first for key, (first, *_) in values.items()}
    arms = [baseline, *(baseline | {key: other} for key, (_, *others) in values.items() for other in others)]
    parser = OverridesParser.create()
    return [
        [*({**last, **dict(zip(arm, parser.parse_overrides([*arm.values()]), strict=True))}.values())] for arm in arms
    ]


class OptunaSweeper(Sweeper):
    """Draws trials from a search space, guided by earlier results. ``params`` are as in :class:`GridSweeper`."""

    def __init__(self, params: Mapping[str, Any] | None = None, **options: Any):
        self._options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._config = hydra_context, config
        self._launcher = _launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        tuning = xattn.config.section(Tuning, self._options, at="hydra.sweeper")
        sweeps = _sweeps(self._context, self._config, arguments)
        if len(sweeps) > 1:
            raise BadInput(
                f"{' '.join(arguments)}: several choices have their own search space (hydra.sweeper.params); tune each "
                "with a separate command"
            )
        typed = {key: f"{key}={value}" for key, value in sweeps[0][0].items()}
        typed |= {argument.partition("=")[0]: argument for argument in sweeps[0][1]}
        parsed = _parsed(self._context, list(typed.values()))
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
        base, composed = self._base(space, fixed)
        values = xattn.config.hashed_values(base.config)
        space = {key: _whole(each) if type(values.get(key)) is int else each for key, each in space.items()}
        for key, dimension in space.items():
            choices = _values(dimension)
            for choice in choices if "." not in key else choices[:1]:
                try:
                    jobs_of(self._context, self._config, [[*fixed, self._as_typed(f"{key}={choice}")]])
                except BadInput as error:  # mistyped values; those that only clash are left out later
                    if isinstance(error.__cause__, xattn.config.COMPOSITION_ERRORS):
                        raise
        if (half_width := base.config.sweep.half_width) is not None:
            raise BadInput(f"sweep.half_width = {half_width:g}: adds seeds to given arms, but a tuner draws its arms")
        if (workers := base.config.sweep.workers) not in ("auto", 1):
            raise BadInput(
                f"sweep.workers = {workers}: tuning uses one process; to share the trials, run the same command in "
                f"{workers} terminals, each with its own CUDA_VISIBLE_DEVICES=…"
            )
        if isinstance(self._launcher, XattnLauncher):
            with environment([(base, composed)]):
                if not any(key.partition(".")[0] == "data" for key in space):
                    check_data([base])
        if tuning.objective == "auto":
            tuning = tuning.model_copy(update={"objective": self._loss(space, fixed)})
        known = tuning.objective if tuning.objective in ("val_loss", "val_bpb") else None

        outcomes: study.Outcomes = {}

        def plan(trials: list[list[str]], prunes: list[Any]) -> tuple[list[Path], Callable[[StudyView], None]]:
            overrides = [[*fixed, *map(self._as_typed, trial)] for trial in trials]
            asked = composed_jobs(self._context, self._config, overrides, prunes=prunes)
            jobs = each_once([job for job, _ in asked])

            def make(view: StudyView) -> None:
                if isinstance(self._launcher, XattnLauncher):
                    with self._launcher.as_hydra_does(asked, outcomes):
                        metric = known or loss_of([job.config for job in jobs])
                        study.make(jobs, outcomes, view, labels(jobs, list(space)), metric)
                else:
                    distinct = {job.folder: typed for (job, _), typed in zip(asked, overrides, strict=True)}
                    returned = self._launcher.launch(list(distinct.values()), initial_job_idx=0)
                    outcomes.update(zip(distinct, (each.return_value for each in returned), strict=False))

            return [job.folder for job, _ in asked], make

        from xattn.sweep.tune import tune  # imports optuna

        folder = Path(OmegaConf.select(self._config, "hydra.sweep.dir"))
        tune(tuning, space, base.config, folder, plan)
        _leave_unless_done(self._context, self._config, outcomes.values())

    def _base(self, space: Mapping[str, Dimension], fixed: list[str]) -> Asked:
        """Compose the config without the keys of the space, or with a first value of each if it is invalid without."""
        try:
            return composed_jobs(self._context, self._config, [fixed])[0]
        except BadInput:
            first = [self._as_typed(f"{key}={_values(each)[0]}") for key, each in space.items()]
            return composed_jobs(self._context, self._config, [[*fixed, *first]])[0]

    def _loss(self, space: Mapping[str, Dimension], fixed: list[str]) -> str:
        """Return the loss by which all points of the space can be compared.

        Raise :class:`BadInput` if that is bits per byte and a run has none.
        """
        values = {key: _values(each) for key, each in space.items()}
        first = {key: choices[0] for key, choices in values.items()}
        others = [key for key in space if key.startswith("data.") or "." not in key]  # groups, experiments among them
        points = [first, *(first | {key: choice} for key in others for choice in values[key][1:])]
        configs: list[Config] = []
        for point in points:
            with contextlib.suppress(BadInput):  # points with values that clash are left out when drawn
                typed = [self._as_typed(f"{key}={value}") for key, value in point.items()]
                configs.append(jobs_of(self._context, self._config, [[*fixed, *typed]])[0].config)
        metric = loss_of(configs)
        of_text = Tokenised | MemmapConfig
        without = [each.data.name for each in configs if not isinstance(each.data, of_text) or not each.data.tokenizer]
        if metric == "val_bpb" and without:
            raise BadInput(
                f"hydra.sweeper.objective = auto: tokens differ within the space, and data={without[0]} has no bits "
                "per byte to compare them by; tune each with a separate command, or name an objective"
            )
        return metric


def _values(dimension: Dimension) -> list[str]:
    """Return the dimension's choices, or its ends."""
    return dimension.choices or [str(dimension.low), str(dimension.high)]


def _whole(dimension: Dimension) -> Dimension:
    """Return an integer key's dimension with integer ends, if they are whole: Hydra's grammar has them as floats."""
    ends = {"low": int(dimension.low), "high": int(dimension.high)}
    same = ends == {"low": dimension.low, "high": dimension.high}
    return dimension.model_copy(update=ends) if same else dimension


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
