"""SLURM and Ray jobs: check for a cluster, group runs into jobs, show where jobs write, and requeue them.

Importing this module imports no jax.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xattn.errors import BadInput, first_line
from xattn.runs import run_folder
from xattn.runs.job import Job
from xattn.runs.run_folder import shown
from xattn.sweep.study import by_program
from xattn.system.screen import counted, say

_SLURM, _LOCAL, _RAY = ".SlurmLauncher", ".LocalLauncher", ".RayLauncher"
_SLURM_COMMANDS = ("sbatch", "srun")  # submitit submits a job by the first, and starts its process by the second
_SCONTROL_SECONDS = 60
_ENDING = ("CANCELLED", "COMPLETING")  # after scancel; COMPLETING also if SLURM has begun to requeue the job
_IN_A_PATH = re.compile("%[jtAa]")  # submitit replaces these in a path by the job's id


def check_commands(choice: str, settings: Mapping[str, Any]) -> None:
    """Raise :class:`BadInput` if the launcher submits to SLURM and this machine lacks a command for that.

    ``choice`` is the value of ``hydra/launcher``, and ``settings`` the ``hydra.launcher`` section that it brings.
    """
    missing = [command for command in _SLURM_COMMANDS if shutil.which(command) is None]
    if _target(settings).endswith(_SLURM) and missing:
        raise BadInput(
            f"hydra/launcher={choice}: {' and '.join(missing)} not found on PATH, so this machine cannot submit to "
            "SLURM; to train the runs here, use hydra/launcher=slurm_local or no launcher"
        )


def check_group(runs_per_job: object, settings: Mapping[str, Any]) -> int:
    """Return ``hydra.launcher.runs_per_job``.

    Raise :class:`BadInput` if it is not a positive whole number, or if several runs would share a job of several tasks:
    such a job trains a single run with all its tasks.
    """
    if not isinstance(runs_per_job, int) or isinstance(runs_per_job, bool) or runs_per_job < 1:
        raise BadInput(f"hydra.launcher.runs_per_job = {runs_per_job}: must be a whole number of at least 1")
    inner = _inner(settings)
    tasks = {key: inner[key] for key in ("nodes", "tasks_per_node") if inner.get(key, 1) != 1}
    if runs_per_job > 1 and tasks:
        given = ", ".join(f"hydra.launcher.launcher.{key} = {value}" for key, value in tasks.items())
        raise BadInput(
            f"hydra.launcher.runs_per_job = {runs_per_job}: needs a job of one task, which itself starts one process "
            f"per GPU; got {given}; set them or runs_per_job to 1"
        )
    return runs_per_job


def check_resources(settings: Mapping[str, Any]) -> None:
    """Raise :class:`BadInput` if a Ray task asks for more than any node of the cluster has: Ray would wait for it.

    Start Ray as its launcher would; the launcher then finds it running. Do nothing for other launchers.
    """
    if not _target(settings).endswith(_RAY):
        return
    ray = importlib.import_module("ray")
    cluster = _inner(settings).get("ray") or {}
    try:
        if not ray.is_initialized():
            ray.init(**(cluster.get("init") or {}))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BadInput(f"hydra/launcher=on_ray: no cluster to run on: {first_line(error)}") from error
    asked = _asked(cluster.get("remote") or {})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes):
        return
    most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in asked}
    of_each = ", ".join(f"{name} = {amount:g} (the most on a node: {most[name]:g})" for name, amount in asked.items())
    raise BadInput(
        f"hydra/launcher=on_ray: a task asks for {of_each}, but no node of the cluster has all of that; start such a "
        "node, or ask for less: hydra.launcher.launcher.ray.remote.num_gpus=0 computes on a CPU"
    )


def _asked(remote: Mapping[str, Any]) -> dict[str, float]:
    """Return how much of each resource a task with these options asks for, by Ray's name of the resource."""
    asked = {"CPU": remote.get("num_cpus", 1), "GPU": remote.get("num_gpus"), "memory": remote.get("memory")}
    asked |= remote.get("resources") or {}
    if kind := remote.get("accelerator_type"):
        asked[f"accelerator_type:{kind}"] = 0.001  # Ray gives a node with such a device 1 of this resource
    return {name: float(amount) for name, amount in asked.items() if amount}


