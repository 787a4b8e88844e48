"""The rim of the ``xattn`` command: every outcome gives one message and an exit code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import xattn
from xattn import app, cli
from xattn.runs.provenance import source_sha256
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
    listed = [line.split()[1] for line in out.splitlines()[1:]]
    assert listed == [*(command for command in cli._COMMANDS if " " not in command), "bench"]
    assert [name for name in listed if name != "train"][:3] == ["report", "runs", "sample"], "in the order of a study"
    for words, code in ((["bench"], 2), (["bench", "--help"], 0), ([], 2)):
        assert cli.main(words) == code
        listed = capsys.readouterr().out
        assert ("xattn bench train " in listed) == bool(words), "the parts of bench are folded into a line"
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


TRAIN, XATTN = [str(ROOT / "train.py")], ["-m", "xattn.cli"]


def from_a_shell(before: str, arguments: list[str], closed: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What a shell makes of ``before && exec python arguments closed``."""
    return subprocess.run(
        ["sh", "-c", f'{before} && exec "$@" {closed}', "sh", sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


COMMANDS = {
    "help": ([*XATTN, "--help"], 0),
    "no command": ([*XATTN, "nonsense"], 2),
    "config": ([*TRAIN, "--cfg", "job"], 0),
    "no key": ([*TRAIN, "nonsense=1"], 2),
    "no key of a sweep": ([*TRAIN, "-m", "nonsense=1,2"], 2),
    "no folder": ([*TRAIN, "runs", "nowhere"], 2),
}


@pytest.mark.parametrize(
    ("command", "closed"),
    [
        *((command, "<&- >&- 2>&-") for command in COMMANDS),
        *((command, closed) for command in ("help", "no command", "config", "no key") for closed in (">&-", "2>&-")),
    ],
)
def test_a_closed_stream_changes_no_exit_code(command: str, closed: str, tmp_path: Path) -> None:
    arguments, code = COMMANDS[command]
    done = from_a_shell("true", arguments, closed, tmp_path)
    assert done.returncode == code
    assert "Traceback" not in done.stdout + done.stderr
    assert (len(done.stderr) > 0) == (code == 2 and "2>" not in closed)


def test_what_is_printed_to_a_closed_stream_lands_in_no_file(tmp_path: Path) -> None:
    """A file that is opened next would get its number; C++ libraries print to the number."""
    program = (
        "import os; from xattn.system import entry; entry.open_streams(); file = open('a file', 'w'); file.write('a'); "
        "os.write(1, b'lost'); os.write(2, b'lost'); os.read(0, 1); file.close()"
    )
    assert from_a_shell("true", ["-c", program], "<&- >&- 2>&-", tmp_path).returncode == 0
    assert (tmp_path / "a file").read_text() == "a"


@pytest.mark.parametrize("arguments", [[*XATTN, "nonsense"], [*TRAIN, "nonsense=1"]])
def test_an_error_that_nobody_reads_keeps_its_exit_code(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, *arguments], stdout=writing, stderr=writing, cwd=ROOT, timeout=60)
    os.close(writing)
    assert done.returncode == 2


@pytest.mark.parametrize(
    "arguments", [[*XATTN, "runs"], TRAIN, [*TRAIN, "-m", "seed=0,1"], [*TRAIN, "--help"], [*TRAIN, "report", "here"]]
)
def test_a_deleted_working_directory_is_bad_input(arguments: list[str], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = from_a_shell('rmdir "$PWD"', arguments, "", gone)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "working directory" in done.stderr


def test_an_installed_package_is_the_same_source_and_has_its_yaml_files(tmp_path: Path) -> None:
    """In a wheel conf/ is inside the package; its digest does not say so, so that runs go on without a warning."""
    shutil.copytree(ROOT / "xattn", tmp_path / "xattn", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", tmp_path / "xattn" / "conf")
    ask = "import xattn.runs.provenance as p, xattn.section as s; print(p.__file__, s.CONF, p.source_sha256())"
    done = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    file, conf, digest = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert Path(conf) == tmp_path / "xattn" / "conf"
    assert digest == source_sha256()


@pytest.mark.parametrize(
    ("program", "typed"),
    [(["-m", "xattn.cli", "train"], "xattn train"), ([str(ROOT / "train.py")], "python .*train.py")],
)
def test_help_names_the_program_as_it_was_started(program: list[str], typed: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *program, "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert re.search(rf"^ +{typed} backend\.activation=sigmoid ", done.stdout, re.MULTILINE), done.stdout + done.stderr


def test_both_commands_print_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"xattn {xattn.__version__}\n"
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"xattn {xattn.__version__}\n")


def test_the_choices_are_listed_only_for_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra resolves the help's template at every start, where listing them would cost a third of the time."""
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1"])
    assert app._choices() == ""
