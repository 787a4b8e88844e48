"""Configs that train the same: they share an identity at every age, are found in a study, and need no training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import xattn.config
from tests import processes
from tests.quick import composed
from xattn import keys
from xattn.cli import main
from xattn.config import Config, compose
from xattn.errors import BadInput, ExitCode, IntegrityError, Preempted
from xattn.runs import evaluations, run_folder, same_training
from xattn.runs.evaluations import evaluate_once, stored_rows
from xattn.runs.job import Job
from xattn.runs.same_training import Found, Trainings, answer, answered, identity, in_turn
from xattn.sweep import study, workers
from xattn.sweep.packing import is_finished
from xattn.sweep.workers import Seat
from xattn.system.signals import interruption

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"
RUNS = sorted(path.parent for path in (GOLDEN / "runs").glob("*/config.yaml"))
MEASURING = [
    "trainer.log_every=7",
    "trainer.eval_every=7",
    "trainer.attention_stats_every=7",
    "evaluation.sequences=7",
    "evaluation.probes=[in_context]",
]


@pytest.fixture(autouse=True)
def _reads_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_training, "_identities", {})


def typed(folder: Path, *overrides: str) -> list[str]:
    given = {override.partition("=")[0] for override in overrides}
    before = [keys.renamed(override) for override in yaml.safe_load((folder / run_folder.OVERRIDES).read_text())]
    return [*(override for override in before if override.partition("=")[0] not in given), *overrides]


def place(study: Path, config: Config) -> Path:
    return study / xattn.config.run_name(config)


def put(study: Path, config: Config, status: str = "done", **provenance: Any) -> Path:
    folder = place(study, config)
    folder.mkdir(parents=True)
    (folder / run_folder.CONFIG).write_text(xattn.config.save(config))
    values = {"status": status, "step": config.trainer.steps, "val_loss": 1.5, "val_bpb": 2.5}
    run_folder.write_summary(folder, values)
    if provenance:
        (folder / run_folder.PROVENANCE).write_text(json.dumps(provenance))
    return folder


def names(study: Path) -> list[str]:
    return sorted(entry.name for entry in study.iterdir() if not entry.name.startswith("."))


def find(study: Path, config: Config) -> list[Found]:
    job = Job(config, place(study, config))
    return Trainings([job]).find(job)


# ---- the identity ----------------------------------------------------------------------------------------------------


def test_only_keys_that_measure_are_left_out_of_the_identity() -> None:
    """Every other hashed key, changed, is another training; spellings and groups are those of the run's name."""
    config = compose(["trainer=debug"])
    for override in MEASURING:
        other = compose(["trainer=debug", override])
        assert identity(other) == identity(config)
        assert xattn.config.run_hash(other) != xattn.config.run_hash(config)
    values = xattn.config.hashed_values(config)
    measuring = {key for key in values if not keys.changes_training(key, values)}
    assert measuring == {override.partition("=")[0] for override in MEASURING}
    for key in values.keys() - measuring:
        assert keys.training_identity(values | {key: "other"}) != keys.training_identity(values), key
    assert identity(compose(["trainer=debug", "backend.theta=1e4", "study=x"])) == identity(config)


def test_a_run_that_rolls_back_is_another_with_other_evaluations() -> None:
    """Its best evaluation is a checkpoint, which it may go back to."""
    rolls = ["trainer=debug", "trainer.nonfinite=rollback"]
    assert identity(compose([*rolls, "trainer.eval_every=7"])) != identity(compose(rolls))
    assert identity(compose([*rolls, "trainer.log_every=7", "evaluation.sequences=7"])) == identity(compose(rolls))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_config_of_any_age_has_the_identity_of_today(run: Path) -> None:
    """From its YAML alone, as the report reads it."""
    content = yaml.safe_load((run / run_folder.CONFIG).read_text())
    config = xattn.config.load(run / run_folder.CONFIG)
    assert keys.training_identity_of(content) == identity(config) == identity(compose(typed(run)))
    assert keys.training_identity_of(yaml.safe_load(xattn.config.save(config))) == identity(config)


