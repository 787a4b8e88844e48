"""``python train.py`` as users and scripts see it: real processes, exit codes, the contract of the run folder."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import xattn
from tests import processes
from xattn import config as xconfig
from xattn.data.batches import Batching, HeldOutBatches
from xattn.data.corpus import load_corpus

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    *("trainer=debug", "tracking.wandb.mode=disabled", "model.embedding_dim=16", "model.num_layers=1"),
    *("model.num_heads=2", "model.mlp_dim=16", "backend.context_length=16", "evaluation.sequences=8"),
]
WALL_CLOCK = {"tokens_per_second", "compile_seconds", "wall_seconds"}


@pytest.fixture(scope="module")
def without_jax(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that, in front on the path, makes importing jax and its friends an error."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("jax", "jaxlib", "flax", "optax", "orbax", "wandb"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} was imported')\n")
    return str(folder)


def path_with(*folders: str) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, [*folders, str(ROOT), os.environ.get("PYTHONPATH")]))}


def start(*overrides: str, cwd: Path) -> subprocess.Popen[str]:
    """Start a process of its own, as a shell does."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        cwd=cwd,
        env=os.environ | path_with() | {"PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(*overrides: str, cwd: Path, stubs: str = "") -> tuple[int, str, str]:
    """Return the exit code, standard output and standard error. The stubs are a folder of modules that replace jax."""
    if stubs:
        command = str(ROOT / "train.py"), *overrides
        done = processes.run(*command, cwd=cwd, env=os.environ | path_with(stubs), has_jax=False)
    else:
        done = processes.train(*overrides, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def run_of(cwd: Path, study: str = "default") -> Path:
    """The one run of a study."""
    (folder,) = (entry for entry in (cwd / "outputs" / study).iterdir() if not entry.name.startswith("."))
    return folder


class Finished:
    """A run that ended well, and what it printed; nobody may change it."""

    def __init__(self, cwd: Path, overrides: list[str]):
        self.cwd, self.overrides = cwd, overrides
        with start(*overrides, cwd=cwd) as process:
            self.out, self.err = process.communicate(timeout=300)
        self.code = process.returncode
        self.folder = run_of(cwd)
        self.summary = json.loads((self.folder / "summary.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Finished:
    return Finished(tmp_path_factory.mktemp("finished"), [*TINY, "data=text", f"data.path={text_file}"])


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    """A working folder with a copy of the finished run."""
    shutil.copytree(finished.cwd, tmp_path, dirs_exist_ok=True)
    return tmp_path


# ---- a run that ends well --------------------------------------------------------------------------------------------


def test_a_run_ends_with_zero_and_shows_its_result(finished: Finished) -> None:
    assert finished.code == 0, finished.err
    assert "Traceback" not in finished.err
    summary = finished.summary
    for shown in (
        f"outputs/default/{finished.folder.name}",
        "step 5/20",
        "step 20/20",
        "tokens/s",
        f"val_loss {summary['val_loss']:.4f} nats/token",
        f"{summary['val_bpb']:.4f} bits/byte",
        "unigram",
        "sample",
    ):
        assert shown in finished.out
    assert "gzip" not in finished.out, "of 128 bytes it says nothing"
    log = (finished.folder / "log.txt").read_text("utf-8")
    said = [line for line in finished.out.split("\n") if line.startswith(("step", "run folder", "result", "baselines"))]
    assert len(said) >= 7
    assert [line for line in said if line not in log] == []


def test_the_folder_is_named_by_what_it_computes(finished: Finished) -> None:
    config = xconfig.compose(finished.overrides)
    assert finished.folder == finished.cwd / "outputs" / "default" / xconfig.run_name(config)
    assert os.listdir(finished.cwd) == ["outputs"]


def test_the_files_of_a_run_folder(finished: Finished) -> None:
    assert sorted(os.listdir(finished.folder)) == [
        ".lock",
        "artifacts",
        "checkpoints",
        "config.yaml",
        "log.txt",
        "metrics.jsonl",
        "overrides.yaml",
        "provenance.json",
        "summary.json",
    ]
    assert not [name for name in contents(finished.folder) if name.endswith(".tmp")]


def test_config_and_overrides(finished: Finished) -> None:
    config = xconfig.compose(finished.overrides)
    assert xconfig.load(finished.folder / "config.yaml") == config
    written = yaml.safe_load((finished.folder / "config.yaml").read_text("utf-8"))
    assert written["trainer"]["steps"] == 20
    assert written["backend"]["theta"] == 10000.0
    assert "hydra" not in written
    assert yaml.safe_load((finished.folder / "overrides.yaml").read_text("utf-8")) == finished.overrides


def test_provenance(finished: Finished) -> None:
    origin = json.loads((finished.folder / "provenance.json").read_text("utf-8"))
    assert set(origin) >= {
        "git_commit",
        "git_dirty",
        "versions",
        "device_kind",
        "device_count",
        "process_count",
        "data_sha256",
        "source_sha256",
        "host",
        "command",
        "started_at",
        "wandb_id",
    }
    in_checkout = (ROOT / ".git").exists()
    assert re.fullmatch("[0-9a-f]{40}", origin["git_commit"]) if in_checkout else origin["git_commit"] is None
    assert isinstance(origin["git_dirty"], bool) if in_checkout else origin["git_dirty"] is None
    assert origin["versions"]["jax"] == jax.__version__
    assert origin["device_count"] >= 1
    assert origin["process_count"] == 1
    config = xconfig.compose(finished.overrides)
    assert origin["data_sha256"] == load_corpus(config.data, 16).sha256
    assert re.fullmatch("[0-9a-f]{64}", origin["source_sha256"])
    assert "trainer=debug" in origin["command"]
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$", origin["started_at"])
    assert re.fullmatch("[a-z0-9]{8}", origin["wandb_id"])


def test_metrics_have_each_step_once_with_the_keys_of_the_contract(finished: Finished) -> None:
    training = {"step", "tokens", "train_loss", "learning_rate", "grad_norm", "tokens_per_second"}
    evaluation = {"step", "tokens", "val_loss", "val_bpb"}
    found = rows(finished.folder)
    assert [row["step"] for row in found] == [5, 10, 15, 20]
    for row in found:
        assert set(row) >= (training | evaluation if row["step"] % 10 == 0 else training)
        assert row["step"] % 10 == 0 or not set(row) & {"val_loss", "val_bpb"}
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in row.values())
        if "val_loss" in row:
            assert row["val_bpb"] == pytest.approx(row["val_loss"] / math.log(2), rel=1e-12)
    assert found[-1]["train_loss"] < found[0]["train_loss"] < math.log(256)


def test_the_summary_has_the_keys_of_the_contract(finished: Finished) -> None:
    summary, last = finished.summary, rows(finished.folder)[-1]
    assert set(summary) >= {
        "status",
        "step",
        "committed_step",
        "val_loss",
        "val_bpb",
        "best_val_loss",
        "train_loss",
        "tokens_per_second",
        "num_params",
        "flops_per_step",
        "implementation",
        "compile_seconds",
        "wall_seconds",
        "peak_memory_bytes",
        "packed_with",
        "state_sha256",
    }
    assert summary["status"] == "done"
    assert summary["step"] == summary["committed_step"] == 20
    assert summary["packed_with"] == 1
    for key in ("val_loss", "val_bpb", "train_loss"):
        assert summary[key] == last[key]
    assert summary["best_val_loss"] == min(row["val_loss"] for row in rows(finished.folder) if "val_loss" in row)
    # embeddings in and out, four projections, three matrices of the MLP, norms: 2 of queries and keys, 4 of width 16
    assert summary["num_params"] == 2 * 256 * 16 + 4 * 16 * 16 + 3 * 16 * 16 + 2 * 8 + 4 * 16
    per_token = 2 * (4 * 16 * 16 + 3 * 16 * 16 + 256 * 16) + 2 * 16 * 16
    assert summary["flops_per_step"] == 3 * per_token * 8 * 16
    assert re.fullmatch("[0-9a-f]{64}", summary["state_sha256"])
    assert 0 < summary["compile_seconds"] < summary["wall_seconds"]
    assert summary["tokens_per_second"] > 0
    assert summary["peak_memory_bytes"] > 3 * 4 * summary["num_params"]


# ---- the same command again ------------------------------------------------------------------------------------------


def test_a_finished_run_started_again_shows_its_result_at_once(
    finished: Finished, copy: Path, without_jax: str
) -> None:
    """No jax is imported, and nothing is written but a line of log.txt."""
    folder = run_of(copy)
    before = contents(folder)
    began = time.perf_counter()
    code, out, err = train(*finished.overrides, cwd=copy, stubs=without_jax)
    assert time.perf_counter() - began < 10
    assert (code, err) == (0, "")
    assert f"{finished.summary['val_loss']:.4f}" in out
    assert "resume=never" in out
    assert folder.name in out
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} == {"log.txt"}
    assert set(after) == set(before)
    assert after["log.txt"].startswith(before["log.txt"])
    assert after["log.txt"][len(before["log.txt"]) :].count(b"\n") == 1


def test_other_spellings_and_keys_that_do_not_count_are_the_same_run(
    finished: Finished, copy: Path, without_jax: str
) -> None:
    again = [*finished.overrides, "backend.theta=1e4", "tracking.wandb.project=another", "trainer.checkpoint_every=7"]
    code, out, _ = train(*again, cwd=copy, stubs=without_jax)
    assert code == 0
    assert f"{finished.summary['val_loss']:.4f}" in out
    assert len(os.listdir(copy / "outputs" / "default")) == 1


def test_resume_never_moves_aside_and_computes_the_same(finished: Finished, copy: Path) -> None:
    """Nothing is lost, and the second run ends with the bits and the metrics of the first."""
    before = contents(run_of(copy))
    code, out, err = train(*finished.overrides, "resume=never", cwd=copy)
    assert code == 0, err
    assert ".superseded" in out
    (aside,) = (copy / "outputs" / "default" / ".superseded").iterdir()
    assert aside.name.startswith(finished.folder.name + "-")
    assert contents(aside) == before

    folder = run_of(copy)
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert {k: v for k, v in summary.items() if k not in WALL_CLOCK} == {
        k: v for k, v in finished.summary.items() if k not in WALL_CLOCK
    }
    for row, first in zip(rows(folder), rows(finished.folder), strict=True):
        assert {k: v for k, v in row.items() if k not in WALL_CLOCK} == {
            k: v for k, v in first.items() if k not in WALL_CLOCK
        }


def test_a_folder_named_by_hand_refuses_another_config(finished: Finished, copy: Path, without_jax: str) -> None:
    folder = run_of(copy)
    before = contents(folder)
    other = [*finished.overrides, "trainer.steps=30", "seed=3", f"hydra.run.dir={folder}"]
    code, _, err = train(*other, cwd=copy, stubs=without_jax)
    assert code == 2
    for shown in ("trainer.steps", "20", "30", "seed", "3", folder.name):
        assert shown in err
    assert len(err.splitlines()) <= 5
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} <= {"log.txt"}


def test_a_killed_run_is_in_use_while_it_lives_and_goes_on_when_it_is_dead(
    tmp_path: Path, text_file: Path, without_jax: str
) -> None:
    """A stopped process holds the lock too, and SIGKILL frees it; the same command then ends as if never killed."""
    long = [*TINY, "data=text", f"data.path={text_file}", "trainer.steps=400", "trainer.log_every=1"]
    long += ["trainer.eval_every=400", "trainer.checkpoint_every=50"]
    folder = tmp_path / "outputs" / "default" / xconfig.run_name(xconfig.compose(long))
    with start(*long, cwd=tmp_path) as process:
        deadline = time.monotonic() + 200
        while process.poll() is None and not (folder / "checkpoints" / "50").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            before = contents(folder)
            assert json.loads(before["summary.json"])["status"] == "running"

            began = time.perf_counter()
            code, _, err = train(*long, cwd=tmp_path, stubs=without_jax)
            assert time.perf_counter() - began < 10
            assert code == 5
            assert len(err.splitlines()) <= 5
            assert folder.name in err
            assert contents(folder) == before
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL

    code, out, err = train(*long, cwd=tmp_path)
    assert code == 0, err
    assert re.search(r"resumed +from step \d+", out)
    assert os.listdir(folder.parent) == [folder.name]
    code, _, err = train(*long, "study=untouched", cwd=tmp_path)
    assert code == 0, err
    untouched = run_of(tmp_path, "untouched")
    assert [row["step"] for row in rows(folder)] == list(range(1, 401))
    assert [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in rows(folder)] == [
        {k: v for k, v in row.items() if k not in WALL_CLOCK} for row in rows(untouched)
    ]
    once, twice = (json.loads((run / "summary.json").read_text("utf-8")) for run in (untouched, folder))
    assert once["state_sha256"] == twice["state_sha256"]


# ---- what cannot be run ----------------------------------------------------------------------------------------------

BAD = [
    (["backend.activation=sigmod"], ["backend.activation", "sigmod", "sigmoid"]),
    (["backend.activaton=sigmoid"], ["backend.activaton", "backend.activation"]),
    (["backend=sigmod"], ["backend", "sigmod", "sigmoid"]),
    (["trainer.steps=0", "optimizer.learning_rate=-1"], ["trainer.steps", "optimizer.learning_rate", "greater than 0"]),
    (["seed=0,1"], ["seed", "-m"]),
    (["data=text"], ["data.path", "required, for example"]),
    (["data=text", "data.path=/tmp/ü/x"], ["/tmp/ü/x", "quotes"]),
    (["study=../outside"], ["study", "../outside"]),
    (["nonsense"], ["nonsense", "key=value"]),
    (["--config-dir", "gone", "seed=1"], ["--config-dir = gone: no such folder"]),
    (["backend.implementation=blockwize"], ["backend.implementation", "blockwize", "did you mean blockwise"]),
    (["backend.every=2", "backend.then={activation: softmx}"], ["backend.then.activation", "did you mean softmax"]),
    (["-m", "backend.activation=softmax,sigmod"], ["backend.activation", "sigmod", "sigmoid"]),
    (["-m", "data=text", "data.path=missing.txt", "seed=0,1"], ["nothing was started (2 runs)", "missing.txt"]),
    (["--unknown"], ["--unknown"]),
    (["hydra/launcher=slurm"], ["hydra/launcher=slurm", "needs -m"]),
    (["sweep.half_width=0.01"], ["sweep.half_width = 0.01", "needs -m"]),
    (["experiment=study_activation"], ["is a study", "train.py -m experiment=study_activation", "backend.activation"]),
    (["--like"], ["--like", "a run's folder"]),
    (["--like", "nowhere", "seed=1"], ["--like nowhere", "config.yaml"]),
    (["hydra/job_logging=colorlog"], ["hydra/job_logging = colorlog", "default, disabled, none, stdout"]),
    (["hydra.output_subdir=."], ["hydra.output_subdir=.", "keeps its own files"]),
    (["hydra.output_subdir=checkpoints/x"], ["hydra.output_subdir=checkpoints/x", "keeps its own files"]),
    (["hydra.run.dir=report"], ["report", "xattn report"]),
    (["hydra.job.chdir=true", "data=text", "data.path=missing.txt"], ["missing.txt", "hydra.job.chdir = true"]),
    (["hydra.job.env_copy=[XATTN_NOT_SET]"], ["hydra.job.env_copy = XATTN_NOT_SET", "no such environment variable"]),
    (["--cfg", "job", "--package", "nowhere"], ["'nowhere'"]),
    (["--hydra-help", "seed=1"], ["seed=1", "--hydra-help", "takes no overrides"]),
    (["study=1e3"], ["study = 1000.0", """'study="1e3"'"""]),
    (["-m", "study=1e3", "seed=0,1"], ["study = 1000.0", """'study="1e3"'"""]),
    (["-m", "study=1e3,2e3"], ["study = 1000.0", """'study="…"'"""]),
    (["-m", "backend=choice(softmax,sigmoid)", "trainer.stepz=3"], ["trainer.stepz: no such key", "trainer.steps"]),
    (["-m", "seed=range(3)", "trainer.stepz=3"], ["trainer.stepz: no such key", "trainer.steps"]),
    (["-m", "backend=glob(zzz*)"], ["backend=glob(zzz*)", "none, nope, off_by_one"]),
    (["-m", "sweep.half_width=0.01"], ["sweep.half_width", "nothing differs"]),
    (["-m", "sweep.half_width=0.01", "seed=0,1"], ["seed = 0,1", "sweep.half_width adds seeds by itself"]),
    (["-m", "sweep.budget_minutes=5", "seed=0,1"], ["sweep.budget_minutes", "sweep.half_width"]),
    (["-m", "hydra.job.chdir=true", "seed=0,1"], ["hydra.job.chdir", "one working directory"]),
    (["data=text", "data.path=missing.txt"], ["data.path", "missing.txt"]),
]


@pytest.mark.parametrize(("overrides", "expected"), BAD, ids=lambda part: " ".join(part))
def test_bad_input_is_two_and_a_short_message(
    overrides: list[str], expected: list[str], tmp_path: Path, without_jax: str
) -> None:
    """It is judged without jax, and it leaves nothing."""
    code, out, err = train(*overrides, cwd=tmp_path, stubs=without_jax)
    assert code == 2
    for fragment in expected:
        assert fragment in err
    assert 1 <= len(err.splitlines()) <= 5
    assert out == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["backend.implementation=refrence"], ["backend.implementation", "refrence", "reference"]),
        (["data=text", "data.path=short.txt"], ["data.path", "short.txt", "context_length"]),
    ],
    ids=lambda part: part[-1],
)
def test_what_only_a_start_can_see_is_two_as_well(overrides: list[str], expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_bytes(bytes(100))
    code, _, err = train(*TINY, *overrides, cwd=tmp_path)
    assert code == 2
    for fragment in expected:
        assert fragment in err
    assert 1 <= len(err.splitlines()) <= 5


def test_choices_in_a_folder_of_ones_own_are_not_blamed(tmp_path: Path, without_jax: str) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /data: text]\n"
    )
    for where in (["--config-dir", "conf"], ["--config-dir=conf"], [f"hydra.searchpath=[file://{tmp_path}/conf]"]):
        code, _, err = train(*where, "experiment=mine", "data.pth=x", cwd=tmp_path, stubs=without_jax)
        assert (code, err.count("\n")) == (2, 1)
        assert "data.pth: no such key (did you mean data.path?)" in err


