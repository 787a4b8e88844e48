"""Reading run folders, intact and damaged."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import xattn.config
from xattn.errors import BadInput
from xattn.report.defaults import conf_defaults
from xattn.report.read import flatten, read_run, read_study

from .folders import Writer


def test_a_run_is_read(writer: Writer) -> None:
    run = read_run(writer.run({"backend.activation": "sigmoid", "seed": 3}, 1.75, rows=40))
    assert (run.status, run.seed, run.config["backend.activation"]) == ("done", 3, "sigmoid")
    assert run.result("val_loss") == 1.75
    assert run.command == "python train.py backend.activation=sigmoid seed=3"
    assert run.tokens_per_step == 16 * 128
    assert run.curves["step"].tolist() == list(range(5, 201, 5))
    assert np.isnan(run.curves["val_loss"]).sum() == 30
    assert run.curves["val_loss"][-1] == pytest.approx(1.75, abs=0.01)
    assert not run.problems


def test_a_command_is_quoted_for_a_shell(writer: Writer) -> None:
    path = writer.run({"seed": 0})
    (path / "overrides.yaml").write_text("- 'data.path=\"/a folder/x\"'\n")
    assert read_run(path).command == "python train.py 'data.path=\"/a folder/x\"'"


def test_a_row_that_is_being_written_is_left_out(writer: Writer) -> None:
    path = writer.run({"seed": 0}, rows=10)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 250, "train_lo')
    run = read_run(path)
    assert run.curves["step"].size == 10
    assert not run.problems


def test_damaged_files_are_said_and_the_rest_is_read(writer: Writer) -> None:
    path = writer.run({"seed": 0}, rows=10)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (path / "provenance.json").write_text("{")
    (path / "overrides.yaml").write_bytes(b"\xff\xfe")
    run = read_run(path)
    assert run.curves["step"].size == 9
    assert run.problems == (
        "overrides.yaml is not readable",
        "provenance.json is not readable",
        "metrics.jsonl has 1 line that is not JSON",
    )


def test_null_and_missing_numbers_are_nan(writer: Writer) -> None:
    path = writer.run({"seed": 0})
    (path / "metrics.jsonl").write_text('{"step": 1, "train_loss": null}\n{"step": 2, "grad_norm": "large"}\n[]\n')
    curves = read_run(path).curves
    assert curves["step"].tolist() == [1, 2]
    assert np.isnan(curves["train_loss"]).all()
    assert np.isnan(curves["grad_norm"]).all()


@pytest.mark.parametrize(("held", "status"), [(True, "running"), (False, "killed")])
def test_a_run_that_says_running_is_killed_where_nobody_holds_it(writer: Writer, held: bool, status: str) -> None:
    path = writer.run({"seed": 0}, status="running")
    lock = os.open(path / ".lock", os.O_CREAT | os.O_RDWR)
    if held:
        fcntl.flock(lock, fcntl.LOCK_EX)
    run = read_run(path)
    os.close(lock)
    assert run.status == status
    assert run.result("val_loss") is None


def test_a_study_passes_over_what_is_no_run(writer: Writer) -> None:
    writer.run({"seed": 0}, name="b")
    writer.run({"seed": 1}, name="a")
    for name in ("foreign", "report", ".superseded"):
        (writer.folder / name).mkdir()
    (writer.folder / "multirun.yaml").write_text("x: 1")
    study = read_study(writer.folder)
    assert [run.name for run in study.runs] == ["a", "b"]
    assert study.foreign == ("foreign",)


def test_no_study_is_bad_input(tmp_path: Path, writer: Writer) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        read_study(tmp_path / "nothing")
    with pytest.raises(BadInput, match="no run in it"):
        read_study(writer.folder)
    with pytest.raises(BadInput, match="not a run folder"):
        read_run(writer.folder)


def test_evaluations_are_read(writer: Writer) -> None:
    path = writer.run({"seed": 0})
    row = {"step": 200, "overrides": ["evaluation.sequences=all"], "results": {"val_loss": 1.5}}
    (path / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    assert read_run(path).evaluations == (row,)


def test_the_defaults_are_those_that_hydra_composes() -> None:
    composed = dict(flatten(xattn.config.compose().model_dump(mode="json")))
    assert conf_defaults() == composed


def test_the_report_imports_no_jax_and_nothing_else_of_xattn() -> None:
    code = (
        "import sys; from xattn.report import command, compare, decide, simulate; "
        "print(*sorted(m for m in sys.modules if m.split('.')[0] in ('jax', 'hydra', 'omegaconf', 'wandb') "
        "or m.startswith('xattn')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in loaded if not name.startswith("xattn.report")} == {
        "xattn",
        "xattn.runs",
        "xattn.system",
        "xattn.system.arguments",
        "xattn.system.entry",
        "xattn.errors",
        "xattn.keys",
        "xattn.metrics",
        "xattn.registry",
        "xattn.runs.run_folder",
        "xattn.system.screen",
        "xattn.section",
    }


@pytest.mark.slow
def test_runs_of_10000_rows_are_read_in_time(writer: Writer) -> None:
    """A run takes a tenth of a second, so 200 take 20 seconds. The time for figures does not grow with the runs."""
    from xattn.report.answer import Question
    from xattn.report.command import write
    from xattn.report.judge import judge

    first = writer.run({"seed": 0, "trainer.steps": 10_000}, 2.0, rows=10_000)
    for seed in range(4):
        for theta in range(1, 6):
            if (seed, theta) != (0, 1):
                keys = {"seed": seed, "backend.theta": float(theta), "trainer.steps": 10_000}
                path = writer.run(keys, 2.0 + theta / 100 + seed / 1e3, rows=1)
                (path / "metrics.jsonl").unlink()
                (path / "metrics.jsonl").hardlink_to(first / "metrics.jsonl")
    start = time.process_time()  # for one thread it equals wall time, and is fair on a busy machine
    study = read_study(writer.folder)
    read = time.process_time() - start
    write(judge(study, Question()), writer.folder / "report")
    assert len(study.runs) == 20
    assert all(run.curves["step"].size == 10_000 for run in study.runs)
    assert read < 2
    assert time.process_time() - start < 10


def test_rows_that_a_crash_repeated_or_moved_are_read_once_and_in_order(writer: Writer) -> None:
    """Also, a byte that is not UTF-8, or NULs, cost one line and not the curves."""
    path = writer.run({"seed": 0})
    rows = [
        '{"step": 2, "train_loss": 9.0}',
        '{"step": 1, "train_loss": 3.0}',
        "\0\0\0",
        '{"step": 2, "train_loss": 2.0}',
    ]
    content = "".join(f"{row}\n" for row in rows).encode() + b'{"step": 3, "train\xff_loss": 1.0}\n{"step": 4\xff}\n'
    (path / "metrics.jsonl").write_bytes(content)
    run = read_run(path)
    assert run.curves["step"].tolist() == [1, 2, 3]
    assert run.curves["train_loss"].tolist()[:2] == [3.0, 2.0]
    assert run.problems == ("metrics.jsonl has 2 lines that are not JSON",)
