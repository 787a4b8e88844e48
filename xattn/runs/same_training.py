"""Finished runs that were trained bit for bit as a config asks, and differ only in what was logged or measured.

Such a config needs no training: whatever else it wants measured is measured from the run's last checkpoint.
Importing this module imports no jax.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import xattn.config
from xattn import keys
from xattn.config import Config
from xattn.errors import BadInput, IntegrityError, NotKept, Preempted
from xattn.runs import run_folder
from xattn.runs.evaluations import equal_row, evaluate_once, in_a_line, stored_rows
from xattn.runs.job import Job
from xattn.runs.provenance import changes, other_library, provenance
from xattn.runs.run_folder import result_line, shown
from xattn.system import hosts
from xattn.system.signals import interruption

_Loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

# Folder → training identity, for the run folders read by this process. A folder keeps it: it is named by its config.
_identities: dict[Path, str] = {}


@dataclass(frozen=True)
class Found:
    """A finished run that was trained as a config asks."""

    folder: Path
    summary: dict[str, Any]
    """Its summary.json."""
    overrides: tuple[str, ...]
    """Overrides for ``xattn evaluate`` that measure what the config wants and the run lacks."""
    lacking: tuple[str, ...]
    """KEY=VALUE for each key that asks for rows before the last step, which only another training can produce."""
    data_name: str
    """The corpus or task it was trained on."""


class Trainings:
    """The runs in the studies of some jobs, by training identity.

    Each run's provenance.json, or config.yaml if an older version made it, is read once per process.
    """

    def __init__(self, jobs: Iterable[Job]):
        self._by_study: dict[Path, dict[str, list[Path]]] = {}
        for study in dict.fromkeys(job.folder.absolute().parent for job in jobs):
            found = self._by_study[study] = {}
            for folder in run_folder.runs_in(study):
                if (trained := _identity_of(folder)) is not None:
                    found.setdefault(trained, []).append(folder)

    def find(self, job: Job) -> list[Found]:
        """Return the finished runs that may stand in for the job; the one that lacks the least comes first."""
        if not is_answerable(job):
            return []
        runs = self._by_study[job.folder.absolute().parent].get(identity(job.config), [])
        found = [each for run in runs if (each := _found(run, job.config)) is not None]
        return sorted(found, key=lambda each: (len(each.lacking), len(each.overrides), each.folder))


def identity(config: Config) -> str:
    """Return a hash that is equal for configs that train the same."""
    return keys.training_identity(xattn.config.hashed_values(config))


def is_answerable(job: Job) -> bool:
    """Return whether another run may stand in for the job: not if it has begun or its folder was named by hand."""
    begun = (job.folder / run_folder.CONFIG).is_file()
    is_named_by_us = job.folder.name == xattn.config.run_name(job.config)
    return job.answerable and job.config.resume == "auto" and not begun and is_named_by_us


def answered_by(job: Job, say: Callable[[str], None]) -> Path | None:
    """Find a finished run of the same training that answers for the job, show it, and return its folder.

    Hydra may already have made the job's own folder; it is removed again. A run over several processes is always
    trained: its model may not fit on the single device that would measure it.
    """
    if hosts.place(os.environ).count > 1 or not is_answerable(job) or not (found := Trainings([job]).find(job)):
        return None
    with contextlib.suppress(OSError):  # run() makes it again if needed
        job.folder.rmdir()
    taken = answer(found, say)
    return None if taken is None else taken.folder


def answer(found: Sequence[Found], say: Callable[[str], None]) -> Found | None:
    """Return the first of these runs that answers for a job, after measuring what the job wants measured.

    A run that must be measured is passed over, with a message, if its data have changed or its last checkpoint is
    damaged or was not kept.
    Raises :class:`BadInput` if the wanted measurement does not fit the run, :class:`Preempted` on a request to stop.
    """
    for each in found:
        try:
            said = [_measured(each)] if each.overrides else []
        except (IntegrityError, NotKept) as error:
            say(f"a run of the same training cannot be used: {error}")
            continue
        before = run_folder.read_or_empty(each.folder / run_folder.PROVENANCE)
        changed = changes(before, _here())
        since = f" (changed since then: {', '.join(changed)})" if changed else ""
        say(f"already trained in {shown(each.folder)}: {result_line(each.summary)}{since}")
        if (other := other_library(each.data_name, before)) is not None:
            say(other)
        if each.lacking:
            said.append(
                f"measuring before the last step needs training ({', '.join(each.lacking)}): resume=never trains, in a "
                "folder of its own"
            )
        for line in said:
            say(line)
        return each
    return None


def _measured(found: Found) -> str:
    try:
        with interruption.breaking():
            row, was_there = evaluate_once(found.folder, found.overrides, step=found.summary["step"])
    except KeyboardInterrupt:
        raise Preempted("stopped while measuring; the same command measures it again") from None
    how = "measured before" if was_there else "measured now"
    return f"{how}, with {' '.join(found.overrides)}: {in_a_line(row['results'])}"


def answered(found: Sequence[Found]) -> tuple[Path, dict[str, Any]] | None:
    """Return folder and summary (with all results) of the first run that needs no more measuring; None without one."""
    for each in found:
        if not each.overrides:
            return each.folder, each.summary
        row = equal_row(stored_rows(each.folder), each.summary["step"], each.overrides)
        if row is not None:
            return each.folder, each.summary | row["results"]
    return None


def in_turn(jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """Return the jobs to run now, and the jobs that wait because one of the first trains the same.

    Jobs that are not answerable run now. If a training has none, its job whose rows leave the others the least to do
    runs now.
    """
    groups: dict[tuple[Path, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.folder.absolute().parent, identity(job.config)), []).append(job)
    now = {id(job) for job in jobs if not is_answerable(job)}
    for group in groups.values():
        if not any(id(job) in now for job in group):
            now.add(id(group[0] if len(group) == 1 else min(group, key=lambda job: _leaves(job, group))))
    return [job for job in jobs if id(job) in now], [job for job in jobs if id(job) not in now]


def _leaves(job: Job, group: Sequence[Job]) -> tuple[int, int]:
    """Return how many keys of the group need rows that the job does not produce, and how many overrides to measure."""
    left = [_beyond(job.config, other.config) for other in group]
    return sum(len(lacking) for _, lacking in left), sum(len(overrides) for overrides, _ in left)


# ---- reading ---------------------------------------------------------------------------------------------------------


def _identity_of(folder: Path) -> str | None:
    """Return the folder's training identity; None if its files are unreadable or ask for removed behaviour."""
    if folder in _identities:
        return _identities[folder]
    found = run_folder.read_or_empty(folder / run_folder.PROVENANCE).get("training_identity")
    try:
        if not isinstance(found, str):
            text = (folder / run_folder.CONFIG).read_text("utf-8")
            config = yaml.load(text, _Loader)
            found = keys.training_identity_of(config) if isinstance(config, dict) else None
    except (BadInput, OSError, ValueError, yaml.YAMLError):
        return None
    if found is not None:
        _identities[folder] = found
    return found


