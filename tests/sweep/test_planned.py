"""The plan that a sweep leaves: what is missing, the command that continues it, and ``xattn resume``."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

import xattn.config
from tests import processes
from tests.quick import composed
from xattn.errors import BadInput, ExitCode
from xattn.runs import run_folder
from xattn.runs.job import Job
from xattn.sweep import planned, resume, runs, study, workers
from xattn.sweep.planned import Plan, sweeps_of, unfinished

ROOT = Path(xattn.__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder with a train.py, where a sweep is typed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    type_(monkeypatch, "seed=range(12)")
    return tmp_path


def type_(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "train.py", "-m", *arguments])


def jobs_of(seeds: Sequence[int], *overrides: str) -> list[Job]:
    configs = [composed("trainer=debug", f"seed={seed}", *overrides) for seed in seeds]
    return [Job(config, Path("outputs/s") / xattn.config.run_name(config)) for config in configs]


def finish(job: Job, status: str = "done") -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / run_folder.CONFIG).write_text(xattn.config.save(job.config))
    run_folder.write_summary(job.folder, {"status": status, "step": 20, "val_loss": 1.5, "val_bpb": 1.5})


def keep(jobs: Sequence[Job], *, grows: bool = False, answered: Sequence[Job] = ()) -> None:
    plan = Plan(grows=grows)
    plan.add(jobs)
    plan.answered(job.folder for job in answered)
    plan.write()


STUDY = Path("outputs/s")


def test_what_is_missing_and_the_command_that_continues_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = jobs_of(range(12))
    keep(jobs)
    for job, status in zip(jobs, ["done", "diverged", "pruned", "done", "done", "failed", "preempted"], strict=False):
        finish(job, status)
    assert runs.main([]) == 0
    out = capsys.readouterr().out
    assert "5 of 12 planned runs done, 1 failed; continue with python train.py -m 'seed=range(12)'\n" in out
    assert "or with xattn resume outputs/s\n" in out
    assert runs.main(["--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["studies"]
    command = "python train.py -m 'seed=range(12)'"
    assert found["sweeps"] == [{"command": command, "planned": 12, "done": 5, "complete": False}]
    for job in jobs:
        finish(job)
    assert runs.main([]) == 0
    assert "planned" not in capsys.readouterr().out, "a sweep that is complete is not mentioned"


def test_a_sweep_of_which_nothing_has_begun_is_shown_too(capsys: pytest.CaptureFixture[str]) -> None:
    keep(jobs_of(range(3)))
    assert runs.main([]) == 0
    assert "0 of 3 planned runs done" in capsys.readouterr().out


def test_a_run_that_another_one_answers_for_is_not_missing(here: Path) -> None:
    """It has no folder of its own. The sweep that finds it answered records that in the plan, and it stays there."""
    jobs = jobs_of(range(2))
    keep(jobs)
    finish(jobs[0])
    assert [sweep.done for sweep in sweeps_of(STUDY)] == [1]
    keep(jobs, answered=jobs[1:])
    keep(jobs)  # the same command again
    assert unfinished(STUDY) == []


def test_a_sweep_says_at_its_end_which_runs_are_answered_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [*jobs_of([0]), *jobs_of([0], "trainer.log_every=20")]
    plan = Plan()
    plan.add(jobs)
    plan.write()
    assert [sweep.says for sweep in unfinished(STUDY)] == ["0 of 2 planned runs done"]

    def start(pack: Sequence[Job]) -> list[ExitCode]:
        for job in pack:
            finish(job)
        return [ExitCode.DONE] * len(pack)

    monkeypatch.setattr(study, "start", start)
    workers.run_study(jobs, plan)
    assert "already trained in" in capsys.readouterr().out
    assert unfinished(STUDY) == []


def test_a_command_that_finds_everything_done_leaves_no_plan() -> None:
    jobs = jobs_of(range(2))
    for job in jobs:
        finish(job)
    keep(jobs)
    assert not list(STUDY.glob(".sweep-*"))
    keep([*jobs, *jobs_of([7])])
    assert [sweep.says for sweep in unfinished(STUDY)] == ["2 of 3 planned runs done"]


def test_two_terminals_with_one_command_keep_one_plan() -> None:
    keep(jobs_of(range(2)))
    keep(jobs_of(range(2)))
    assert len(list(STUDY.glob(".sweep-*"))) == 1
    assert not list(STUDY.glob("*.tmp"))


def test_of_sweeps_that_contain_one_another_the_larger_one_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(jobs_of(range(2)))
    type_(monkeypatch, "seed=0,1,2")
    keep(jobs_of(range(3)))
    type_(monkeypatch, "seed=7,8")
    keep(jobs_of([7, 8]))
    assert sorted(sweep.typed.split()[-1] for sweep in unfinished(STUDY)) == ["seed=0,1,2", "seed=7,8"]


def test_what_is_to_start_over_is_continued_without_starting_over_again(monkeypatch: pytest.MonkeyPatch) -> None:
    type_(monkeypatch, "seed=0,1", "resume=never")
    keep(jobs_of(range(2), "resume=never"))
    (sweep,) = unfinished(STUDY)
    assert shlex.split(sweep.typed)[2:] == ["-m", "seed=0,1", "resume=auto"]


def test_a_plan_that_grows_is_complete_only_when_it_has_grown() -> None:
    """This is for seeds on demand: their number follows from the first ones."""
    jobs = jobs_of(range(2))
    keep(jobs, grows=True)
    for job in jobs:
        finish(job)
    assert [sweep.says for sweep in unfinished(STUDY)] == ["2 of 2 planned runs done, more seeds may follow"]
    keep(jobs)
    assert unfinished(STUDY) == []


def test_a_tuner_counts_its_trials() -> None:
    planned.write_trials(STUDY.absolute(), 20, 7)
    assert [sweep.says for sweep in unfinished(STUDY)] == ["7 of 20 planned runs done"]
    planned.write_trials(STUDY.absolute(), 20, 20)
    assert unfinished(STUDY) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"command": 1}', '{"command": [], "cwd": ".", "started_at": ""}'])
def test_a_file_that_is_no_plan_is_left_out(content: str) -> None:
    STUDY.mkdir(parents=True)
    (STUDY / ".sweep-0123456789.json").write_text(content)
    assert sweeps_of(STUDY) == []


def test_a_study_that_was_moved_is_continued_where_it_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(jobs_of(range(2)))
    moved = here.with_name(f"{here.name}-moved")
    here.rename(moved)
    monkeypatch.chdir("/")
    (sweep,) = unfinished(moved / STUDY)
    assert sweep.cwd == moved
    assert sweep.typed.startswith(f"cd {run_folder.shown(moved)} && python train.py -m")


def test_resume_takes_the_place_of_its_process(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(range(2))
    keep(jobs)
    started: list[tuple[str, list[str], Path]] = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append((program, words, Path.cwd())))
    monkeypatch.chdir(here / "outputs")
    resume.main(["s"])
    assert started == [(sys.executable, [sys.executable, "train.py", "-m", "seed=range(12)"], here)]
    monkeypatch.chdir(here)
    for job in jobs:
        finish(job)
    assert resume.main([str(STUDY)]) == 0
    assert len(started) == 1
    assert "all planned runs are done" in capsys.readouterr().out


def test_what_cannot_be_resumed_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs_of([0])
    finish(job)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started"))
    for folder, told in (
        ("nowhere", "nowhere: no such folder"),
        (str(job.folder), "is a run, but this command continues a study"),
        ("outputs/s", "holds no plan of a sweep"),
    ):
        with pytest.raises(BadInput, match=told):
            resume.main([folder])
    keep(jobs_of(range(2)))
    (here / "train.py").unlink()
    with pytest.raises(BadInput, match=r"train\.py: no such file, but it started this sweep"):
        resume.main([str(STUDY)])


@pytest.mark.slow
def test_a_sweep_that_lacks_a_run_makes_it_when_it_is_resumed(tiny: list[str], here: Path) -> None:
    """In real processes, ``-m``, ``xattn runs`` and ``xattn resume`` all use the same plan."""
    run = partial(processes.run, cwd=here)
    (here / "train.py").write_bytes((ROOT / "train.py").read_bytes())
    done = run("train.py", "-m", *tiny, "seed=0,1", "study=s")
    assert done.returncode == 0, done.stderr
    assert "planned" not in run("-m", "xattn.cli", "runs").stdout
    lost = sorted(STUDY.glob("*-seed1-*"))[0]
    lost.rename(here / "elsewhere")
    assert "1 of 2 planned runs done; continue with " in run("-m", "xattn.cli", "runs").stdout
    resumed = run("-m", "xattn.cli", "resume", "outputs/s")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((lost / "summary.json").read_text())["status"] == "done"
