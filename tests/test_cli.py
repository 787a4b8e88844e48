"""The rim of the ``xattn`` command: one message for whatever happens, and an exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from xattn import cli
from xattn.sweep import runs

ROOT = Path(cli.__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("rnus", "runs"),
        ("rnus outputs", "runs"),
        ("bench trian", "bench train"),
        ("evalute", "evaluate"),
        ("x", None),
    ],
)
def test_a_command_that_is_none_is_told_the_nearest(
    typed: str, meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(typed.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) <= 5
    assert typed in err
    assert (f"did you mean {meant}" in err) if meant else ("did you mean" not in err)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"xattn {command} " in out for command in cli._COMMANDS)
    for words, code in ((["bench"], 2), (["bench", "--help"], 0), ([], 2)):
        assert cli.main(words) == code
        listed = capsys.readouterr().out
        assert "xattn bench train " in listed
        assert ("xattn runs " in listed) == (not words)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (RuntimeError("planted\nand more"), 1, r"^xattn: RuntimeError: planted; the traceback is in (\S+)\n$"),
        (OSError(28, "No space left on device", "there"), 6, r"^xattn: there: cannot be written: No space.*\n$"),
        (KeyboardInterrupt(), 130, r"^xattn: interrupted\n$"),
    ],
)
def test_any_error_is_one_line(
    error: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(runs, "main", fail)
    assert cli.main(["runs"]) == code
    found = re.search(told, capsys.readouterr().err)
    assert found
    if found.groups():
        kept = Path(found[1])
        assert "in fail" in kept.read_text()
        kept.unlink()


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "xattn.cli", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
