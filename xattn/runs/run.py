"""A run in a folder: look at the folder first, then train, go on, or show what is there.

Importing this module imports no jax, so that "already done" and "in use" are answered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xattn.config
from xattn.config import Config
from xattn.errors import BadInput, ExitCode, storage_error
from xattn.runs import run_folder
from xattn.runs.attempt import Attempt
from xattn.runs.job import Job
from xattn.runs.pack import Pack
from xattn.runs.provenance import changes, other_library, provenance, registered, source_sha256
from xattn.runs.run_folder import RunFolder, result_line, shown
from xattn.system import hosts
from xattn.system.screen import say


def run(
    config: Config,
    path: Path,
    overrides: Sequence[str] = (),
    *,
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = False,
) -> ExitCode:
    """Trains the config's model in the folder ``path``: begins, goes on with, or shows what is there already.

    overrides: what the person typed, for overrides.yaml. stop: asked at each step; True saves and leaves. quiet: on the
    screen only what went wrong. Errors that a person can mend are raised as :class:`XattnError`; any other leaves its
    traceback in log.txt, a line on the screen, and ExitCode.ERROR. Of several processes (:mod:`xattn.system.hosts`) all call
    this; they return the same, or fail.
    """
    together = hosts.join(
        heartbeat_seconds=config.parallel.heartbeat_seconds,
        connect_seconds=config.parallel.connect_seconds,
        threads=config.trainer.threads,
    )
    if together.count > 1:
        values = xattn.config.hashed_values(config) | {"parallel": config.parallel.model_dump(), "study": config.study}
        together.the_same(values | {"source_sha256": source_sha256(), "registered": registered()})
    if not together.is_first:
        config, quiet = xattn.config.untracked(config), True
    with together.folder(path) as own:
        (code,) = run_pack([Job(config, own, tuple(overrides))], stop=stop, quiet=quiet)
    together.ends_together = together.ends_together or code != ExitCode.ERROR
    return code


def run_pack(jobs: Sequence[Job], *, stop: Callable[[], bool], quiet: bool) -> list[ExitCode]:
    """:func:`run` for runs that train as one program; each one's exit code.

    Their configs share program, data and pace. An error that is raised is about one of them at least.
    """
    folders: list[RunFolder] = []
    attempts: list[Attempt] = []
    try:
        with hosts.team().in_step():
            for job in jobs:
                folders.append(RunFolder(job.folder))
            found = [_look(job.config, folder) or {} for job, folder in zip(jobs, folders, strict=True)]
        before = hosts.team().from_first(found)
        for job, folder, summary in zip(jobs, folders, before, strict=True):
            attempts.append(Attempt(job, folder, summary, quiet=quiet))
        if all(attempt.is_finished for attempt in attempts):
            return [
                _show(job.config.data.name, summary, folder, quiet=quiet)
                for job, summary, folder in zip(jobs, before, folders, strict=True)
            ]
        return Pack(attempts, [folder.path.name for folder in folders], stop).carry_out()
    except BadInput:
        for job, folder in zip(jobs, folders, strict=False):
            if not folder.is_ours() and folder.path.name == xattn.config.run_name(job.config):
                folder.withdraw()  # we named it, and no run has begun in it
        raise
    except OSError as error:
        raise storage_error(error, jobs[0].folder) or error from error
    finally:
        for attempt in attempts:
            attempt.display.close()
        for folder in folders:
            folder.release()


def _look(config: Config, folder: RunFolder) -> dict[str, Any] | None:
    """The summary of the run that is in the folder, None where none has begun or ``resume=never`` begins anew."""
    if not folder.is_ours() or config.resume == "never":
        return None
    differing = xattn.config.differences(xattn.config.load(folder / run_folder.CONFIG), config)
    if differing:
        told = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in list(differing.items())[:3]]
        more = [f"  and {len(differing) - 3} more"] if len(differing) > 3 else []
        raise BadInput("\n".join([f"{folder.path}: holds a run of another config", *told, *more]))
    return folder.summary()


def _show(data_name: str, summary: dict[str, Any], folder: RunFolder, *, quiet: bool) -> ExitCode:
    before = folder.read_json(run_folder.PROVENANCE)
    changed = changes(before, provenance())
    since = f" (since then changed: {', '.join(changed)})" if changed else ""
    if not quiet:
        say(f"{summary['status']} already, at step {summary['step']}: {result_line(summary)}{since}")
        if (other := other_library(data_name, before)) is not None:
            say(other)
        say(f"run folder  {shown(folder.path)}")
        say("resume=never trains it anew, and moves this folder aside")
    with (folder / run_folder.LOG).open("a", encoding="utf-8") as log:
        log.write("started again: the stored result was shown\n")
    return ExitCode.DONE if summary["status"] == "done" else ExitCode.DIVERGED
