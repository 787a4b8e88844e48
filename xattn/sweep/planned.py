"""The plan of a sweep: one file per command in its study's folder.

``xattn runs`` shows from it what is missing, and ``xattn resume`` continues from it. Importing this module imports no
jax.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from xattn.runs import run_folder
from xattn.runs.job import Job

_FILE = ".sweep-{}.json"  # a hidden file, so that a listing of the study's runs does not include it
_OVER = ("done", "diverged", "pruned")


class Plan:
    """The runs that this process's command is to make, as far as they are known.

    Two terminals with the same command write the same content to the same file.
    """

    def __init__(self, *, grows: bool = False):
        """``grows``: whether the results of these runs may call for more runs, as with seeds on demand."""
        self._jobs: dict[Path, Job] = {}
        self.grows = grows
        self._answered: set[Path] = set()

    def add(self, jobs: Iterable[Job]) -> None:
        self._jobs |= {job.folder.absolute(): job for job in jobs}

    def answered(self, jobs: Iterable[Path]) -> None:
        """Note the folders of runs that need not be made, because another run answers for them."""
        self._answered |= {folder.absolute() for folder in jobs}

    def write(self) -> None:
        """Write the plan into the folder of each study that it has runs in."""
        studies: dict[Path, list[Path]] = {}
        for folder in self._jobs:
            studies.setdefault(folder.parent, []).append(folder)
        starts_over = any(job.config.resume == "never" for job in self._jobs.values())
        for study, folders in studies.items():
            names = [folder.name for folder in folders]
            known = {folder.name for folder in folders if folder in self._answered}
            _write(study, {"runs": names, "answered": known, "grows": self.grows}, starts_over=starts_over)


def _is_made(study: Path, content: Mapping[str, Any]) -> bool:
    return "runs" in content and not content["grows"] and all(_status(study / run) in _OVER for run in content["runs"])


def write_trials(study: Path, planned: int, ended: int) -> None:
    """Record how many trials a tuner plans, and how many of them have ended, in any process."""
    _write(study, {"planned": planned, "ended": ended}, starts_over=False)


def _write(study: Path, content: Mapping[str, Any], *, starts_over: bool) -> None:
    command = [sys.executable, *sys.orig_argv[1:]]
    if "ipykernel_launcher" in command:  # no command starts a notebook again
        command = [sys.executable, "-m", "xattn.cli", "train", *sys.argv[1:]]
    if starts_over:  # xattn resume continues what has begun
        command = [*(word for word in command if not word.startswith("resume=")), "resume=auto"]
    here = Path.cwd()
    cwd = os.path.relpath(here, study) if study.is_relative_to(here) else str(here)
    path = study / _FILE.format(hashlib.sha256(json.dumps([command[1:], cwd]).encode()).hexdigest()[:10])
    if not path.exists() and _is_made(study, content):
        return  # a command that finds everything done leaves no plan
    before = _read(path) or {}
    known = {*content.get("answered", ()), *before.get("answered", ())}
    whole = dict(content) | ({"answered": sorted(known & set(content["runs"]))} if "runs" in content else {})
    since = before.get("started_at") or datetime.now(UTC).isoformat(timespec="seconds")
    study.mkdir(parents=True, exist_ok=True)
    text = run_folder.to_json({"command": command, "cwd": cwd, "started_at": since, **whole}, indent=1)
    run_folder.write_atomically(path, text + "\n", shared=True)


@dataclass(frozen=True)
class Sweep:
    """A sweep, as recorded in its study's folder."""

    command: tuple[str, ...]
    """The words that started it, the interpreter first."""
    cwd: Path
    """The folder that it was started in."""
    planned: int
    """Number of runs it is to make, as far as is known."""
    done: int
    """Number of runs that are done, diverged, pruned, or answered for by another run."""
    failed: int
    is_running: bool
    """Whether a process is working on one of the runs now."""
    grows: bool
    """Whether more runs may follow."""
    runs: frozenset[str]
    """Names of the run folders; empty for the trials of a tuner."""

    @property
    def is_complete(self) -> bool:
        return self.done >= self.planned and not self.grows

    @property
    def says(self) -> str:
        """The sweep's progress in words."""
        words = [f"{self.done} of {self.planned} planned runs done"]
        words += ["more seeds may follow"] if self.grows else []
        words += [f"{self.failed} failed"] if self.failed else []
        return ", ".join([*words, *(["running"] if self.is_running else [])])

    @property
    def typed(self) -> str:
        """The command as typed in a shell in the current folder."""
        words = shlex.join(_as_typed(self.command))
        return words if self.cwd == Path.cwd() else f"cd {shlex.quote(run_folder.shown(self.cwd))} && {words}"


