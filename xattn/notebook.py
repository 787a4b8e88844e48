"""Training from Python: the run of ``python train.py``, in a process that continues afterwards. Imports no jax."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import xattn.config
from xattn.errors import BadInput, Diverged, ExitCode, Preempted, XattnError
from xattn.runs.desk import run
from xattn.runs.job import Job
from xattn.runs.loaded_run import LoadedRun, load
from xattn.runs.run_folder import LOG, read_summary, shown
from xattn.runs.same_training import answered_by
from xattn.system.signals import interruption


def train(overrides: Sequence[str] = (), *, quiet: bool = False) -> LoadedRun:
    """Train the run of ``python train.py OVERRIDES…`` and open it: ``xattn.train(["backend=sigmoid", "seed=1"])``.

    It is the command's run, in the same folder below the working directory. A finished run is shown and opened; a
    stopped run continues from its last checkpoint. A notebook's interrupt, or Ctrl-C, saves the run first.

    Args:
        overrides: one string each, as on the command line. Hydra's own keys are refused, except ``hydra.run.dir`` and
            ``hydra.searchpath``.
        quiet: print only warnings; log.txt has everything.

    Raises:
        BadInput: an override, the data, or what is in the folder cannot be used.
        Diverged: the loss is not finite. The run's folder says where.
        Preempted: the run was interrupted, and is saved.
        XattnError: any other error of :mod:`xattn.errors`; if the run itself failed, log.txt has the traceback.
    """
    if isinstance(overrides, str):
        raise BadInput(f"overrides = {overrides!r}: must be a list of strings, [{overrides!r}]")
    typed = [str(override) for override in overrides]
    config, made = xattn.config.compose_in_folder(typed)
    folder = xattn.config.folder_of(config, made)
    with _as_it_was(), interruption.listening():
        taken = answered_by(Job(config, folder), (lambda text: None) if quiet else print)
        if taken is not None:
            return load(taken)
        code = run(config, folder, typed, stop=lambda: interruption.requested, quiet=quiet)
    _raise_for(code, folder)
    return load(folder)


def _raise_for(code: ExitCode, folder: Path) -> None:
    if code == ExitCode.DONE:
        return
    where, step = shown(folder), (read_summary(folder) or {}).get("step")
    if code == ExitCode.DIVERGED:
        raise Diverged(f"{where}: diverged at step {step}; its metrics.jsonl and log.txt show how")
    if code == ExitCode.PREEMPTED:
        raise Preempted(f"{where}: stopped at step {step} and saved; the same call continues from there")
    raise XattnError(f"{where}: failed at step {step}; the traceback is in {shown(folder / LOG)}")


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Restore the hooks and loggers that a run takes over (:func:`xattn.system.device.hush_libraries`)."""
    hooks = threading.excepthook, sys.unraisablehook
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = hooks
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