def test_what_hydra_reads_without_our_keys_is_named(tmp_path: Path, without_jax: str) -> None:
    code, _, err = train("+hydra.job.env_set.X='${seed}'", cwd=tmp_path, stubs=without_jax)
    assert code == 2
    assert "xattn: hydra.job.env_set.X: refers to seed, which is not defined where Hydra" in err


def test_what_hydra_writes_into_a_runs_folder_does_not_block_it(tmp_path: Path, text_file: Path) -> None:
    """Neither the start that asks for it, nor, where that ends before there is a run, the plain one afterwards."""
    plain = [*TINY, "data=text", "data.path=text.txt", "trainer.steps=2"]
    asked = ["hydra/job_logging=default", "hydra.job.name=mine", "hydra.output_subdir=.hydra"]
    code, _, err = train(*plain, *asked, cwd=tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert {"mine.log", ".hydra"} <= set(os.listdir(run_of(tmp_path)))
    shutil.copy(text_file, tmp_path / "text.txt")
    code, _, err = train(*plain, cwd=tmp_path)
    assert code == 0, err
    code, out, err = train(*plain, *asked, "resume=never", cwd=tmp_path)
    assert code == 0, err
    assert json.loads((run_of(tmp_path) / "summary.json").read_text())["status"] == "done"
    code, out, err = train(*plain, *asked, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "already done" in out


def test_somebody_elses_folder_is_left_alone(tmp_path: Path, without_jax: str) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    for resume in ("auto", "never"):
        code, _, err = train("hydra.run.dir=thesis", f"resume={resume}", cwd=tmp_path, stubs=without_jax)
        assert code == 2
        assert "thesis" in err
        assert len(err.splitlines()) <= 5
        assert contents(tmp_path) == {"thesis/chapter.tex": b"mine"}


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (
            ["--help"],
            ["train.py backend.activation=sigmoid", "optimizer: adamw, lion, muon, sgd", "learning_rate"],
        ),
        (["--cfg", "job"], ["activation: softmax", "learning_rate: 0.003", "path: x"]),
        (
            ["--cfg", "hydra", "--resolve"],
            ["dir: outputs/default/softmax-text-lr0.003-seed0-", "dir: outputs/default\n"],
        ),
        (
            ["hydra/job_logging=default", "--cfg", "hydra", "--resolve"],
            ["/train.log", "output_dir: /", "outputs/default/softmax-text"],
        ),
        (["--cfg", "job", "--resolve", "--package", "backend"], ["# @package backend", "theta: 10000"]),
    ],
)
def test_help_and_the_config_are_shown_without_jax(
    flags: list[str], shown: list[str], tmp_path: Path, without_jax: str
) -> None:
    code, out, err = train("data=text", "data.path=x", *flags, cwd=tmp_path, stubs=without_jax)
    assert (code, err) == (0, "")
    for fragment in shown:
        assert fragment in out
    assert os.listdir(tmp_path) == []