def test_added_renamed_and_removed_keys_keep_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    content = compose(["trainer=debug"]).model_dump(mode="json")
    before = keys.training_identity_of(content)
    monkeypatch.setitem(keys.ABSENT, "model.of_tomorrow", 1e-6)
    monkeypatch.setitem(keys.RENAMED, "backend.theta", "backend.base")
    assert keys.training_identity_of(content) == before
    content["backend"]["base"] = content["backend"].pop("theta")
    content["model"]["of_tomorrow"] = 1e-6
    assert keys.training_identity_of(content) == before
    content["model"]["of_tomorrow"] = 1e-5
    assert keys.training_identity_of(content) != before
    monkeypatch.setitem(keys.REMOVED, "model.of_yesterday", False)
    with pytest.raises(BadInput, match=r"model\.of_yesterday = True: only False"):
        keys.training_identity_of({"model": {"of_yesterday": True}})


# ---- finding ---------------------------------------------------------------------------------------------------------


def test_a_finished_run_of_the_same_training_is_found(tmp_path: Path) -> None:
    """By provenance.json, or by the config.yaml of an older version; and what it leaves to be made."""
    base = ["trainer=debug", "trainer.steps=20", "trainer.log_every=5", "trainer.eval_every=10"]
    config = compose(base)
    recorded = put(tmp_path / "new", config, training_identity=identity(config))
    (recorded / run_folder.CONFIG).write_text(xattn.config.save(config))
    older = put(tmp_path / "old", config)
    for folder in (recorded, older):
        asked = compose([*base, "trainer.log_every=10"])
        summary = run_folder.read_summary(folder) or {}
        assert find(folder.parent, asked) == [Found(folder, summary, (), (), "python_stdlib")]
        assert find(folder.parent, compose([*base, "seed=1"])) == []
        assert find(folder.parent, config) == [], "its own folder holds it"


@pytest.mark.parametrize(
    ("overrides", "measured", "lacking"),
    [
        (["trainer.log_every=10"], [], []),
        (["trainer.log_every=20"], [], []),
        (["trainer.log_every=100"], [], []),
        (["trainer.log_every=3"], [], ["trainer.log_every=3"]),
        (["trainer.eval_every=5"], [], ["trainer.eval_every=5"]),
        (["evaluation.sequences=7"], ["evaluation.sequences=7"], ["evaluation.sequences=7"]),
        (["evaluation.sequences=7", "trainer.eval_every=20"], ["evaluation.sequences=7"], []),
        (["evaluation.probes=[]"], [], []),
        (["evaluation.probes=[]", "evaluation.sequences=7", "trainer.eval_every=20"],
         ["evaluation.sequences=7", "evaluation.probes=[]"], []),
        (["evaluation.probes=[in_context,copying]", "trainer.eval_every=20"],
         ["evaluation.probes=[copying,in_context]"], []),
        (["trainer.attention_stats_every=20"], ["trainer.attention_stats_every=20"], []),
        (["trainer.attention_stats_every=5"], ["trainer.attention_stats_every=5"], ["trainer.attention_stats_every=5"]),
    ],
)  # fmt: skip
def test_what_a_config_wants_beyond_a_run(
    overrides: list[str], measured: list[str], lacking: list[str], tmp_path: Path
) -> None:
    """Rows at steps that the run has too, and probes that it has measured, are there already."""
    base = ["trainer=debug", "trainer.steps=20", "trainer.log_every=5", "trainer.eval_every=10"]
    probes = ["evaluation.probes=[in_context]"]
    put(tmp_path, compose([*base, *probes]))
    given = {override.partition("=")[0] for override in overrides}
    (found,) = find(tmp_path, compose([*base, *(p for p in probes if p.partition("=")[0] not in given), *overrides]))
    assert (list(found.overrides), list(found.lacking)) == (measured, lacking)