def _found(folder: Path, asked: Config) -> Found | None:
    """Return the run; None if it is not done, or if its config turns out to be another training."""
    summary = run_folder.read_or_empty(folder / run_folder.SUMMARY)
    if summary.get("status") != "done":
        return None
    try:
        there = xattn.config.load(folder / run_folder.CONFIG)
    except BadInput:
        return None
    if identity(there) != identity(asked):
        return None
    overrides, lacking = _beyond(there, asked)
    return Found(folder, summary, tuple(overrides), tuple(lacking), asked.data.name)


def _beyond(there: Config, asked: Config) -> tuple[list[str], list[str]]:
    """Return what the config ``asked`` wants and a run of ``there`` lacks: overrides to measure, rows to train."""
    overrides, lacking = [], []
    had, wants = there.evaluation, asked.evaluation
    other_sequences = had.sequences != wants.sequences
    if other_sequences:
        overrides.append(f"evaluation.sequences={wants.sequences}")
    if had.probes != wants.probes if other_sequences else set(wants.probes) - set(had.probes):
        overrides.append(f"evaluation.probes=[{','.join(wants.probes)}]")
    if overrides and asked.trainer.eval_every < asked.trainer.steps:
        lacking += overrides
    stats = asked.trainer.attention_stats_every
    if stats is not None and (other_sequences or there.trainer.attention_stats_every is None):
        overrides.append(f"trainer.attention_stats_every={stats}")
    for key in ("log_every", "eval_every", "attention_stats_every"):
        old, new = getattr(there.trainer, key), getattr(asked.trainer, key)
        moved = key == "attention_stats_every" and other_sequences  # the statistics are of the first sequences
        if new is not None and new < asked.trainer.steps and (old is None or new % old or moved):
            lacking.append(f"trainer.{key}={new}")
    return overrides, lacking


@functools.cache
def _here() -> dict[str, Any]:
    return provenance()
