"""The user's view of a study in progress: a line for each run that ends, and two progress bars on a terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

from xattn.system.screen import clock, counted, width_of
from xattn.tracking.display import Screen
from xattn.tracking.tracker import Row

_BAR = 10  # least width of a bar, in columns
_BESIDE_NAME = _BAR + len("100%") + len("about 1:23:45 left") + 3  # with a space between each two


class StudyView:
    """The progress of a study: runs done, running, failed and to go, and the time left. As a tracker, it shows how
    far the running ones are."""

    def __init__(self, runs: int, done: int):
        self._console = Screen()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(table_column=Column(min_width=_BAR)),
            TaskProgressColumn(),
            TextColumn("{task.fields[tail]}"),
            console=self._console,
            disable=not self._console.has_bars,
            transient=True,
        )
        self._runs, self._done, self._failed, self._running = runs, done, 0, 0
        self._title = ""  # of the running pack
        # Runs finished by this process (fractional if resumed), and seconds until the last one finished.
        self._made, self._made_seconds, self._began = 0.0, 0.0, time.monotonic()
        self._from, self._at, self._steps = 0, 0, 1  # of the running pack
        self._first_row: tuple[int, float] | None = None
        self._study = self._progress.add_task("", total=runs, completed=done, tail="")
        self._run = self._progress.add_task("", total=None, visible=False, tail="")
        self.say(runs_to_go(runs, done))

    def say(self, text: str) -> None:
        self._console.say(text)

    def began(self, labels: Sequence[str], steps: int, at: int = 0, *, title: str | None = None) -> None:
        """Show that the runs of a pack have started at step ``at``. ``title`` names them together."""
        self._title = title or (labels[0] if len(labels) == 1 else f"a pack of {len(labels)}")
        self._running, self._steps, self._from, self._at, self._first_row = len(labels), steps, at, at, None
        self._progress.reset(self._run, total=steps, completed=at, visible=True, tail="" if title else "starting")
        self._tell()

    def log(self, row: Row) -> None:
        self._at = row["step"]
        self._first_row = self._first_row or (self._at, time.monotonic())
        self._progress.update(self._run, completed=self._at)
        if row.get("train_loss") is not None:
            self._progress.update(self._run, tail=f"loss {row['train_loss']:.4f}")
        self._tell()

    def ended(self, label: str, outcome: str, *, failed: bool = False) -> None:
        """Count a run that has ended, and print its line."""
        self._running -= 1
        self._made += 1 - self._from / self._steps
        self._made_seconds = time.monotonic() - self._began
        self._done += not failed
        self._failed += failed
        self._progress.update(self._run, visible=False)
        to_go = max(0, self._runs - self._done - self._failed)
        time_left = f", {left}" if (left := self._time_left()) else ""
        self.say(f"  {label}: {outcome}" + (f"   {to_go} to go{time_left}" if to_go else ""))
        self._tell()

    def found(self, *, failed: bool = False) -> None:
        """Count a run that need not be made: another answers for it, or (``failed``) could not be measured for it."""
        self._done += not failed
        self._failed += failed
        self._tell()

    def _tell(self) -> None:
        words = [f"{self._done} of {self._runs} done"]
        words += [f"{self._running} running"] if self._running > 0 else []
        words += [f"{self._failed} failed"] if self._failed else []
        room = max(_BAR, self._console.width - _BESIDE_NAME)
        ended, left = self._done + self._failed, self._time_left()
        self._progress.update(self._study, completed=ended, description=shortened(", ".join(words), room), tail=left)
        self._progress.update(self._run, description=shortened(self._title, room))

    def _time_left(self) -> str:
        """Estimate the time left from the runs that have ended, starts and compilation included. Before there is one,
        use the steps of the running ones since their first row."""
        under_way = max(0, self._running)
        left = self._runs - self._done - self._failed - under_way * self._at / self._steps
        seconds = 0.0
        if self._made:
            seconds = self._made_seconds / self._made
        elif self._first_row is not None and self._at > self._first_row[0]:
            step, since = self._first_row
            seconds = (time.monotonic() - since) / (self._at - step) * self._steps / max(1, under_way)
        return f"about {clock(seconds * left)} left" if seconds and left > 0 else ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


def shortened(name: str, room: int) -> str:
    """Shorten the name to at most that many columns: first drop the names of its keys, then its end."""
    if width_of(name) > room:
        name = re.sub(r"(?<!\S)[\w.]+=", "", name)
    while width_of(name) > room:
        name = name.removesuffix("…")[:-1] + "…"
    return name


def runs_to_go(runs: int, done: int) -> str:
    return f"{counted(runs, 'run')}, {done} already done"