def test_the_run_that_leaves_least_to_be_made_comes_first(tmp_path: Path) -> None:
    base = ["trainer=debug", "trainer.steps=20"]
    for every, sequences in ((3, 9), (5, 8), (5, 9)):
        put(tmp_path, compose([*base, f"trainer.log_every={every}", f"evaluation.sequences={sequences}"]))
    asked = compose([*base, "trainer.log_every=10", "evaluation.sequences=9", "trainer.eval_every=20"])
    left = [(found.lacking, found.overrides) for found in find(tmp_path, asked)]
    wants = ("evaluation.sequences=9",)
    assert left == [((), ()), ((), wants), (("trainer.log_every=10",), ())]


def test_a_run_is_not_found_where_it_may_not_answer(tmp_path: Path) -> None:
    config, asked = compose(["trainer=debug"]), compose(["trainer=debug", "trainer.log_every=20"])
    folder = put(tmp_path, config)
    assert find(tmp_path, asked)
    for job in (Job(asked, tmp_path / "by_hand"), Job(asked, place(tmp_path, asked), answerable=False)):
        assert Trainings([job]).find(job) == [], "a folder that was named by hand, and a job that is to be trained"
    never = compose(["trainer=debug", "trainer.log_every=20", "resume=never"])
    assert find(tmp_path, never) == []
    put(tmp_path, asked, "running")
    assert find(tmp_path, asked) == [], "its own run has begun"
    shutil.rmtree(place(tmp_path, asked))
    for status in ("running", "diverged", "failed", "pruned", "preempted"):
        run_folder.write_summary(folder, {"status": status, "step": 20, "val_loss": None, "val_bpb": None})
        assert find(tmp_path, asked) == [], status


