"""``xattn launch``: processes that live and die together. The launched program is a few lines without jax."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xattn import cli

PROGRAM = """
import glob, os, signal, sys, time
index, count = int(os.environ["JAX_PROCESS_ID"]), int(os.environ["JAX_NUM_PROCESSES"])
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda *_: sys.exit(75))
print(f"process {index} of {count} at {os.environ['JAX_COORDINATOR_ADDRESS']}", flush=True)
open(f"started-{index}", "w").write(str(os.getpid()))
while sum(os.path.getsize(file) > 0 for file in glob.glob("started-*")) < count:  # or one is ended before it has begun
    time.sleep(0.01)
what = sys.argv[1 + index] if len(sys.argv) > 1 + index else "0"
if what == "sleep":
    time.sleep(60)
if what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(what))
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path / "program.py"


def launch(program: Path, count: int, *what: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "import sys; from xattn.cli import main; sys.exit(main())",
        "launch",
        "--processes",
        str(count),
        "--",
        str(program),
        *what,
    ]
    root = Path(cli.__file__).resolve().parent.parent
    env = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def started(folder: Path, count: int) -> list[int]:
    """Their process ids, once they run."""
    deadline = time.monotonic() + 60
    while len(files := sorted(folder.glob("started-*"))) < count or not all(file.read_text() for file in files):
        assert time.monotonic() < deadline, "not started"
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


def test_each_process_knows_its_place_and_the_first_has_the_screen(program: Path) -> None:
    process = launch(program, 3)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(started(program.parent, 3)) == 3
    assert out.startswith("process 0 of 3 at localhost:")
    assert out.count("\n") == 1


@pytest.mark.parametrize(("what", "code"), [(("sleep", "die", "sleep"), 137), (("sleep", "sleep", "1"), 1)])
def test_when_one_dies_the_rest_is_ended(what: tuple[str, ...], code: int, program: Path) -> None:
    process = launch(program, 3, *what)
    begun = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - begun < 45  # and not the sixty seconds that they would sleep
    for pid in started(program.parent, 3):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_all_and_their_code_is_the_answer(number: signal.Signals, program: Path) -> None:
    """They are in sessions of their own, and would live on without a terminal and without who started them."""
    process = launch(program, 2, "sleep", "sleep")
    started(program.parent, 2)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 75


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--processes", "0", "--", __file__], "--processes: 0: must be at least 1"),
        (["--processes", "2", "--port", "65536", "--", __file__], "--port: 65536: must be at least 1 and below 65536"),
        (["--processes", "2", "--", "nope.py"], "nope.py: no such file"),
    ],
)
def test_what_cannot_be_is_told_before_anything_starts(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