def groups(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Split the runs into jobs of ``size`` runs; the last may have fewer. Runs of one program are neighbours."""
    ordered = by_program(jobs) if size > 1 else list(jobs)
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def say_where(handed: Sequence[Sequence[Job]], settings: Mapping[str, Any]) -> None:
    """Print how many runs are handed over, and where they and the jobs that carry them write."""
    runs = [job for group in handed for job in group]
    on_ray = _target(settings).endswith(_RAY)
    to = "Ray" if on_ray else "SLURM" if _target(settings).endswith(_SLURM) else "processes of this machine"
    kind = "task" if on_ray else "job"
    say(f"submitted {counted(len(runs), 'run')} to {to} as {counted(len(handed), kind)}")
    for study in sorted({job.folder.absolute().parent for job in runs}):
        say(f"run folders {shown(study)}/, each with its log.txt")
    if folder := _inner(settings).get("submitit_folder"):
        by_job = Path(_IN_A_PATH.sub("JOB", str(folder))).absolute()
        say(f"job logs    {shown(by_job)}/JOB_0_log.out and JOB_0_log.err, where JOB is the job's number")
    elif on_ray:
        say("task logs   on each node, in /tmp/ray/session_latest/logs/ unless Ray was started with another folder")


def begun_since(moment: str, job: Job) -> bool:
    """Return whether the run in the job's folder began at or after ``moment`` (ISO 8601, UTC).

    ``resume=never`` moves the older run aside once per command: a requeued job resumes.
    """
    origin = run_folder.read_provenance(job.folder) or {}
    return str(origin.get("started_at", "")) >= moment


def resuming(job: Job) -> Job:
    """Return the job with ``resume=auto``."""
    return dataclasses.replace(job, config=job.config.model_copy(update={"resume": "auto"}))


def queue_again() -> None:
    """Have submitit requeue this SLURM job, after a stopped run has been saved; then exit.

    submitit requeues by itself on the signal that SLURM sends ahead of the time limit. This function is for the other
    signals: SIGTERM, with which SLURM preempts, and USR1. Outside of a job that submitit has submitted to SLURM it does
    nothing. If SLURM is ending the job, as after ``scancel``, it only prints a line.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm" or (job := _job_id(os.environ)) is None:
        return
    if (state := _state(job)) in _ENDING:
        say(f"SLURM is ending job {job} ({state}) and does not requeue it; the same command resumes its runs")
        return
    number = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))
    if callable(signal.getsignal(number)):
        signal.raise_signal(number)  # its handler pickles what is left to do, and calls scontrol requeue


def _job_id(environment: Mapping[str, str]) -> str | None:
    """Return the job's id as scontrol takes it. In an array, SLURM_JOB_ID alone may name the whole array."""
    array, task = (environment.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")


def _state(job: str) -> str | None:
    """Return SLURM's name for the job's state; None if SLURM does not report it."""
    command = ["scontrol", "show", "job", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SCONTROL_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"JobState=(\w+)", done.stdout)
    return found[1] if found else None


def without_ids(folder: str) -> str:
    """Cut submitit's folder before the job's id: its local executor would create a folder of the literal name."""
    parts = Path(folder).parts
    named = next((i for i, part in enumerate(parts) if _IN_A_PATH.search(part)), len(parts))
    return str(Path(*parts[:named]))


def is_local(settings: Mapping[str, Any]) -> bool:
    """Return whether the jobs are processes of this machine, started by submitit's local executor."""
    return _target(settings).endswith(_LOCAL)


def _inner(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the cluster's own launcher, which our launcher wraps."""
    return settings.get("launcher") or settings


def _target(settings: Mapping[str, Any]) -> str:
    return str(_inner(settings).get("_target_", ""))
