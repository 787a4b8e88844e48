"""Short names for the runs of a study: only the keys that distinguish them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import xattn.config
from xattn.config import Config
from xattn.keys import SEED, TUNED, short, show
from xattn.runs.job import Job

Label = Callable[[Job], str]
_OF_EVERY_ARM = (SEED, *TUNED)  # combined with each arm of a sweep that varies one key at a time


def labels(jobs: Sequence[Job], keys: Sequence[str] | None = None) -> Label:
    """Return a function that names a run, such as ``activation=softmax seed=0``.

    If the jobs vary one key at a time, each is named by the key that it changes: ``conv=4 seed=0``, and
    ``baseline seed=0``. ``keys`` are those to name a run by; None means those that differ between the jobs. A run
    without any of them is named by its folder.
    """
    baseline = None
    if keys is None:
        keys = varying_keys([job.config for job in jobs])
        baseline = baseline_of([_values(job.config) for job in jobs], keys)
    names = short_names(keys)

    def label(job: Job) -> str:
        return arm(_values(job.config), names, baseline) or job.folder.name

    return label


def varying_keys(configs: Sequence[Config]) -> list[str]:
    """Return the keys that differ between the configs, without an mlp_dim that ``model.parameters`` chose."""
    sized = all(config.model.parameters is not None for config in configs)
    return [key for key in xattn.config.varying_keys(configs) if not (sized and key == "model.mlp_dim")]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return a name for each key: without its group, unless two keys would then have the same name."""
    times = Counter(map(short, keys))
    return {key: short(key) if times[short(key)] == 1 else key for key in keys}


def baseline_of(runs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Mapping[str, Any] | None:
    """Return the values of the run that every other run differs from in at most one key, seed and learning rate aside.

    Return None if no run is such a baseline, or if fewer than two keys vary: then none is needed.
    """
    keys = [key for key in keys if key not in _OF_EVERY_ARM]
    arms = list({tuple(repr(run.get(key)) for key in keys): run for run in runs}.values())
    if sum(len({repr(each.get(key)) for each in arms}) > 1 for key in keys) < 2:
        return None
    for one in arms:
        if all(sum(each.get(key) != one.get(key) for key in keys) <= 1 for each in arms):
            return one
    return None


def arm(values: Mapping[str, Any], names: Mapping[str, str], baseline: Mapping[str, Any] | None) -> str:
    """Return ``name=value`` for each key in ``names``; with a baseline, only for seed, rate, and what differs."""
    differs = {key for key in names if baseline is None or values.get(key) != baseline.get(key)}
    words = [
        f"{name}={show(values[key])}"
        for key, name in names.items()
        if key in values and (key in differs or key in _OF_EVERY_ARM)
    ]
    return " ".join([*([] if differs - {*_OF_EVERY_ARM} or baseline is None else ["baseline"]), *words])


def _values(config: Config) -> dict[str, Any]:
    values = xattn.config.hashed_values(config)
    if config.model.parameters is not None:
        del values["model.mlp_dim"]
    return values
