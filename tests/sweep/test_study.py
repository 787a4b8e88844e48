"""What a study starts, skips and waits for, and in which order, with a stand-in for the run."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import pytest

import xattn.config
from tests.quick import composed
from xattn.errors import ExitCode
from xattn.runs import run_folder
from xattn.runs.job import Job
from xattn.sweep import runs, study, view, workers
from xattn.sweep.packing import is_finished
from xattn.sweep.view import StudyView
from xattn.system.signals import interruption

Start = Callable[[Sequence[Job]], Sequence[ExitCode]]


def run_study(jobs: Sequence[Job], start: Start) -> study.Outcomes:
    with mock.patch.object(study, "start", start):
        return workers.run_study(jobs)


def jobs_of(outputs: Path, *overrides: Sequence[str]) -> list[Job]:
    made = []
    for typed in overrides:
        config = composed("trainer=debug", *typed)
        made.append(Job(config, outputs / "default" / xattn.config.run_name(config), tuple(typed)))
    return made


def finish(job: Job, status: str = "done", val_loss: float | None = 1.5) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / run_folder.CONFIG).write_text(xattn.config.save(job.config))
    run_folder.write_summary(job.folder, {"status": status, "step": 20, "val_loss": val_loss, "val_bpb": val_loss})


def recorder(codes: Callable[[Job], ExitCode]) -> tuple[list[tuple[str, ...]], Start]:
    started: list[tuple[str, ...]] = []

    def start_one(job: Job) -> ExitCode:
        started.append(job.overrides)
        code = codes(job)
        if code in (ExitCode.DONE, ExitCode.DIVERGED):
            finish(job, code.name.lower(), 1.5 if code == ExitCode.DONE else None)
        return code

    return started, lambda jobs: [start_one(job) for job in jobs]


def test_what_is_done_or_diverged_is_not_started_again(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, ["seed=0"], ["seed=1"], ["seed=2"], ["seed=3"])
    finish(jobs[0])
    finish(jobs[1], "diverged", None)
    finish(jobs[2], "preempted")
    started, start = recorder(lambda job: ExitCode.DONE)
    run_study(jobs, start)
    assert sorted(started) == [("seed=2",), ("seed=3",)]


def test_resume_never_starts_what_is_done_again(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, ["seed=0", "resume=never"])
    finish(jobs[0])
    started, start = recorder(lambda job: ExitCode.DONE)
    run_study(jobs, start)
    assert started == [("seed=0", "resume=never")]


def test_jobs_of_one_program_follow_each_other(tmp_path: Path) -> None:
    """Otherwise a study with more programs than the process keeps would compile them repeatedly."""
    order = [[f"backend={b}", f"seed={s}"] for s in (0, 1) for b in ("softmax", "sigmoid", "none")]
    started, start = recorder(lambda job: ExitCode.DONE)
    run_study(jobs_of(tmp_path, *order), start)
    backends = [typed[0] for typed in started]
    assert len(backends) == 6
    assert all(backends[i] == backends[i + 1] for i in (0, 2, 4))


def test_runs_are_made_in_the_order_typed(tmp_path: Path) -> None:
    """Runs of one program still follow each other."""
    order = [[f"backend={b}", f"seed={s}"] for b in ("softmax", "none", "sigmoid") for s in (1, 0)]
    started, start = recorder(lambda job: ExitCode.DONE)
    run_study(jobs_of(tmp_path, *order), start)
    assert [list(typed) for typed in started] == order


def test_a_report_is_proposed_on_each_study_of_the_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = jobs_of(tmp_path, ["seed=0"], ["seed=1"], ["seed=2"])
    jobs[1:] = [dataclasses.replace(job, folder=tmp_path / "other" / job.folder.name) for job in jobs[1:]]
    run_study(jobs, recorder(lambda job: ExitCode.DONE)[1])
    proposed = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "xattn report" in line]
    assert proposed == [str(tmp_path / "default"), str(tmp_path / "other")]


def test_one_that_fails_is_told_of_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started, start = recorder(lambda job: ExitCode.ERROR if job.config.seed == 1 else ExitCode.DONE)
    run_study(jobs_of(tmp_path, ["seed=0"], ["seed=1"], ["seed=2"]), start)
    assert len(started) == 3
    assert "seed=1: error" in capsys.readouterr().out


def test_one_that_another_process_has_failed_is_not_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise three processes would use up its three attempts. A later command tries it again."""
    jobs = jobs_of(tmp_path, ["seed=0"], ["seed=1"])

    def fail_the_other(job: Job) -> ExitCode:
        (other,) = (each for each in jobs if each is not job and each.overrides != job.overrides)
        finish(other, "failed")
        run_folder.write_summary(other.folder, {"status": "failed", "failures": {"count": 1, "step": 0}})
        return ExitCode.DONE

    started, start = recorder(fail_the_other)
    outcomes = run_study(jobs, start)
    assert len(started) == 1
    assert "failed in another process" in capsys.readouterr().out
    assert sorted(outcomes[job.folder] for job in jobs) == [ExitCode.DONE, ExitCode.ERROR]
    started, start = recorder(lambda job: ExitCode.DONE)
    run_study(jobs, start)
    assert len(started) == 1


