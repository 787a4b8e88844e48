"""Text on a terminal: what fits, what is wrapped and what never is. tests/system/test_terminal.py tests the screens."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys

import pytest

from xattn.system import entry
from xattn.system.screen import continued, fitted, folded, printable, say, width_of

PATH = f"outputs/default/{'softmax-' * 12}0"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [20, 40, 80])
@pytest.mark.parametrize(
    "text",
    [
        "a sentence of several words, which goes on and on until it is wider than a terminal of eighty columns is",
        "result      val_loss 2.8934 nats/token = 4.1742 bits/byte, of the same 32,768 bytes as all the others\n\nend",
        f"run folder  {PATH}",
        f"offline; the commands: `xattn wandb {PATH}` and more words to be broken where they do not fit",
        "  - an indented line that is continued a little further in, as a reader of a list would expect it to be",
        "語" * 30 + " and others of two columns each",
    ],
)
def test_lines_fit_and_lose_no_word(text: str, width: int) -> None:
    shown = fitted(text, width)
    words = shown.replace(" \\\n", " ").replace("`", "").split()
    assert words == text.replace("`", "").split()
    too_wide = [line for line in shown.split("\n") if width_of(line) > width]
    assert all(len(line.split()) == 1 for line in too_wide), "only one word that is too wide by itself"


def test_what_follows_a_label_is_continued_below_itself() -> None:
    shown = fitted("baselines   unigrams 4.3388, gzip 2.7529 bits", 40)
    assert shown == "baselines   unigrams 4.3388, gzip 2.7529\n            bits"


def test_a_pipe_gets_the_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text, command = "words " * 50, f"xattn report {PATH}"
    say(text, command)
    assert capsys.readouterr().out == f"{text} {command}\n"
    assert fitted(text, None) == folded(text, None) == text


@pytest.mark.parametrize("width", [30, 80, 200])
def test_a_command_over_several_lines_is_the_same_command(width: int) -> None:
    """As a shell reads it, with what is quoted in one piece."""
    words = [
        "python",
        "train.py",
        "-m",
        "backend.then={activation: softmax, theta: 500}",
        f"data.path={PATH}",
        "seed=0,1",
    ]
    shown = continued(shlex.join(words), width)
    assert shlex.split(shown.replace("\\\n", " ")) == words
    heard = subprocess.run(["sh", "-c", f"printf '%s\\n' {shown}"], capture_output=True, text=True, timeout=60)
    assert heard.stdout.splitlines() == words
    assert all(len(line) <= width for line in shown.splitlines() if PATH not in line and "{" not in line)


def test_a_command_stands_by_itself_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    screen = Terminal()
    say("a report on them:", "xattn report outputs/four", file=screen)
    say("a report on them:", "xattn report outputs/a_study_of_eight", file=screen)
    assert screen.getvalue().splitlines() == [
        "a report on them: xattn report outputs/four",
        "a report on them:",
        "xattn report outputs/a_study_of_eight",
    ]


def test_a_terminal_is_given_nothing_that_it_would_obey() -> None:
    assert printable("a\x1b[2J\x00\r\x7f\u202e\ufffd\tb\nü語") == "a·[2J·····  b\nü語"
    assert folded("abcdef\ngh語語", 4) == "abcd\nef\ngh語\n語"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "config      the default"),
        (["seed=1", "study=a b"], "config      seed=1 'study=a b'"),
        (["-m", "seed=0,1"], "sweep       seed=0,1"),
        (["--like", "RUN", "seed=1"], "config      --like RUN seed=1"),
        (["~experiment"], "config      '~experiment'"),
        *(([word], None) for word in ("--help", "-h", "--hydra-help", "sample", "--version")),
        (["--cfg", "job", "seed=1"], None),
        (["--cfg=job"], None),
        (["report", "outputs/a=b"], None),
    ],
)
def test_a_terminal_is_told_at_once_what_is_asked_for(
    arguments: list[str], line: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a pipe never is: its reader wants what was asked for."""
    for screen, expected in ((Terminal(), line), (io.StringIO(), None)):
        monkeypatch.setattr(sys, "stdout", screen)
        entry.announce(arguments)
        assert screen.getvalue() == ("" if expected is None else f"{expected}\n")


def test_nothing_slow_is_imported_before_the_first_line() -> None:
    program = "import sys; from xattn import cli; from xattn.system import entry; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"hydra", "omegaconf", "pydantic", "numpy", "rich", "jax", "yaml", "matplotlib"}
