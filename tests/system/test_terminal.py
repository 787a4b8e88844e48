"""The screens of the commands at 80 and 130 columns: no line is too long, and no path or command is wrapped."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import xattn.config
from tests.quick import composed
from xattn import cli
from xattn.commands import compare, plan
from xattn.report.decide import main as decide
from xattn.runs import run_folder
from xattn.runs.job import Job
from xattn.sweep import runs
from xattn.sweep.labels import labels
from xattn.sweep.planned import Plan
from xattn.sweep.view import StudyView, shortened
from xattn.system.hardware import Hardware
from xattn.system.screen import width_of
from xattn.tracking import command
from xattn.tracking.display import Display

ROOT = Path(cli.__file__).resolve().parent.parent
WIDTHS = pytest.mark.parametrize("width", [80, 130])
OnTerminal = Callable[[int], Callable[[], list[str]]]
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> OnTerminal:
    """Makes the standard output a terminal of a width; what that returns are its lines, moving bars among them."""

    def begin(width: int) -> Callable[[], list[str]]:
        terminal = Terminal()
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "stdout", terminal)
        return lambda: _ESCAPES.sub("", terminal.getvalue()).replace("\r", "\n").split("\n")

    return begin


def check(lines: Sequence[str], width: int, *whole: str) -> None:
    """Of lines that are wider, each is one word: a path, which nothing may break. ``whole`` stand there unbroken."""
    wide = [line for line in lines if width_of(line) > width]
    assert [line for line in wide if len(line.removesuffix(" \\").split()) > 1] == []
    for path in whole:
        assert any(path in line for line in lines), path


def jobs_of(study: Path, *overrides: Sequence[str]) -> list[Job]:
    configs = [composed("trainer=debug", *typed) for typed in overrides]
    return [
        Job(each, study / xattn.config.run_name(each), tuple(o)) for each, o in zip(configs, overrides, strict=True)
    ]


def finish(job: Job, loss: float) -> None:
    job.folder.mkdir(parents=True)
    (job.folder / run_folder.CONFIG).write_text(xattn.config.save(job.config))
    summary = {"status": "done", "step": 20, "val_loss": loss, "val_bpb": loss * 1.44, "tokens_per_second": 12345.6}
    run_folder.write_summary(job.folder, summary)


GRID = [
    [f"backend.activation={a}", f"optimizer.learning_rate={r}"] for a in ("softmax", "sigmoid") for r in (1e-3, 3e-3)
]
ARMS = [[], ["model.conv=2"], ["model.conv=4"], ["backend.sink=learned"], ["model.output_gate=channel"]]
MANY = [
    "model.conv=2",
    "backend.sink=learned",
    "model.output_gate=channel",
    "model.exclusive=true",
    "backend.theta=5.0",
]
WIDE = [[], MANY]
STAR = [[*arm, f"seed={seed}"] for arm in ARMS for seed in (0, 1)]


@WIDTHS
@pytest.mark.parametrize("asked", [GRID, STAR, WIDE])
def test_a_sweep_keeps_bar_loss_and_time_left(
    asked: list[list[str]], width: int, on_terminal: OnTerminal, tmp_path: Path
) -> None:
    screen = on_terminal(width)
    jobs = jobs_of(tmp_path, *asked)
    label = labels(jobs)
    with StudyView(len(jobs), 0) as view:
        for job in jobs[:2]:
            view.began([label(job)], 20)
            for step in (5, 10):
                view.log({"step": step, "train_loss": 3.14159})
                view._progress.refresh()
            frame = screen()[-2:]
            view.ended(label(job), "done, val_loss 2.8652")
    lines = screen()
    check(lines, width)
    (bar,) = [line for line in frame if "loss" in line]
    assert re.fullmatch(r"\S.* ━*[╸╺]━* +50% loss 3\.1416 *", bar)
    assert any(re.match(r"1 of \d+ done, 1 running +━.*% about \d:\d\d left", line) for line in lines)
    assert f"{label(jobs[1])}: done, val_loss 2.8652" in " ".join(" ".join(lines).split())


def test_a_name_is_shortened_to_what_varies(tmp_path: Path) -> None:
    """A sweep that varies one key at a time calls each run by the one that it changes."""
    grid, star = jobs_of(tmp_path, *GRID), jobs_of(tmp_path, *STAR)
    assert [*map(labels(grid), grid)][:2] == [
        "activation=softmax learning_rate=0.001",
        "activation=softmax learning_rate=0.003",
    ]
    told = [*map(labels(star), star)]
    assert told[::2] == [
        "baseline seed=0",
        *(f"{arm} seed=0" for arm in ("conv=2", "conv=4", "sink=learned", "output_gate=channel")),
    ]
    assert [*map(labels(star[2:4]), star[2:4])] == ["seed=0", "seed=1"]
    assert labels(grid[:1])(grid[0]) == grid[0].folder.name
    square = jobs_of(
        tmp_path, *([a, b] for a in ("model.conv=2", "model.conv=4") for b in ("seed=0", "backend.sink=zero"))
    )
    assert next(map(labels(square), square)) == "sink=none conv=2", "several keys at a time: no baseline"
    assert shortened("activation=softmax learning_rate=0.001", 20) == "softmax 0.001"
    assert shortened("activation=softmax learning_rate=0.001", 9) == "softmax …"


def test_an_mlp_dim_that_was_chosen_for_the_arms_is_no_arm(tmp_path: Path) -> None:
    sized = [["model.parameters=900000", *arm] for arm in ARMS]
    jobs = jobs_of(tmp_path, *sized)
    assert [*map(labels(jobs), jobs)] == ["baseline", "conv=2", "conv=4", "sink=learned", "output_gate=channel"]


@WIDTHS
@pytest.mark.parametrize("asked", [GRID, STAR])
def test_runs_fit_by_what_their_columns_say_already(
    asked: list[list[str]], width: int, on_terminal: OnTerminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = on_terminal(width)
    monkeypatch.chdir(tmp_path)
    jobs = jobs_of(tmp_path / "outputs" / "a_study", *asked)
    for i, job in enumerate(jobs[:-1]):
        finish(job, 2.8 + i / 10)
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "train.py", "-m", "study=a_study", *(f"key.number_{i}=1,2" for i in range(9))]
    )
    kept = Plan()
    kept.add(jobs)
    kept.write()
    assert runs.main([]) == 0
    lines = screen()
    check(lines, width, "xattn resume outputs/a_study")
    text = "\n".join(lines)
    assert f"{len(jobs) - 1} of {len(jobs)} planned runs done; continue with" in text
    assert "python train.py -m study=a_study" in text
    for job in jobs[:-1]:
        assert len([line for line in lines if line.rstrip().endswith(job.folder.name[-10:])]) >= 1
    (glob,) = re.findall(r"a run's folder is (\S+)", text) or [f"outputs/a_study/{jobs[0].folder.name}"]
    assert len([*tmp_path.glob(glob)]) == 1, "what is shown of a name finds its folder"


@WIDTHS
def test_a_run_fits(width: int, on_terminal: OnTerminal, tmp_path: Path) -> None:
    screen = on_terminal(width)
    display = Display(tmp_path / "log.txt", 20)
    path = f"outputs/default/{'softmax-' * 9}lr0.003-seed0-8259ee9491"
    row = {"step": 10, "train_loss": 3.2, "tokens_per_second": 2866.0, "val_loss": 3.048, "val_bpb": 4.3973}
    with display.progress:
        display.log(row)
    display.say(f"wandb       offline; the commands to look at it and to send it: `xattn wandb {path}`")
    display.say_sample("x" * 300)
    display.say(f"run folder  {path}")
    display.close()
    lines = screen()
    check(lines, width, path)
    assert any(line.startswith("step 10/20  loss 3.2000  val_loss 3.0480 nats/token = 4.3973") for line in lines)
    assert "2,866 tokens/s" in (tmp_path / "log.txt").read_text()
    assert "xattn wandb" in (tmp_path / "log.txt").read_text()


@WIDTHS
def test_the_wandb_commands_can_be_copied(width: int, on_terminal: OnTerminal, outputs: Path) -> None:
    screen = on_terminal(width)
    run = next(path for path in sorted(outputs.iterdir()) if path.is_dir())
    shutil.rmtree(run / "wandb", ignore_errors=True)
    shown = f"outputs/golden/{run.name}"
    assert command.main([shown]) == 0
    assert f"xattn sync {shown}" in "\n".join(screen()).replace(" \\\n   ", "")
    (run / "wandb" / "offline-run-20261130_120034-24113d9a").mkdir(parents=True)
    assert command.main([shown]) == 0
    check(screen(), width, f"{shown}/wandb/offline-run-20261130_120034-24113d9a", f"{shown}/wandb/latest-run")


@WIDTHS
def test_help_compare_verdict_and_plan_fit(width: int, on_terminal: OnTerminal, outputs: Path) -> None:
    screen = on_terminal(width)
    assert cli.main(["--help"]) == 0
    assert cli.main(["bench", "--help"]) == 0
    study = sorted(path for path in outputs.iterdir() if path.is_dir())
    assert compare.main([str(path) for path in study * 2]) == 0
    assert decide([str(outputs), "--better", "backend.activation=sigmoid", "--than", "softmax"]) == 10
    hardware = Hardware("cpu", 1e12, 1e12, 10**8, 20e9, 10e9, 64, "cpu")
    costs = plan.Plan({"data": 4}, 10821504, 135 * 10**9, 2048, {"activations": 10**9}, {"data": 10**8}, 1.2345, 0.1)
    plan._print(costs, xattn.config.compose(), hardware, "cpu", 3)
    check(screen(), width, *(["sigmoid", "undecided"]))


@pytest.mark.parametrize("width", [80])
def test_a_table_that_cannot_fit_says_what_it_leaves_out(width: int, on_terminal: OnTerminal, tmp_path: Path) -> None:
    screen = on_terminal(width)
    keys = [
        "backend.sink=learned",
        "model.conv=4",
        "model.output_gate=channel",
        "model.exclusive=true",
        "backend.theta=500.25",
    ]
    jobs = jobs_of(tmp_path / "s", keys, [], [*keys[:3], "model.value_residual=first"])
    for job in jobs:
        finish(job, 2.0)
    (jobs[0].folder / run_folder.SUMMARY).write_text(json.dumps({"status": "preempted", "step": 3}))
    assert runs.main([str(tmp_path / "s")]) == 0
    check(screen(), width)
    assert "`xattn runs --json` or a wider terminal also shows tokens/s" in " ".join(screen())


def test_the_first_line_of_a_real_terminal_is_what_was_asked_for(tmp_path: Path) -> None:
    """Before Hydra is imported; and a refusal behind it fits the terminal too."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "train.py"), "experiment=study_switches", "seed=1"]
    environment = os.environ | {"COLUMNS": "80", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        read = b""
        with contextlib.suppress(OSError):  # Linux's way to say that the other side is closed
            while piece := os.read(ours, 4096):
                read += piece
    os.close(ours)
    lines = read.decode().replace("\r\n", "\n").splitlines()
    assert process.returncode == 2
    assert lines[0] == "config      experiment=study_switches seed=1"
    check(lines, 80, "train.py -m experiment=study_switches seed=1")