def sweeps_of(study: Path) -> list[Sweep]:
    """Return the sweeps that were started in a study, the earliest first, except those with unreadable plans."""
    found = []
    for path in study.glob(_FILE.format("*")):
        content = _read(path)
        if content is not None:
            found.append((content["started_at"], path.name, _sweep(study, content)))
    return [sweep for _, _, sweep in sorted(found, key=lambda each: each[:2])]


def unfinished(study: Path) -> list[Sweep]:
    """Return the incomplete sweeps of a study. A sweep is left out if a larger or later one contains its runs."""
    left = [sweep for sweep in sweeps_of(study) if not sweep.is_complete]

    def is_covered(i: int) -> bool:
        runs = left[i].runs
        return bool(runs) and any(runs < each.runs or (runs == each.runs and i < j) for j, each in enumerate(left))

    return [sweep for i, sweep in enumerate(left) if not is_covered(i)]


def _sweep(study: Path, content: Mapping[str, Any]) -> Sweep:
    runs, answered = content.get("runs", []), set(content.get("answered", []))
    statuses = {name: _status(study / name) for name in runs}
    over = sum(name in answered or status in _OVER for name, status in statuses.items())
    return Sweep(
        command=tuple(content["command"]),
        cwd=(study / content["cwd"]).resolve(),
        planned=content.get("planned", len(runs)),
        done=content.get("ended", over),
        failed=sum(status == "failed" and name not in answered for name, status in statuses.items()),
        is_running=any(s not in (None, *_OVER) and run_folder.is_held(study / name) for name, s in statuses.items()),
        grows=content.get("grows", False),
        runs=frozenset(runs),
    )


def _status(folder: Path) -> str | None:
    return run_folder.read_or_empty(folder / run_folder.SUMMARY).get("status")


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of the file; None if it is missing or not one of ours."""
    try:
        content: Any = json.loads(path.read_text("utf-8"))
        command, cwd, since = content["command"], content["cwd"], content["started_at"]
        listed = [*command, *content.get("runs", []), *content.get("answered", []), cwd, since]
        counts = [content.get("planned", 0), content.get("ended", 0)]
        is_ours = command and all(isinstance(each, str) for each in listed) and all(type(n) is int for n in counts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return content if is_ours else None


def _as_typed(command: Sequence[str]) -> list[str]:
    """Return the words as typed. The interpreter becomes ``python`` if that name stands for it, and is dropped before a
    program that the shell finds, such as ``xattn``."""
    interpreter, *words = command
    if words and shutil.which(name := Path(words[0]).name) == words[0]:
        return [name, *words[1:]]
    for name in ("python", Path(interpreter).name):
        found = shutil.which(name)
        if found is not None and _is_same(found, interpreter):
            return [name, *words]
    return [interpreter, *words]


def _is_same(one: str, other: str) -> bool:
    try:  # do not resolve links: a venv's interpreter links to one with other packages
        return os.path.samefile(Path(one).parent, Path(other).parent) and os.path.samefile(one, other)
    except OSError:
        return False


def program_of(sweep: Sweep) -> Path | None:
    """Return the file that was started; None for a module (``python -m``)."""
    words = iter(sweep.command[1:])
    for word in words:
        if word in ("-m", "-c"):
            return None
        if word in ("-W", "-X"):
            next(words, None)
        elif not word.startswith("-"):
            return sweep.cwd / word
    return None