# ---- sweeps, divergence ----------------------------------------------------------------------------------------------


def test_several_values_are_several_runs(tmp_path: Path, text_file: Path) -> None:
    sweep = ["-m", *TINY, "data=text", f"data.path={text_file}", "study=pair", "backend.activation=softmax,sigmoid"]
    code, _, err = train(*sweep, cwd=tmp_path)
    assert code == 0, err
    names = [folder.name for folder in (tmp_path / "outputs" / "pair").iterdir() if folder.is_dir()]
    assert sorted(name.partition("-")[0] for name in names) == ["sigmoid", "softmax"]
    for name in names:
        folder = tmp_path / "outputs" / "pair" / name
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        assert summary["status"] == "done"
        assert summary["val_loss"] < math.log(256)
        assert xconfig.run_name(xconfig.load(folder / "config.yaml")) == name


def test_a_diverged_run_ends_with_three_and_says_where(tmp_path: Path, text_file: Path, without_jax: str) -> None:
    """In a folder with a difficult name, chosen by hand."""
    wild = [*TINY, "data=text", f"data.path={text_file}", "optimizer=sgd", "optimizer.learning_rate=1e30"]
    wild += ["optimizer.clip_norm=null", 'hydra.run.dir="ein ü, Ordner"', "evaluation.sequences=1"]
    code, out, err = train(*wild, cwd=tmp_path)
    assert code == 3, err
    assert "diverged" in out
    folder = tmp_path / "ein ü, Ordner"
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["status"] == "diverged"
    assert 1 <= summary["step"] < 20
    assert f"update {summary['step'] + 1} " in out
    assert all(row["step"] <= summary["step"] for row in rows(folder))
    assert "NaN" not in (folder / "summary.json").read_text("utf-8")

    code, out, err = train(*wild, cwd=tmp_path, stubs=without_jax)
    assert (code, err) == (3, "")
    assert "diverged" in out


