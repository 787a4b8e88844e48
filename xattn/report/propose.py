"""The command that reports on a sweep's own runs and leaves out what else their folder holds."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from xattn.keys import SEED, changes_training, show
from xattn.report.design import in_order
from xattn.report.read import read_config
from xattn.runs import run_folder


def report_command(study: Path, runs: Collection[Path]) -> str:
    """Return ``xattn report STUDY`` with the ``--where KEY=VALUE`` and ``--seeds`` needed to select only these runs.

    Other runs with the same values of every key cannot be distinguished from these, and stay included.
    """
    words = ["xattn", "report", run_folder.shown(study.absolute())]
    ours = {run.absolute() for run in runs}
    others = [read_config(run, []) for run in run_folder.runs_in(study) if run.absolute() not in ours]
    values = _values([config for run in ours if (config := read_config(run, []))]) if others else {}
    while others and values:
        alike = {key: [each for each in others if each.get(key) in own] for key, own in values.items()}
        key = min(alike, key=lambda key: len(alike[key]))
        if len(alike[key]) == len(others):
            break
        others = alike[key]
        typed = ",".join(map(show, in_order(values.pop(key))))
        words += ["--seeds", typed] if key == SEED else ["--where", f"{key}={typed}"]
    return shlex.join(words)


def _values(configs: Collection[Mapping[str, Any]]) -> dict[str, set[Any]]:
    """Return key → the configs' values, for keys with values that can be typed."""
    keys = dict.fromkeys(key for config in configs for key in config if changes_training(key, config))
    found = {key: {config.get(key) for config in configs} for key in keys}
    return {key: values for key, values in found.items() if not any("," in show(value) for value in values)}
