"""What the user sees while a run trains: lines, and a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from xattn.runs.run_folder import loss_text
from xattn.system.screen import abandon, clock, columns, fitted, folded
from xattn.tracking.tracker import Row

_UNBOUNDED = 1_000_000_000  # columns


class Screen(Console):
    """The screen, or what stands in for it: a pipe, a file, or a reader that leaves (``python train.py | head``). A run
    continues without its reader; log.txt has everything."""

    def __init__(self, *, stderr: bool = False):
        # Lines of text in a notebook too; rich would turn each into a block of HTML.
        super().__init__(
            highlight=False, soft_wrap=True, file=sys.stderr if stderr else sys.stdout, force_jupyter=False
        )

    @property
    def has_bars(self) -> bool:
        """Whether a bar can move here: only on a terminal that is not dumb.

        rich alone takes a pipe for a terminal if FORCE_COLOR, TTY_COMPATIBLE or TTY_INTERACTIVE says so.
        """
        return self.is_interactive and self.file.isatty()

    def say(self, text: str) -> None:
        """Print text wrapped between words at a terminal's width; a pipe gets it unchanged."""
        self.print(fitted(text, columns(self.file)), markup=False)

    def fits(self, table: Table) -> bool:
        """Return whether the table fits unchanged. A pipe fits any table."""
        width = columns(self.file)
        return width is None or self._width_of(table) <= width

    def print_table(self, table: Table, *, folds: bool = False) -> None:
        """Print a table without cutting anything off, even beyond the width of the screen.

        folds: fit it to a terminal's width, so its columns have to fold. A pipe has no width.
        """
        if not (folds and self.file.isatty()):
            self.width = max(self.width, self._width_of(table))
        self.print(table, soft_wrap=False)

    def _width_of(self, table: Table) -> int:
        return Measurement.get(self, self.options.update(max_width=_UNBOUNDED), table).maximum

    def on_broken_pipe(self) -> None:
        self.quiet = True
        abandon(self.file)


class Display:
    """Prints to the screen and to log.txt. As a tracker it prints each row.

    progress: the bar, shown while it is entered as a context.
    quiet: show only warnings on the screen, without the bar; log.txt still has everything.
    """

    def __init__(self, log: Path, steps: int, *, quiet: bool = False):
        self._quiet = quiet
        self._console = Screen()
        self._log_path = log
        self._log: TextIO | None = None  # opened with the first line, so that a refused start leaves no file
        self._steps = steps
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.has_bars,
            transient=True,
        )
        self._task = self.progress.add_task("compiling …", total=steps)
        self._first: tuple[int, float] | None = None  # step and time of the first row; time left is estimated from it

    def say(self, text: str) -> None:
        if self._quiet:
            self.note(text)
        else:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Print the text even if quiet."""
        self._console.say(text)
        self.note(text)

    def say_sample(self, text: str) -> None:
        """Print a model's text. On a terminal its lines are broken at the last column, as the terminal itself would."""
        if not self._quiet:
            self._console.print(folded(text, columns(self._console.file)), markup=False)
        self.note(text)

    def note(self, text: str) -> None:
        """Write to log.txt alone."""
        if self._log is None:
            self._log = self._log_path.open("a", encoding="utf-8")
        self._log.write(text + "\n")
        self._log.flush()

    def log(self, row: Row) -> None:
        step = row["step"]
        words, of_bar = [f"step {step}/{self._steps}"], []
        if "train_loss" in row:
            loss = f"loss {row['train_loss']:.4f}"
            of_bar = [f"{row['tokens_per_second']:,.0f} tokens/s", *self._time_left(step)]
            words += [loss, *of_bar]
            self.progress.update(self._task, completed=step, description=f"{loss}  {of_bar[0]}")
        if row.get("val_loss") is not None:
            words.append(loss_text(row["val_loss"], row["val_bpb"]))
        for key, value in row.items():
            if key.startswith("probe/") and key.endswith("/accuracy") and value is not None:
                words.append(f"{key.split('/')[1]} {value:.1%} correct")
        if len(words) == 1:  # no loss and no probe: the row is for the files only
            return
        line = "  ".join(words)
        if not self._console.has_bars:
            self.say(line)
            return
        self.note(line)
        if "val_loss" in row and not self._quiet:  # the bar shows the rest
            self._console.say("  ".join(word for word in words if word not in of_bar))

    def _time_left(self, step: int) -> list[str]:
        now = time.perf_counter()
        if self._first is None or step <= self._first[0]:  # the first row, or the first after a rollback
            self._first = (step, now)
            return []
        first_step, then = self._first
        return [f"{clock((now - then) / (step - first_step) * (self._steps - step))} left"]

    def close(self) -> None:
        """Close log.txt until the next line."""
        if self._log is not None:
            with contextlib.suppress(OSError):  # a failed write was already reported
                self._log.close()
            self._log = None