# ---- from Python -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(finished: Finished) -> xattn.LoadedRun:
    return xattn.load(finished.folder)


def test_a_reader_who_leaves_does_not_stop_the_run(tmp_path: Path, text_file: Path) -> None:
    """``python train.py | head``: what is printed after that goes to log.txt alone."""
    with start(*TINY, "data=text", f"data.path={text_file}", cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("run folder")
        process.stdout.close()
        assert process.wait(300) == 0, process.stderr and process.stderr.read()
    folder = run_of(tmp_path)
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"
    assert "result" in (folder / "log.txt").read_text("utf-8")


def test_a_run_without_standard_streams_is_a_run(finished: Finished, tmp_path: Path) -> None:
    """``<&- >&- 2>&-``, as some schedulers start it. The numbers that are free go to no file of the run's."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, str(ROOT / "train.py"), *finished.overrides]
    assert subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, timeout=300).returncode == 0
    folder = run_of(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["state_sha256"] == finished.summary["state_sha256"]
    assert [row["step"] for row in rows(folder)] == [row["step"] for row in rows(finished.folder)]


def test_a_loaded_run_reproduces_the_loss_of_its_summary(finished: Finished, loaded: xattn.LoadedRun) -> None:
    assert loaded.config == xconfig.compose(finished.overrides)
    assert loaded.step == 20
    assert loaded.summary == finished.summary
    corpus = load_corpus(loaded.config.data, 16)
    nats = count = 0.0
    batching = Batching(context_length=16, batch_size=8, sequences=8, seed=0)
    for batch in HeldOutBatches([(corpus.parts[0].validation, 1.0)], batching):
        logits = loaded.model.apply({"params": loaded.params}, batch.tokens[:, :-1], loaded.hyperparameters)
        assert logits.shape == (8, 16, 256)
        log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
        chosen = np.take_along_axis(log_p, batch.tokens[:, 1:, None], axis=-1)[..., 0]
        nats -= float((chosen * batch.weights).sum())
        count += float(batch.weights.sum())
    assert nats / count == pytest.approx(finished.summary["val_loss"], rel=1e-5)


def test_a_loaded_run_writes_text(loaded: xattn.LoadedRun) -> None:
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("text")) == "text"
    once = loaded.generate("line 1: ", max_tokens=20, temperature=0.0)
    assert isinstance(once, str)
    assert once == loaded.generate("line 1: ", max_tokens=20, temperature=0.0, seed=7)
    prompt = jnp.asarray(loaded.tokenizer.encode("line 1: "), jnp.int32)[None]
    logits = loaded.model.apply({"params": loaded.params}, prompt, loaded.hyperparameters)
    assert once.startswith(loaded.tokenizer.decode([int(logits[0, -1].argmax())])[:1])
    # Nothing to continue is the token that a text starts with.
    start = loaded.tokenizer.decode([loaded.tokenizer.start])
    assert loaded.generate(max_tokens=5, temperature=0.0) == loaded.generate(start, max_tokens=5, temperature=0.0)


@pytest.mark.usefixtures("emitters_of_runs")
def test_the_run_of_a_notebook_is_the_commands(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same folder below the working directory, the same bits and files; and each shows the other's result."""
    monkeypatch.chdir(tmp_path)
    run = xattn.train(finished.overrides, quiet=True)
    assert run.path == tmp_path / finished.folder.relative_to(finished.cwd)
    assert run.summary["state_sha256"] == finished.summary["state_sha256"]
    for name in ("config.yaml", "overrides.yaml"):
        assert (run.path / name).read_bytes() == (finished.folder / name).read_bytes()
    assert [row["val_loss"] for row in rows(run.path) if "val_loss" in row] == [
        row["val_loss"] for row in rows(finished.folder) if "val_loss" in row
    ]
    here, there = (json.loads((folder / "provenance.json").read_text()) for folder in (run.path, finished.folder))
    assert here.keys() == there.keys()
    of_its_own = {"command", "cwd", "started_at", "wandb_id", "device_count"}
    assert here["device_count"] == jax.device_count()  # tests of meshes give this process several
    assert there["device_count"] == 1
    assert {key for key in here if here[key] != there[key]} <= of_its_own
    code, out, _ = train(*finished.overrides, cwd=tmp_path)
    assert (code, "already done at step 20" in out) == (0, True)


def test_what_is_no_run_cannot_be_loaded(finished: Finished, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(xattn.errors.BadInput, match=r"config\.yaml"):
            xattn.load(path)
    shutil.copy(finished.folder / "config.yaml", tmp_path)
    with pytest.raises(xattn.errors.BadInput, match=r"summary\.json"):
        xattn.load(tmp_path)
    assert os.listdir(tmp_path) == ["config.yaml"]
