"""A sweep proposes a report on only its own runs."""

from __future__ import annotations

import shlex
from pathlib import Path

from xattn.report.answer import Question
from xattn.report.judge import judge
from xattn.report.propose import report_command
from xattn.report.read import read_study

from .folders import Writer


def test_a_folder_of_these_runs_alone_needs_no_choice(writer: Writer, tmp_path: Path) -> None:
    runs = [writer.run({"backend.activation": arm}, name=arm) for arm in ("softmax", "sigmoid")]
    (writer.folder / "report").mkdir()
    assert report_command(writer.folder, runs) == f"xattn report {writer.folder}"


def test_other_runs_of_the_folder_are_left_out(writer: Writer) -> None:
    """The folder also has another length, seed and activation. A key that only affects logging does not count."""
    ours = [
        writer.run({"backend.activation": arm, "seed": seed, "trainer.log_every": 5}, name=f"{arm}{seed}")
        for arm in ("softmax", "sigmoid")
        for seed in range(2)
    ]
    writer.run({"trainer.steps": 20, "trainer.batch_size": 8, "backend.theta": 7.0}, name="debug")
    writer.run({"backend.activation": "softmax", "seed": 7}, name="seed7")
    writer.run({"backend.activation": "none", "seed": 0}, name="none")
    command = report_command(writer.folder, ours)
    words = shlex.split(command)[3:]
    assert sorted(zip(words[::2], words[1::2], strict=True)) == [
        ("--seeds", "0,1"),
        ("--where", "backend.activation=sigmoid,softmax"),
        ("--where", "backend.theta=10000"),
    ]
    where = {k: v.split(",") for k, v in (word.split("=") for word in words[1::2] if "=" in word)}
    found = judge(read_study(writer.folder), Question(where=where, seeds=["0", "1"]))
    assert {run.folder for run in found.study.runs} == set(ours)


def test_runs_that_nothing_tells_apart_belong_to_the_question(writer: Writer) -> None:
    ours = [writer.run({"seed": 0}, name="a")]
    writer.run({"seed": 0, "trainer.eval_every": 3}, name="b")
    assert report_command(writer.folder, ours) == f"xattn report {writer.folder}"
