"""The screen: bars on a terminal and nowhere else, tables with nothing cut off, readers who leave."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table

import xattn
from xattn.data.cache import _bar
from xattn.sweep.view import StudyView
from xattn.tracking.display import Display, Screen

ROOT = Path(xattn.__file__).resolve().parent.parent
ROW = {"step": 1, "train_loss": 5.5, "tokens_per_second": 1000.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def of_a_run(folder: Path) -> None:
    display = Display(folder / "log.txt", 2)
    with display.progress:
        display.log(ROW)
    display.close()


def of_a_study(folder: Path) -> None:
    with StudyView(2, 0) as view:
        view.began(["seed=0"], steps=2)
        view.log(ROW)
        view.ended("seed=0", "done")


def of_the_tokeniser(folder: Path) -> None:
    with _bar(3) as advance:
        advance()


def shown(
    what: Callable[[Path], None],
    screen: io.StringIO,
    environment: dict[str, str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm", "COLUMNS": "200"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    what(folder)
    return screen.getvalue()


BARS = pytest.mark.parametrize("what", [of_a_run, of_a_study, of_the_tokeniser])


@BARS
@pytest.mark.parametrize(
    "environment", [{}, *({name: "1"} for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"))]
)
def test_a_pipe_gets_lines_and_no_bar(
    what: Callable[[Path], None], environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the environment claims of the terminal: rich goes by that alone."""
    text = shown(what, io.StringIO(), environment, tmp_path, monkeypatch)
    assert "\x1b" not in text
    assert "━" not in text
    assert ("step 1/2  loss 5.5000" in text) == (what is of_a_run)
    assert ("seed=0: done" in text) == (what is of_a_study)


@BARS
@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}, {"NO_COLOR": "1"}])
def test_a_terminal_gets_a_bar(
    what: Callable[[Path], None], environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(what, Terminal(), environment, tmp_path, monkeypatch)
    assert "━" in text
    assert "step 1/2  loss" not in text  # the bar shows it


@BARS
@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TTY_INTERACTIVE": "0"}, {"TTY_COMPATIBLE": "0"}])
def test_a_terminal_that_cannot_move_a_bar_gets_the_lines(
    what: Callable[[Path], None], environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the one nor the other would leave a person in front of nothing."""
    text = shown(what, Terminal(), environment, tmp_path, monkeypatch)
    assert "━" not in text
    assert ("step 1/2  loss 5.5000" in text) == (what is of_a_run)


@pytest.mark.parametrize("folds", [False, True])
def test_a_table_in_a_pipe_is_as_wide_as_it_is(folds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"{'a-long-word-' * 10}{i}" for i in range(100)]
    table = Table(*words, box=None)
    table.add_row(*words)
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "40")
    Screen().print_table(table, folds=folds)
    assert [line.split() for line in screen.getvalue().splitlines()] == [words, words]


def test_a_table_on_a_terminal_may_fold_but_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(box=None, show_header=False)
    table.add_column(overflow="fold")
    table.add_row("a-long-word-" * 10)
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    Screen().print_table(table, folds=True)
    assert max(map(len, screen.getvalue().splitlines())) <= 40
    assert "".join(screen.getvalue().split()) == "a-long-word-" * 10


@pytest.mark.parametrize(
    "body",
    [
        "from xattn.sweep.view import StudyView; StudyView(2, 0).ended('seed=0', 'done')",
        "from rich.table import Table; Screen().print_table(Table('a'))",
    ],
)
def test_a_reader_who_leaves_ends_nothing(body: str) -> None:
    """``-m … | head`` and ``xattn runs | head``: rich would leave the process with 1."""
    reading, writing = os.pipe()
    os.close(reading)
    program = f"import sys; from xattn.tracking.display import Screen; {body}; print('goes on', file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "goes on\n")