def test_one_that_had_failed_and_another_process_has_made_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its old failure then disappears from its summary, which is not a new failure."""
    jobs = jobs_of(tmp_path, ["seed=0"], ["seed=1"])
    for job in jobs:
        finish(job, "failed")
        run_folder.write_summary(job.folder, {"status": "failed", "failures": {"count": 1, "step": 0}})

    def make_the_other(job: Job) -> ExitCode:
        finish(next(other for other in jobs if other.folder != job.folder))
        return ExitCode.DONE

    run_study(jobs, recorder(make_the_other)[1])
    assert "failed in another process" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", '"done"', "null"])
def test_a_summary_that_cannot_be_read_hides_no_other_run(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(tmp_path, ["seed=0"], ["seed=1"])
    finish(jobs[0])
    finish(jobs[1])
    (jobs[0].folder / run_folder.SUMMARY).write_text(text)
    runs.main([str(tmp_path), str(tmp_path / "default")])
    out = capsys.readouterr().out
    assert "default: 2 runs" in out
    assert "summary not readable" in out
    assert jobs[1].folder.name in out
    assert out.count(jobs[1].folder.name) == 1
    runs.main([str(jobs[1].folder)])
    assert jobs[1].folder.name in capsys.readouterr().out


@pytest.mark.parametrize(
    "broken",
    [
        {run_folder.CONFIG: "[]", run_folder.PROVENANCE: '"text"'},
        {run_folder.SUMMARY: '{"status": "done", "val_loss": "low", "tokens_per_second": [1]}'},
        {run_folder.SUMMARY: '{"status": 3}'},
    ],
)
def test_values_of_another_type_hide_no_other_run(
    broken: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(tmp_path, ["seed=0"], ["seed=1"])
    for job in jobs:
        finish(job)
    for name, text in broken.items():
        (jobs[0].folder / name).write_text(text)
    runs.main([str(tmp_path / "default")])
    out = capsys.readouterr().out
    assert jobs[0].folder.name in out
    assert jobs[1].folder.name in out


def test_what_others_make_can_be_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A signal ends the wait for another launcher's jobs. A failed job is reported with its log."""
    jobs = jobs_of(tmp_path, ["seed=0"], ["seed=1"])

    def launch(unfinished: Sequence[Job]) -> None:
        finish(unfinished[0], "failed")
        (unfinished[0].folder / run_folder.LOG).write_text("why")
        finish(unfinished[1])

    study.run_study_elsewhere(jobs, launch)
    err = capsys.readouterr().err
    assert f"{jobs[0].folder.name}: failed; see " in err
    assert "log.txt" in err

    def wait(unfinished: Sequence[Job]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with interruption.listening(), pytest.raises(SystemExit) as left:
        study.run_study_elsewhere(jobs, wait)
    asked, interruption.requested = interruption.requested, False
    assert asked
    assert left.value.code == ExitCode.PREEMPTED
    assert "the same command continues" in capsys.readouterr().out


def test_one_in_use_is_waited_for_and_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is held twice, and then free because its process died. So it is made here, after everything else."""
    monkeypatch.setattr(study, "_POLL_SECONDS", 0.0)
    held = iter([ExitCode.IN_USE, ExitCode.IN_USE])
    started, start = recorder(lambda job: next(held, ExitCode.DONE) if job.config.seed == 0 else ExitCode.DONE)
    jobs = jobs_of(tmp_path, ["seed=0"], ["seed=1"])
    run_study(jobs, start)
    assert started.count(("seed=0",)) == 3
    assert all(is_finished(job) for job in jobs)


def test_one_in_use_that_its_process_finishes_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "_POLL_SECONDS", 0.0)
    jobs = jobs_of(tmp_path, ["seed=0"], ["seed=1"])

    def codes(job: Job) -> ExitCode:
        if job.config.seed == 0:
            return ExitCode.IN_USE
        finish(jobs[0])  # meanwhile the other process finishes
        return ExitCode.DONE

    started, start = recorder(codes)
    run_study(jobs, start)
    assert started.count(("seed=0",)) == 1


def test_a_study_that_is_stopped_shows_the_table_of_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(jobs: Sequence[Job]) -> list[ExitCode]:
        if jobs[0].config.seed == 1:
            raise SystemExit(75)
        finish(jobs[0], val_loss=1.2345)
        return [ExitCode.DONE]

    with pytest.raises(SystemExit):
        run_study(jobs_of(tmp_path, ["seed=0"], ["seed=1"]), start)
    out = capsys.readouterr().out
    assert "1.2345" in out
    assert re.search(r"^1 +not begun", out, re.MULTILINE)  # seed=1


def test_the_table_has_the_best_first_and_the_keys_that_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = jobs_of(tmp_path, ["backend=sigmoid"], ["backend=none"], ["backend=softmax"])
    for job, loss in zip(jobs, (1.7, None, 1.5), strict=True):
        finish(job, "done" if loss else "diverged", loss)
    assert runs.main([str(tmp_path)]) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("default: 3 runs")
    assert lines[1].split()[:3] == ["activation", "status", "val_loss"]
    assert [line.split()[0] for line in lines[2:5]] == ["softmax", "sigmoid", "none"]


def test_equals_stand_in_the_order_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = jobs_of(tmp_path, *([f"seed={seed}"] for seed in (3, 1, 2)))
    run_study(jobs, recorder(lambda job: ExitCode.DONE if job.config.seed != 3 else ExitCode.ERROR)[1])
    _, *lines = capsys.readouterr().out.splitlines()  # the first counts the runs
    rows = [line.split()[0] for line in lines if line.endswith(tuple("0123456789abcdef"))]
    assert [row for row in rows if row in "123"] == ["1", "2", "3"]  # the last has no loss
    finish(jobs[0])
    run_study(jobs, recorder(lambda job: ExitCode.DONE)[1])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if " done " in line and "-seed" in line] == ["3", "1", "2"]


def test_runs_whose_tokens_differ_are_compared_by_bits_per_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This holds for each run's line and both tables (a bpe token costs more loss, but there are fewer tokens)."""
    jobs = jobs_of(tmp_path, ["data.tokenizer=bytes"], ["data.tokenizer=bpe"])

    def start(pack: Sequence[Job]) -> list[ExitCode]:
        for job in pack:
            finish(job, "done")
            loss = (2.0, 2.9) if job is not jobs[0] and job.config.data.tokenizer == "bpe" else (1.5, 3.1)
            summary = {"status": "done", "step": 20, "val_loss": loss[0], "val_bpb": loss[1]}
            run_folder.write_summary(job.folder, summary)
        return [ExitCode.DONE] * len(pack)

    run_study(jobs, start)
    runs.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "tokenizer=bpe: done, val_bpb 2.9000" in out
    tables = out[out.index("tokenizer  status") :].split("tokenizer  status")[1:]
    assert len(tables) == 2
    for table in tables:
        header, first, second = table.splitlines()[:3]
        assert header.split()[0] == "val_bpb"
        assert (first.split()[:3], second.split()[:3]) == (["bpe", "done", "2.9000"], ["bytes", "done", "3.1000"])


def test_the_yaml_files_of_hydra_are_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (job,) = jobs_of(tmp_path, ["seed=0"])
    finish(job)
    (job.folder / ".hydra").mkdir()
    for name in ("config.yaml", "hydra.yaml"):
        (job.folder / ".hydra" / name).touch()
    runs.main([str(job.folder.parent)])
    assert "1 run\n" in (out := capsys.readouterr().out)
    assert ".hydra" not in out


def test_a_config_that_cannot_be_read_hides_no_other_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = jobs_of(tmp_path, ["seed=0"], ["seed=1"])
    for job in jobs:
        finish(job, "done", 1.5)
    with (jobs[0].folder / run_folder.CONFIG).open("a") as file:
        file.write("key_of_tomorrow: 1\n")
    assert runs.main([str(tmp_path)]) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    (odd,) = (line for line in lines if jobs[0].folder.name in line)
    assert "config of another version" in odd
    assert "1.5000" in odd


def test_one_that_is_stopped_has_not_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def start(jobs: Sequence[Job]) -> list[ExitCode]:
        finish(jobs[0], "preempted", None)
        interruption.requested = True
        return [ExitCode.PREEMPTED]

    try:
        with pytest.raises(SystemExit) as left:
            run_study(jobs_of(tmp_path, ["seed=0"], ["seed=1"]), start)
    finally:
        interruption.requested = False
    assert left.value.code == ExitCode.PREEMPTED
    out = capsys.readouterr().out
    assert "seed=0: stopped at step" in out
    assert "failed" not in out
    assert "the same command continues" in out


def test_the_view_tells_how_long_the_rest_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The estimate uses only this process's work: for a resumed run, only the steps since it was resumed."""
    now = [100.0]
    monkeypatch.setattr(view.time, "monotonic", lambda: now[0])
    shown = StudyView(4, 1)
    line = shown._progress.tasks[0]
    shown.began(["seed=1"], 20, 10)
    assert line.description == "1 of 4 done, 1 running"
    now[0] += 30  # compiling, which does not count for the rest
    shown.log({"step": 12, "train_loss": 2.0})
    now[0] += 10
    shown.log({"step": 15, "train_loss": 2.0})
    assert (line.description, line.fields["tail"]) == (
        "1 of 4 done, 1 running",
        "about 2:30 left",
    )  # two and a quarter runs to go
    now[0] += 10
    shown.ended("seed=1", "done")  # half a run in 50 s
    assert "seed=1: done   2 to go, about 3:20 left" in capsys.readouterr().out
    shown.began(["seed=2", "seed=3"], 20)
    shown.ended("seed=2", "diverged")
    shown.ended("seed=3", "error", failed=True)
    assert line.description == "3 of 4 done, 1 failed"
    assert line.finished


def _hold(path: str, ready: multiprocessing.Queue[bool], leave: multiprocessing.Queue[bool]) -> None:
    folder = run_folder.RunFolder(Path(path))
    ready.put(True)
    leave.get(timeout=60)
    folder.release()


def test_a_run_that_nobody_holds_is_shown_as_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (job,) = jobs_of(tmp_path, ["seed=0"])
    finish(job, "running", None)
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Queue(), context.Queue()
    process = context.Process(target=_hold, args=(str(job.folder), ready, leave))
    process.start()
    ready.get(timeout=60)
    runs.main([str(tmp_path)])
    assert "running" in capsys.readouterr().out
    leave.put(True)
    process.join(60)
    runs.main([str(tmp_path)])
    assert "killed" in capsys.readouterr().out