def test_files_that_cannot_be_read_hide_no_other_run(tmp_path: Path) -> None:
    """A damaged provenance.json is passed over for the config.yaml; a damaged config.yaml is no run."""
    asked = compose(["trainer=debug", "trainer.log_every=20"])
    folder = put(tmp_path, compose(["trainer=debug"]))
    (folder / run_folder.PROVENANCE).write_text("[1]")
    for name, config in (("a", "\x00"), ("b", "[]"), ("c", "backend: 3"), ("d", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / run_folder.CONFIG).write_text(config)
    (tmp_path / ".superseded").mkdir()
    shutil.copytree(folder, tmp_path / ".superseded" / folder.name)
    assert [found.folder for found in find(tmp_path, asked)] == [folder]
    (folder / run_folder.PROVENANCE).write_text("{")
    same_training._identities.clear()
    assert [found.folder for found in find(tmp_path, asked)] == [folder]
    (folder / run_folder.SUMMARY).write_text("[1]")
    assert find(tmp_path, asked) == []


def test_a_study_is_read_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON first: YAML takes a hundred times as long, and is read of runs without a record alone."""
    configs = [compose(["trainer=debug", f"seed={seed}"]) for seed in range(4)]
    for config in configs[:3]:
        put(tmp_path, config, training_identity=identity(config))
    put(tmp_path, configs[3])
    read: list[Path] = []
    original = run_folder.read_json

    def reading(path: Path) -> dict[str, Any] | None:
        read.append(path)
        return original(path)

    monkeypatch.setattr(run_folder, "read_json", reading)
    loads: list[object] = []
    from_yaml = keys.training_identity_of
    monkeypatch.setattr(keys, "training_identity_of", lambda config: (loads.append(config), from_yaml(config))[1])
    asked = [compose(["trainer=debug", f"seed={seed}", "trainer.log_every=20"]) for seed in range(4)]
    for _ in range(2):
        jobs = [Job(config, place(tmp_path, config)) for config in asked]
        trainings = Trainings(jobs)
        assert all(trainings.find(job) for job in jobs)
    assert [path.name for path in read].count(run_folder.PROVENANCE) == 4
    assert len(loads) == 1


def test_the_first_of_a_training_is_the_one_that_serves_the_others(tmp_path: Path) -> None:
    """A sweep over log_every trains the one with rows at the steps of the others."""
    configs = [compose(["trainer=debug", f"trainer.log_every={n}", f"seed={s}"]) for s in (0, 1) for n in (10, 5, 20)]
    jobs = [Job(config, place(tmp_path, config)) for config in configs]
    assert in_turn(jobs) == ([jobs[1], jobs[4]], [jobs[0], jobs[2], jobs[3], jobs[5]])
    put(tmp_path, configs[2], "preempted")
    assert in_turn(jobs)[0] == [jobs[2], jobs[4]], "one that has begun goes on"
    by_hand = [Job(config, tmp_path / str(i)) for i, config in enumerate(configs)]
    assert in_turn(by_hand) == (by_hand, [])


# ---- answering, from checkpoints of golden runs ----------------------------------------------------------------------


def test_what_is_wanted_is_measured_once_and_kept(outputs: Path) -> None:
    config = compose(typed(RUNS[0], "evaluation.sequences=3", "trainer.eval_every=3"))
    said: list[str] = []
    for _ in range(2):
        found = find(outputs, config)
        assert answer(found, said.append) is found[0]
    first, again = said[:3], said[3:]
    assert first[0].startswith(f"already trained in outputs/golden/{RUNS[0].name}: val_loss")
    assert "(changed since then: " in first[0]
    assert first[1].startswith("measured now, with evaluation.sequences=3: val_loss ")
    assert first[2].startswith(
        "measuring before the last step needs training (evaluation.sequences=3, trainer.eval_every=3)"
    )
    assert "resume=never" in first[2]
    assert again == [first[0], first[1].replace("now", "before"), first[2]]
    (row,) = stored_rows(outputs / RUNS[0].name)
    assert (row["step"], row["overrides"]) == (4, ["evaluation.sequences=3"])
    folder, summary = answered(find(outputs, config)) or (None, {})
    assert folder == outputs / RUNS[0].name
    assert (
        summary["val_loss"]
        == row["results"]["val_loss"]
        != json.loads((RUNS[0] / run_folder.SUMMARY).read_text())["val_loss"]
    )


def test_data_or_checkpoints_that_are_not_what_they_were_are_no_answer(outputs: Path) -> None:
    """Then the config is trained, as it would be without that run; nothing is left in the run's folder."""
    config = compose(typed(RUNS[0], "evaluation.sequences=3"))
    before = names(outputs / RUNS[0].name)
    text = Path("text.txt").read_text()
    Path("text.txt").write_text(text + " and more")
    said: list[str] = []
    assert answer(find(outputs, config), said.append) is None
    assert "the data are not the ones that this run began with" in said[-1]
    Path("text.txt").write_text(text)
    shutil.rmtree(outputs / RUNS[0].name / run_folder.CHECKPOINTS / "4")
    assert answer(find(outputs, config), said.append) is None
    assert "has no intact checkpoint of step 4" in said[-1]
    shutil.rmtree(outputs / RUNS[0].name / run_folder.CHECKPOINTS)
    assert answer(find(outputs, config), said.append) is None
    assert "holds no intact checkpoint" in said[-1]
    assert len(said) == 3
    assert names(outputs / RUNS[0].name) == [name for name in before if name != run_folder.CHECKPOINTS]
    assert answered(find(outputs, config)) is None
    rows_alone = compose(typed(RUNS[0], "trainer.log_every=3"))
    assert answer(find(outputs, rows_alone), said.append) is not None, "nothing is measured for it"


def test_a_request_to_stop_ends_a_measurement(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        interruption._request(15, None)

    monkeypatch.setattr(same_training, "evaluate_once", interrupted)
    try:
        with pytest.raises(Preempted, match="the same command"):
            answer(find(outputs, compose(typed(RUNS[0], "evaluation.sequences=3"))), print)
    finally:
        interruption.requested = False


def test_two_who_ask_the_same_measure_it_once(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first, by the kernel's lock on the file."""
    measured: list[float] = []

    def measure(overrides: Sequence[str], *, config_dir: Path | None) -> dict[str, float]:
        time.sleep(0.2)
        measured.append(1.0)
        return {"val_loss": 1.0}

    monkeypatch.setattr(evaluations, "load", lambda run, checkpoint: SimpleNamespace(step=4, evaluate=measure))
    monkeypatch.setattr(evaluations, "check", lambda run, overrides, config_dir: {"status": "done", "step": 4})
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append(evaluate_once(outputs / RUNS[0].name, ["seed=1"])[1]))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(measured), sorted(found)) == (1, [False, True, True])
    assert len(stored_rows(outputs / RUNS[0].name)) == 1


# ---- a study, with a stand-in for training ---------------------------------------------------------------------------


def jobs_of(folder: Path, *overrides: Sequence[str]) -> list[Job]:
    made = []
    for each in overrides:
        config = composed("trainer=debug", *each)
        made.append(Job(config, place(folder, config), tuple(each)))
    return made


def trainer(folder: Path, monkeypatch: pytest.MonkeyPatch, fails: Sequence[str] = ()) -> list[str]:
    """Replace the training of a pack; return the list that then names what it was to train."""
    trained: list[str] = []

    def start(jobs: Sequence[Job]) -> list[ExitCode]:
        codes = []
        for job in jobs:
            trained.append(job.overrides[0])
            failed = job.overrides[0] in fails
            put(folder, job.config, "failed" if failed else "done")
            codes.append(ExitCode.ERROR if failed else ExitCode.DONE)
        return codes

    monkeypatch.setattr(study, "start", start)
    return trained


def test_jobs_of_one_training_are_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table has the others too, beside the run that answers for them; no folder is made for them."""
    jobs = jobs_of(tmp_path, ["trainer.log_every=5"], ["trainer.log_every=10"], ["trainer.log_every=5", "seed=1"])
    trained = trainer(tmp_path, monkeypatch)
    outcomes = workers.run_study(jobs)
    assert sorted(trained) == ["trainer.log_every=5", "trainer.log_every=5"]
    assert names(tmp_path) == sorted(job.folder.name for job in (jobs[0], jobs[2]))
    assert outcomes == {job.folder: ExitCode.DONE for job in jobs}
    assert study.exit_code(outcomes.values()) == ExitCode.DONE
    out = capsys.readouterr().out
    assert f"log_every=10 seed=0: already trained in {jobs[0].folder}" in out
    (row,) = (line.split() for line in out.splitlines() if line.split()[:2] == ["10", "0"])
    assert (row[2], row[3], row[-1]) == ("done", "1.5000", jobs[0].folder.name)


def test_the_next_is_trained_where_the_first_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of(tmp_path, ["trainer.log_every=5"], ["trainer.log_every=10"], ["trainer.log_every=20"])
    trained = trainer(tmp_path, monkeypatch, fails=["trainer.log_every=5"])
    outcomes = workers.run_study(jobs)
    assert trained == ["trainer.log_every=5", "trainer.log_every=10"]
    assert [outcomes[job.folder] for job in jobs] == [ExitCode.ERROR, ExitCode.DONE, ExitCode.DONE]
    assert study.exit_code(outcomes.values()) == ExitCode.ERROR


def test_what_cannot_be_measured_ends_its_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a run whose data have changed since is no answer: the job is trained."""

    def refused(run: Path, overrides: Sequence[str], **options: Any) -> None:
        raise IntegrityError("other data") if overrides == ("evaluation.sequences=7",) else BadInput("does not fit")

    monkeypatch.setattr(same_training, "evaluate_once", refused)
    jobs = jobs_of(tmp_path, ["seed=0"], ["evaluation.sequences=7"], ["evaluation.probes=[copying]"])
    trained = trainer(tmp_path, monkeypatch)
    outcomes = workers.run_study(jobs)
    assert trained == ["seed=0", "evaluation.sequences=7"]
    assert [outcomes[job.folder] for job in jobs] == [ExitCode.DONE, ExitCode.DONE, ExitCode.BAD_INPUT]
    printed = capsys.readouterr()
    assert "xattn: does not fit" in printed.err
    assert "sequences=7: a run of the same training cannot be used: other data" in printed.out


def test_other_machines_get_each_training_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is to be measured is measured there: this machine may have no device for it. A tuner's trials all go."""
    jobs = jobs_of(tmp_path, ["trainer.log_every=5"], ["trainer.log_every=10"], ["evaluation.sequences=7"])
    launched: list[list[str]] = []

    def launch(now: Sequence[Job]) -> None:
        launched.append([job.overrides[0] for job in now])
        for job in now:
            if job.overrides[0] == "evaluation.sequences=7":  # the job has measured it
                results = {"val_loss": 2.0, "val_bpb": 3.0}
                row = {"step": 20, "overrides": ["evaluation.sequences=7"], "results": results}
                (jobs[0].folder / run_folder.EVALUATIONS).write_text(json.dumps(row) + "\n")
            else:
                put(tmp_path, job.config)

    outcomes = study.run_study_elsewhere(jobs, launch)
    assert launched == [["trainer.log_every=5"], ["evaluation.sequences=7"]]
    assert outcomes == {job.folder: ExitCode.DONE for job in jobs}
    others = jobs_of(tmp_path / "tuned", ["trainer.log_every=5"], ["trainer.log_every=10"])
    handed: list[int] = []
    study.run_study_elsewhere([replace(job, answerable=False) for job in others], lambda now: handed.append(len(now)))
    assert handed == [2]


def test_starting_over_by_several_workers_takes_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There ``resume=never`` is carried out once for all of them, and the job goes on as one that may be resumed."""
    jobs = jobs_of(tmp_path, ["trainer.log_every=5"], ["trainer.log_every=10", "resume=never", "sweep.workers=2"])
    put(tmp_path, jobs[0].config)
    handed: list[Job] = []
    monkeypatch.setattr(workers, "seats", lambda unfinished: [Seat(gpu="0"), Seat(gpu="1")])
    monkeypatch.setattr(workers, "_train_in_processes", lambda jobs, unfinished, *_: handed.extend(unfinished))
    workers.run_study(jobs)
    assert [job.folder for job in handed] == [jobs[1].folder]
    assert Trainings(handed).find(handed[0]) == []


def test_workers_are_for_what_is_to_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No device is asked for where finished runs have it all."""
    jobs = jobs_of(tmp_path, ["trainer.log_every=5"], ["trainer.log_every=10"], ["trainer.log_every=20"])
    put(tmp_path, jobs[0].config)
    looked: list[int] = []
    monkeypatch.setattr(workers, "check_devices", lambda jobs: looked.append(len(jobs)))
    outcomes = workers.run_study(jobs)
    assert looked == [0]
    assert all(outcomes[job.folder] == ExitCode.DONE for job in jobs[1:])
    assert [is_finished(job) for job in jobs] == [True, False, False]


# ---- xattn evaluate of several runs ----------------------------------------------------------------------------------


def test_a_whole_study_is_evaluated(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line a run; what a run's evaluations.jsonl has is not measured again; those that are not done are left out."""
    shutil.copytree(outputs / RUNS[0].name, outputs / "half")
    run_folder.write_summary(outputs / "half", {"status": "preempted", "step": 2})
    words = ["evaluate", str(outputs), "evaluation.sequences=3", "--save"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert [Path(line.split()[0]).name for line in out.splitlines()] == [run.name for run in RUNS]
    assert "not measured again" not in out
    assert "3 of 4 runs are done" in err
    assert main([*words, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["run"] for each in found] == [str(outputs / run.name) for run in RUNS]
    for run, each in zip(RUNS, found, strict=True):
        (row,) = stored_rows(outputs / run.name)
        assert row["results"] == {"val_loss": each["val_loss"], "val_bpb": each["val_bpb"]}
    assert main(words) == 0
    assert capsys.readouterr().out.count("(not measured again)") == 3


def test_a_run_that_fails_does_not_stop_the_others(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is that of the failures where they have one, else 1; a mistake in all is shown once."""
    shutil.rmtree(outputs / RUNS[0].name / run_folder.CHECKPOINTS)
    assert main(["evaluate", str(outputs), "--save"]) == ExitCode.INTEGRITY
    out, err = capsys.readouterr()
    assert [Path(line.split()[0]).name for line in out.splitlines()] == [run.name for run in RUNS[1:]]
    assert "holds no intact checkpoint" in err
    last = [str(outputs / run.name) for run in RUNS]
    assert main(["evaluate", *last, "nowhere"]) == ExitCode.ERROR
    assert "nowhere: not a run folder" in capsys.readouterr().err
    assert main(["evaluate", str(outputs), "evaluation.widows=3"]) == ExitCode.BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 2
    assert "did you mean evaluation.sequences" in err
    assert "2 more" in err
    for run in RUNS:
        run_folder.write_summary(outputs / run.name, {"status": "running", "step": 2})
    assert main(["evaluate", str(outputs)]) == ExitCode.BAD_INPUT
    assert "none of its 3 runs is done" in capsys.readouterr().err


# ---- train.py --------------------------------------------------------------------------------------------------------


def train(*overrides: str, stubs: Path | None = None) -> tuple[int, str]:
    if stubs is None:
        done = processes.train(*overrides, cwd=Path.cwd())
    else:
        command = [sys.executable, str(ROOT / "train.py"), *overrides]
        path = os.pathsep.join([str(stubs), str(ROOT)])
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_command_is_answered_from_the_study(outputs: Path, tmp_path: Path) -> None:
    """jax is imported only to measure, and no folder is left behind; -m does the same."""
    for name in ("jax", "jaxlib", "flax", "optax", "orbax"):
        (tmp_path / "stubs").mkdir(exist_ok=True)
        (tmp_path / "stubs" / f"{name}.py").write_text(f"raise ImportError('{name} was imported')\n")
    before = names(outputs)
    code, out = train(*typed(RUNS[0], "trainer.log_every=3"), stubs=tmp_path / "stubs")
    assert code == ExitCode.DONE, out
    assert f"already trained in outputs/golden/{RUNS[0].name}" in out
    code, out = train(*typed(RUNS[0], "evaluation.sequences=3"))
    assert code == ExitCode.DONE, out
    assert "measured now, with evaluation.sequences=3" in out
    words = typed(RUNS[0], "evaluation.sequences=3", "trainer.log_every=2,4")
    code, out = train("-m", *words, stubs=tmp_path / "stubs")
    assert code == ExitCode.DONE, out
    assert out.count("measured before, with evaluation.sequences=3") == 2
    assert names(outputs) == before
    Path("text.txt").unlink()
    code, out = train(*typed(RUNS[0], "evaluation.sequences=2"))
    assert code == ExitCode.BAD_INPUT, out
    assert names(outputs) == before


@pytest.mark.slow
def test_other_data_are_trained_on(outputs: Path) -> None:
    Path("text.txt").write_text(Path("text.txt").read_text() + " and more")
    code, out = train(*typed(RUNS[0], "evaluation.sequences=3"))
    assert code == ExitCode.DONE, out
    assert "a run of the same training cannot be used" in out
    (new,) = set(names(outputs)) - {run.name for run in RUNS}
    recorded: Any = run_folder.read_provenance(outputs / new)
    assert recorded["training_identity"] == keys.training_identity_of(
        yaml.safe_load((RUNS[0] / run_folder.CONFIG).read_text())
    )


@pytest.mark.slow
def test_keys_that_measure_change_no_bit_of_training(text_file: Path, tmp_path: Path) -> None:
    """What the identity stands on, with all of them changed at once: batches, updates and checkpoints are the same."""
    from xattn.runs.desk import run

    small = [
        *("data=text", f"data.path={text_file}", "data.tokenizer=bpe", "data.vocab_size=300"),
        "tracking.wandb.mode=disabled",
        *("trainer=debug", "trainer.steps=6", "model.dropout=0.1"),
        *("backend.context_length=16", "evaluation.sequences=8"),
        *("model.embedding_dim=16", "model.num_heads=2", "model.num_layers=1", "model.mlp_dim=16"),
    ]
    hashes, stored = set(), set()
    for number, overrides in enumerate(([], [*MEASURING[:1], "trainer.eval_every=2", *MEASURING[2:]])):
        config, folder = compose([*small, *overrides]), tmp_path / str(number)
        assert run(config, folder, quiet=True) == ExitCode.DONE
        summary: Any = run_folder.read_summary(folder)
        provenance: Any = run_folder.read_provenance(folder)
        hashes.add((summary["state_sha256"], provenance["data_sha256"], summary["train_loss"]))
        stored.add((provenance["training_identity"], identity(config)))
    assert len(hashes) == len(stored) == 1
