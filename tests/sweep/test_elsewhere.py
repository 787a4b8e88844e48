"""Sweeps whose runs train in other processes: results and exit code come from the run folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import processes
from xattn.runs.run_folder import read_provenance, read_summary

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.slow


def sweep(cwd: Path, *overrides: str) -> tuple[int, str]:
    done = processes.train("-m", *overrides, cwd=cwd)
    return done.returncode, done.stdout + done.stderr


def statuses(cwd: Path) -> list[str]:
    runs = sorted((cwd / "outputs" / "default").glob("*/summary.json"))
    return [(read_summary(run.parent) or {})["status"] for run in runs]


def test_submitit(tiny: list[str], tmp_path: Path) -> None:
    """The local executor gets one job of two runs and one of a single run. The same command again starts nothing.

    That executor creates its folder under the literal name, so the name it gets has no job id.
    """
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    command = ["hydra/launcher=slurm_local", "hydra.launcher.runs_per_job=2", *tiny, "trainer.steps=4", "seed=0,1,2"]
    command.append("hydra.launcher.launcher.submitit_folder='${hydra.sweep.dir}/.submitit/%j'")
    code, out = sweep(tmp_path, *command)
    assert code == 0, out
    assert statuses(tmp_path) == ["done", "done", "done"]
    jobs = tmp_path / "outputs" / "default" / ".submitit"
    assert len([*jobs.glob("*_0_log.out")]) == 2
    assert not any(path.is_dir() for path in jobs.iterdir())
    code, out = sweep(tmp_path, *command)
    assert code == 0, out
    assert "3 runs, 3 already done" in out


def test_ray(tiny: list[str], tmp_path: Path) -> None:
    """The cluster is this machine with two workers. A run that diverges is not a failure."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    local = ["hydra.launcher.launcher.ray.remote.num_gpus=0", "+hydra.launcher.launcher.ray.init.num_cpus=2"]
    code, out = sweep(
        tmp_path, "hydra/launcher=on_ray", *local, *tiny, "trainer.steps=4", "optimizer.learning_rate=1e-3,1e30"
    )
    assert code == 0, out
    assert sorted(statuses(tmp_path)) == ["diverged", "done"]


def test_several_processes_share_a_sweep_and_train_each_training_once(tiny: list[str], tmp_path: Path) -> None:
    """They share it as on a machine with several GPUs. Each has the environment that Hydra is asked to set, before it
    imports jax. Of runs with the same training, one trains while the others wait, and one measures what is left."""
    command = ["sweep.workers=2", *tiny, "trainer.steps=4", "seed=0,1", "trainer.log_every=2,4"]
    command += ["evaluation.sequences=8,4", "+hydra.job.env_set.JAX_NUM_CPU_DEVICES=2"]
    code, out = sweep(tmp_path, *command)
    assert code == 0, out
    assert statuses(tmp_path) == ["done", "done"]
    measured = [*(tmp_path / "outputs" / "default").glob("*/evaluations.jsonl")]
    assert len(measured) == 2
    for rows in measured:
        run = rows.parent
        assert len(rows.read_text("utf-8").splitlines()) == 1
        assert (run / "log.txt").read_text("utf-8").count("computed by") == 1
        assert (read_provenance(run) or {})["device_count"] == 2
        assert out.count(run.name) >= 7  # in the table as well
    assert out.count("already trained in") == 6
