"""The front desk of a run: what its folder holds decides whether it is trained, continued, shown or refused.

Importing this module imports no jax, so that "already done" and "in use" are answered immediately. jax is loaded
when :mod:`xattn.runs.session` is imported.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xattn.config
from xattn.config import Config
from xattn.errors import BadInput, ExitCode, XattnError, storage_error
from xattn.runs import run_folder
from xattn.runs.job import Job
from xattn.runs.provenance import changes, other_library, provenance, registered, source_sha256
from xattn.runs.record import Run
from xattn.runs.run_folder import RunFolder, result_line, shown
from xattn.system import hosts
from xattn.system.device import ask_for_determinism, compute_with, first_look, hush_libraries
from xattn.system.screen import say


def run(
    config: Config,
    path: Path,
    overrides: Sequence[str] = (),
    *,
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = False,
) -> ExitCode:
    """Train the config's model in the folder ``path``: start, continue, or show the result if there is one already.

    Args:
        overrides: what the user typed, for overrides.yaml.
        stop: called at each step; True saves and leaves.
        quiet: show only what went wrong.

    If a run has several processes (:mod:`xattn.system.hosts`), all call this; they return the same code, or fail.
    Errors that a user can fix are raised as :class:`XattnError`. Any other error leaves its traceback in log.txt and a
    line on the screen, and returns ExitCode.ERROR.
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
    """Do what :func:`run` does for runs that train as one program; return the exit code of each.

    Their configs must share program, data and pace. An error that is raised concerns at least one of them.
    """
    folders: list[RunFolder] = []
    runs: list[Run] = []
    try:
        with hosts.team().in_step():
            for job in jobs:
                folders.append(RunFolder(job.folder))
            found = [_look(job.config, folder) or {} for job, folder in zip(jobs, folders, strict=True)]
        before = hosts.team().from_first(found)
        for job, folder, summary in zip(jobs, folders, before, strict=True):
            runs.append(Run(job, folder, summary, quiet=quiet))
        if all(each.is_finished for each in runs):
            return [_show(each, quiet=quiet) for each in runs]
        return _attempt(runs, stop)
    except BadInput:
        for job, folder in zip(jobs, folders, strict=False):
            if not folder.is_ours() and folder.path.name == xattn.config.run_name(job.config):
                folder.withdraw()  # we named it, and no run has begun in it
        raise
    except OSError as error:
        raise storage_error(error, jobs[0].folder) or error from error
    finally:
        for each in runs:
            each.display.close()
        for folder in folders:
            folder.release()


def _look(config: Config, folder: RunFolder) -> dict[str, Any] | None:
    """Return the summary of the run in the folder; None if none has begun, or ``resume=never`` starts over."""
    if not folder.is_ours() or config.resume == "never":
        return None
    differing = xattn.config.differences(xattn.config.load(folder / run_folder.CONFIG), config)
    if differing:
        lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in list(differing.items())[:3]]
        more = [f"  and {len(differing) - 3} more"] if len(differing) > 3 else []
        raise BadInput("\n".join([f"{folder.path}: holds a run with another config", *lines, *more]))
    return run_folder.read_summary(folder.path)


def _show(run: Run, *, quiet: bool) -> ExitCode:
    """Show the result of a run that is finished."""
    before = run_folder.read_provenance(run.folder.path)
    changed = changes(before, provenance())
    since = f" (changed since then: {', '.join(changed)})" if changed else ""
    if not quiet:
        say(f"already {run.before['status']} at step {run.before['step']}: {result_line(run.before)}{since}")
        if (other := other_library(run.config.data.name, before)) is not None:
            say(other)
        say(f"run folder  {shown(run.folder.path)}")
        say("resume=never trains it again and moves this folder aside")
    with (run.folder / run_folder.LOG).open("a", encoding="utf-8") as log:
        log.write("started again: the stored result was shown\n")
    return run.code


def _attempt(runs: Sequence[Run], stop: Callable[[], bool]) -> list[ExitCode]:
    """Train the runs, at least one of which is not finished; return the exit code of each.

    Raise :class:`XattnError` for what a user can fix.
    """
    at_work = [run for run in runs if not run.is_finished]

    def without_result() -> list[Run]:
        return [run for run in at_work if not run.is_concluded]

    def note(text: str) -> None:
        for run in without_result():
            run.note(text)

    try:
        with hosts.team().in_step():
            for run in at_work:
                run.refuse()
        _prepare_jax(at_work[0].config, note)
        from xattn.runs.session import train_pack  # jax begins here

        train_pack(runs, stop)
    except XattnError as error:
        for run in without_result():
            run.refused(error)
        raise
    except Exception as error:  # the outermost rim around a run
        hosts.team().outlive(error)
        note(traceback.format_exc())
        if (full := storage_error(error, at_work[0].folder.path)) is not None:
            for run in without_result():
                run.code = full.exit_code
            raise full from error
        for run in without_result():
            run.failed(error)
    finally:
        with ThreadPoolExecutor(len(at_work)) as pool:  # each may wait for wandb
            list(pool.map(Run.finish_mirror, at_work))
        for run in at_work:  # after wandb, which may upload a checkpoint
            run.drop_checkpoints()
    return [run.code for run in runs]


def _prepare_jax(config: Config, note: Callable[[str], None]) -> None:
    """Set what jax reads only once, when it starts, and refuse settings that it cannot have."""
    hush_libraries(note)
    if config.trainer.deterministic:
        ask_for_determinism()
    compute_with(config.trainer.threads)
    first_look()
