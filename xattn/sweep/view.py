"""What a person sees of a study under way: a line for each run that ends, and on a terminal two bars that move."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from xattn.tracking.tracker import Row


class StudyView:
    """The whole study: how many of its runs are done, running, failed and to go, and how long that takes; and, as a
    tracker, how far those are that run."""

    def __init__(self, runs: int, done: int):
        self._console = Console(highlight=False, soft_wrap=True, file=sys.stdout)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._runs, self._done, self._failed, self._made = runs, done, 0, 0
        self._since = time.monotonic()
        self._study = self._progress.add_task("", total=runs, completed=done)
        self._run = self._progress.add_task("", total=None)
        self.say(f"{runs} runs, {done} of them done already")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def began(self, labels: Sequence[str], steps: int) -> None:
        """Runs that train as one have started."""
        what = labels[0] if len(labels) == 1 else f"a pack of {len(labels)}"
        self._tell(running=len(labels))
        self._progress.reset(self._run, total=steps, description=what)
        self._title = what

    def log(self, row: Row) -> None:
        loss = f"  loss {row['train_loss']:.4f}" if row.get("train_loss") is not None else ""
        self._progress.update(self._run, completed=row["step"], description=f"{self._title}{loss}")

    def ended(self, label: str, outcome: str, to_go: int, *, failed: bool = False) -> None:
        """A run has ended; ``to_go`` are left."""
        self._made += 1
        self._done += not failed
        self._failed += failed
        left = (time.monotonic() - self._since) / self._made * to_go
        self.say(f"  {label}: {outcome}   {to_go} to go, about {_clock(left)}")
        self._tell(running=0)

    def _tell(self, *, running: int) -> None:
        words = [f"{self._done} of {self._runs} done"]
        words += [f"{running} running"] if running else []
        words += [f"{self._failed} failed"] if self._failed else []
        left = self._runs - self._done - self._failed
        if self._made:
            words.append(f"{_clock((time.monotonic() - self._since) / self._made * left)} left")
        self._progress.update(self._study, completed=self._done + self._failed, description=", ".join(words))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
