"""A study: runs that answer one question, carried out in this process so that they share compiled programs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xattn.config
from xattn.config import Config
from xattn.errors import ExitCode
from xattn.run_folder import read_summary
from xattn.sweep.table import print_table

_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """A run to make: its validated config, its folder, and what the person typed for it."""

    config: Config
    folder: Path
    overrides: tuple[str, ...]

    def is_finished(self) -> bool:
        """Whether its result is there already. ``resume=never`` asks for another."""
        if self.config.resume == "never":
            return False
        return (read_summary(self.folder) or {}).get("status") in ("done", "diverged")


def carry_out(jobs: Sequence[Job], start: Callable[[Job], ExitCode]) -> None:
    """Starts every job whose result is not there yet, and prints the table of all at the end.

    Jobs of one program follow each other. One that another process is running is waited for, and taken over if that
    dies; one that fails is told of, and the others go on. ``start`` makes a run and returns its exit code; SystemExit
    from it ends the study with the table of what there is.
    """
    unfinished = [job for job in jobs if not job.is_finished()]
    print(f"{len(jobs)} runs, {len(jobs) - len(unfinished)} of them done already")
    queue = deque(sorted(unfinished, key=lambda job: xattn.config.program_key(job.config)))
    varying = xattn.config.varying_keys([job.config for job in jobs])
    began, made = time.monotonic(), 0
    waiting_for: set[Path] = set()
    try:
        while queue:
            job = queue.popleft()
            if job.folder in waiting_for:
                if job.is_finished():
                    print(f"  {_label(job, varying)}: done by another process")
                    continue
                if len(waiting_for) > len(queue):
                    time.sleep(_POLL_SECONDS)  # nothing else is left to do
            code = start(job)
            if code == ExitCode.IN_USE:
                if job.folder not in waiting_for:
                    print(f"  {_label(job, varying)}: another process is at it")
                waiting_for.add(job.folder)
                queue.append(job)
                continue
            made += 1
            left = (time.monotonic() - began) / made * len(queue)
            print(f"  {_label(job, varying)}: {_outcome(job, code)}   {len(queue)} to go, about {_clock(left)}")
    except SystemExit:
        print("stopped; the same command goes on with what is not done")
        raise
    finally:
        print_table([job.folder for job in jobs], varying)


def _label(job: Job, varying: Sequence[str]) -> str:
    values = xattn.config.hashed_values(job.config)
    return " ".join(f"{key}={values[key]}" for key in varying if key in values) or job.folder.name


def _outcome(job: Job, code: ExitCode) -> str:
    summary = read_summary(job.folder) or {}
    if code in (ExitCode.DONE, ExitCode.DIVERGED) and summary.get("val_loss") is not None:
        return f"{summary['status']}, val_loss {summary['val_loss']:.4f}"
    return code.name.lower()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
