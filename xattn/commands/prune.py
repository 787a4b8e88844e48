"""``xattn prune STUDY``: free disk space of finished runs, after listing what would be deleted.

Everything that reports read stays, and so do the parameters that ``xattn sample``, ``evaluate`` and ``export`` read.
Importing this module imports no jax.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xattn.errors import BadInput, ExitCode, FolderInUse, storage_error
from xattn.runs import run_folder
from xattn.runs.run_folder import SUPERSEDED, RunFolder, shown
from xattn.system.arguments import Parser
from xattn.system.screen import counted
from xattn.training.kept import BAD, TRAINING, half_done, keep_only, superfluous

_STATES, _OLDER = "optimizer states", "checkpoints that are neither the last nor the best"
_ASIDE, _MOVED = "broken or half-deleted checkpoints", "runs moved aside by resume=never"
_WANDB = "wandb's own files, which `xattn sync` can rebuild"
KINDS = (_STATES, _OLDER, _ASIDE, _MOVED, _WANDB)
FINISHED = ("done", "diverged")  # any other run resumes from what would be deleted


@dataclass
class Plan:
    """What can be deleted below the named folders."""

    doomed: dict[str, list[Path]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    """Kind → paths to delete."""
    runs: list[Path] = field(default_factory=list)
    """Finished runs that no process holds."""
    left_alone: Counter[str] = field(default_factory=Counter)
    """Reason → number of runs left alone."""
    size: int = 0
    """Bytes of everything, deletable or not."""


def main(argv: Sequence[str]) -> int:
    """List what can be deleted of finished runs, ask, and delete it: optimizer states, checkpoints that are neither
    the last nor the best, broken ones, and runs that resume=never moved aside. Whatever reports, sample, evaluate and
    export read is kept. Runs that are in use or not finished are left alone."""
    parser = Parser(prog="xattn prune", description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="STUDY_OR_RUN", help="a study's or a run's folder")
    parser.add_argument("--wandb", action="store_true", help="also delete wandb's files; `xattn sync` can rebuild them")
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    asked = parser.parse_args(argv)
    plan = _plan(asked.folders, wandb=asked.wandb)
    free = _told(plan)
    if not free:
        return ExitCode.DONE
    if not asked.yes:
        if not sys.stdin.isatty():
            raise BadInput("nothing was deleted: there is no terminal to ask on; --yes deletes without asking")
        if not _agreed():
            print("nothing was deleted")
            return ExitCode.DONE
    try:
        _delete(plan)
    except OSError as error:
        path = Path(error.filename or asked.folders[0])
        raise storage_error(error, path) or BadInput(f"{path}: cannot be deleted: {error.strerror}") from error
    print(f"freed {_bytes(free - sum(_size(path) for paths in plan.doomed.values() for path in paths))}")
    return ExitCode.DONE


def _plan(folders: Sequence[Path], *, wandb: bool) -> Plan:
    plan = Plan()
    named = dict.fromkeys(folder.absolute() for folder in folders)
    for folder in (folder for folder in named if not named.keys() & set(folder.parents)):
        plan.size += _size(folder)
        for run in _runs_in(folder):
            if (why := _why_left_alone(run)) is not None:
                plan.left_alone[why] += 1
                continue
            plan.runs.append(run)
            for kind, path in _doomed_of(run, wandb=wandb):
                plan.doomed[kind].append(path)
        aside = folder / SUPERSEDED
        if aside.is_dir() and not (folder / run_folder.CONFIG).is_file():
            plan.doomed[_MOVED] += sorted(
                run for run in aside.iterdir() if run.is_dir() and not run_folder.is_held(run)
            )
    return plan


def _runs_in(folder: Path) -> list[Path]:
    """Return the run in the folder, or the study's runs. Raises :class:`BadInput` if the folder is neither."""
    if (folder / run_folder.CONFIG).is_file():
        return [folder]
    runs = run_folder.runs_in(folder)
    if not runs and not (folder / SUPERSEDED).is_dir():
        raise BadInput(f"{folder}: neither a run's folder nor a study's: no {run_folder.CONFIG} in it or below it")
    return runs


def _why_left_alone(run: Path) -> str | None:
    try:
        status = (run_folder.read_summary(run) or {"status": "not begun"}).get("status")
    except BadInput:
        return f"unreadable {run_folder.SUMMARY}"
    if run_folder.is_held(run):
        return "in use"
    return None if status in FINISHED else str(status)


def _doomed_of(run: Path, *, wandb: bool) -> Iterator[tuple[str, Path]]:
    checkpoints = run / run_folder.CHECKPOINTS
    for path in superfluous(checkpoints, "parameters"):
        yield (_STATES if path.name == TRAINING else _OLDER), path
    for path in [checkpoints / BAD, *half_done(checkpoints)]:
        if path.is_dir():
            yield _ASIDE, path
    if wandb:
        own = run / "wandb"
        yield from ((_WANDB, path) for path in sorted(own.glob("*run-*")) if path.is_dir() and not path.is_symlink())


def _told(plan: Plan) -> int:
    """Print what can be deleted, and return its size in bytes."""
    sizes = {kind: sum(map(_size, paths)) for kind, paths in plan.doomed.items() if paths}
    free = sum(sizes.values())
    runs = len(plan.runs) + plan.left_alone.total()
    print(f"{counted(runs, 'run')}, {_bytes(plan.size)}")
    for kind, size in sizes.items():
        print(f"  {_bytes(size):>9}  {kind} ({len(plan.doomed[kind])})")
    if plan.left_alone:
        reasons = ", ".join(f"{count} {why}" for why, count in plan.left_alone.items())
        print(f"  left alone: {reasons}")
    print(f"{_bytes(free)} can be freed" if free else "there is nothing to free")
    return free


def _agreed() -> bool:
    try:
        return input("delete this? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _delete(plan: Plan) -> None:
    """Delete what was planned, holding each run meanwhile; runs that have been started since are left alone."""
    for path in plan.doomed[_MOVED]:
        shutil.rmtree(path)
        with contextlib.suppress(OSError):  # it is not empty
            path.parent.rmdir()
    by_run = {
        run: [path for path in plan.doomed[_ASIDE] + plan.doomed[_WANDB] if run in path.parents] for run in plan.runs
    }
    for run, others in by_run.items():
        try:
            held = RunFolder(run)
        except FolderInUse:
            print(f"{shown(run)}: now in use; left alone")
            continue
        try:
            if (run_folder.read_summary(run) or {}).get("status") in FINISHED:
                for path in others:
                    shutil.rmtree(path)
                keep_only(run / run_folder.CHECKPOINTS, "parameters", why="xattn prune")
        finally:
            held.release()


def _size(path: Path) -> int:
    """Return the bytes of the files below a folder. A missing folder has none; links are not followed."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
