"""``python -m tests.faults.soak --kills 300``: random kills, the same command again until it is done, and the score.

A trial is a tiny single run or a sweep of two. Its process is killed at a random moment (nine times in ten by
SIGKILL, else by SIGTERM; now and then it is stopped for a while first) and started again, a few times; then it is left
alone until it is done, and compared with what nobody touched. The score is FAULTS.md's: hard, all of it; soft, numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .harness import (
    DOCUMENTED,
    TINY,
    Reference,
    Training,
    committed_and_unsound,
    differences,
    last_step,
    processes_with,
    runs,
)

EVERY_STEP = ["trainer.log_every=1", "trainer.checkpoint_every=3"]
MOST_KILLS_IN_A_TRIAL = 6
PACE = "pace:40"  # milliseconds a step, so that kills fall into training as well as into the start
INTERVAL = 3 + 1  # steps between checkpoints, and the one that a save in flight may take
_MARK = "XATTN_SOAK"


@dataclass
class Score:
    """What FAULTS.md scores. hard: every failure, in words. The rest is soft."""

    kills: int = 0
    trials: int = 0
    hard: list[str] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)
    seconds_to_first_step: list[float] = field(default_factory=list)
    disk_peak: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.kills} kills in {self.trials} trials",
            f"hard: {len(self.hard)} failures"
            + (f"; 0 of {self.kills} bound the rate by {3 / self.kills:.3f}" if not self.hard and self.kills else ""),
            *(f"  {failure}" for failure in self.hard),
            f"lost steps a kill: {_quantiles(self.lost_steps)}",
            f"launch to first new step, seconds: {_quantiles(self.seconds_to_first_step)}",
            f"disk peak: {self.disk_peak / 1e6:.1f} MB a run",
        ]
        return "\n".join(lines)


def _quantiles(values: Sequence[float]) -> str:
    if not values:
        return "none measured"
    ordered = sorted(values)
    p50, p95 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95))
    return f"p50 {p50:.1f}, p95 {p95:.1f}, most {ordered[-1]:.1f} ({len(ordered)} measured)"


@dataclass(frozen=True)
class Kind:
    """A command, and what its runs come to, by the names of their folders."""

    overrides: tuple[str, ...]
    references: dict[str, Reference]
    seconds: float


def prepare(command: Sequence[str], cwd: Path) -> list[Kind]:
    """The untouched single run and sweep."""
    kinds = []
    for name, more in (("single", []), ("sweep", ["-m", "seed=1,2"])):
        (folder := cwd / name).mkdir(parents=True)
        overrides = (*more, *command, *EVERY_STEP)
        training = Training(*overrides, cwd=folder, points=[PACE])
        assert training.wait() == 0, training.out + training.err
        seconds = time.monotonic() - training.launched
        kinds.append(Kind(overrides, {run.name: Reference.of(run) for run in runs(folder)}, seconds))
    return kinds


def soak(kinds: Sequence[Kind], cwd: Path, *, kills: int, seed: int = 0, points: Sequence[str] = ()) -> Score:
    """points: planted in every process, for the mutations that this soak has to notice."""
    generator, score = random.Random(seed), Score()
    while score.kills < kills and not (points and score.hard):
        (folder := cwd / f"trial-{score.trials}").mkdir(parents=True)
        kind = kinds[generator.random() < 0.3]
        _trial(kind, folder, score, generator, min(MOST_KILLS_IN_A_TRIAL, kills - score.kills), points)
        score.trials += 1
        shutil.rmtree(folder)
    return score


def _trial(kind: Kind, cwd: Path, score: Score, generator: random.Random, most: int, points: Sequence[str]) -> None:
    def fail(what: str) -> None:
        score.hard.append(f"trial {score.trials}, after {score.kills} kills: {what}")

    for _ in range(most):
        before = {run.name: last_step(run) for run in runs(cwd)}
        mark = {_MARK: f"{score.trials}-{score.kills}"}
        training = Training(*kind.overrides, cwd=cwd, points=[PACE, *points], env=mark)
        _watch(training, cwd, before, generator.uniform(0, 1.2 * kind.seconds), score)
        number = signal.SIGKILL if generator.random() < 0.9 else signal.SIGTERM
        if generator.random() < 0.2:
            training.send(signal.SIGSTOP)
            time.sleep(0.2)
            training.send(signal.SIGCONT)
        ended_itself = not training.running
        training.send(number)
        code = training.wait()
        reached = {run.name: last_step(run) for run in runs(cwd)}
        for run in runs(cwd):
            for problem in committed_and_unsound(run):
                fail(problem)
        if code not in DOCUMENTED | {-number}:
            fail(f"exit code {code}: {training.err[-500:]}")
        if ended_itself:
            if code != 0:
                fail(f"ended by itself with {code}: {training.err[-500:]}")
            break
        score.kills += 1
        if left := processes_with(*next(iter(mark.items()))):
            time.sleep(3)
            if left := processes_with(*next(iter(mark.items()))):
                fail(f"orphans {left}")
        if number == signal.SIGKILL:
            score.lost_steps += [
                reached[run.name] - resumed
                for run in runs(cwd)
                if reached[run.name] > before.get(run.name, 0)
                for resumed in [_would_resume_from(run)]
            ]
    _finish(kind, cwd, score, points, fail)


def _finish(kind: Kind, cwd: Path, score: Score, points: Sequence[str], fail: Callable[[str], None]) -> None:
    before = {run.name: last_step(run) for run in runs(cwd)}
    training = Training(*kind.overrides, cwd=cwd, points=points)
    _watch(training, cwd, before, 1e9, score)
    if (code := training.wait()) != 0:
        fail(f"the last start ended with {code}: {training.err[-500:]}")
        return
    if {run.name for run in runs(cwd)} != set(kind.references):
        fail(f"runs {[run.name for run in runs(cwd)]}")
        return
    for run in runs(cwd):
        for problem in differences(run, kind.references[run.name]):
            fail(f"{run.name}: {problem}")
        if (run / "checkpoints" / ".bad").exists():
            fail(f"{run.name}: a committed checkpoint was found broken")
        score.disk_peak = max(score.disk_peak, _size(run))


def _watch(training: Training, cwd: Path, before: dict[str, int], seconds: float, score: Score) -> None:
    """Waits so long, or until the process ends; notes its first new step and the folders' sizes."""
    deadline, seen = time.monotonic() + seconds, False
    while training.running and time.monotonic() < deadline:
        for run in runs(cwd):
            if not seen and last_step(run) > before.get(run.name, 0):
                score.seconds_to_first_step.append(time.monotonic() - training.launched)
                seen = True
            score.disk_peak = max(score.disk_peak, _size(run))
        time.sleep(0.02)


def _would_resume_from(run: Path) -> int:
    folder = run / "checkpoints"
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if re.fullmatch(r"\d+", name)), default=0)


def _size(run: Path) -> int:
    size = 0
    for folder, _, names in os.walk(run):
        for name in names:
            with contextlib.suppress(OSError):  # deleted just now
                size += os.stat(os.path.join(folder, name)).st_size
    return size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="xattn-soak-") as scratch:
        text = Path(scratch) / "lines.txt"
        text.write_text("".join(f"line {i}: {i} + {i * 7 % 13} = {i + i * 7 % 13}\n" for i in range(1500)))
        kinds = prepare([*TINY, "data=text", f"data.path={text}"], Path(scratch) / "untouched")
        score = soak(kinds, Path(scratch), kills=arguments.kills, seed=arguments.seed)
    print(score)
    return 1 if score.hard else 0


if __name__ == "__main__":
    sys.exit(main())
