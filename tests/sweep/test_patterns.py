"""A study over layer patterns, as a user types it: real processes, and then the commands that read the folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from xattn.runs import run_folder

ROOT = Path(__file__).resolve().parent.parent.parent
GRID = ["backend=none", "backend.every=1,2", "backend.then={activation: softmax, theta: 500}"]


def ran(*command: str, cwd: Path) -> str:
    """Return the output of a command that must succeed."""
    done = processes.run(*command, cwd=cwd, env=os.environ | {"COLUMNS": "400"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_grid_over_every_trains_and_is_reported(tiny: list[str], tmp_path: Path) -> None:
    """With every=1 all layers are ``then``, and the run is recorded with one kind; with every=2 it has both kinds."""
    sizes = ["model.num_layers=2", "trainer.attention_stats_every=10"]
    ran(str(ROOT / "train.py"), "-m", *tiny, *sizes, *GRID, cwd=tmp_path)
    study = tmp_path / "outputs" / "default"
    found: dict[bool, Any] = {}
    for folder in (path for path in study.iterdir() if (path / run_folder.SUMMARY).is_file()):
        found["every2" in folder.name] = folder, run_folder.read_summary(folder)
    assert set(found) == {False, True}
    for folder, summary in found.values():
        assert summary["status"] == "done"
        assert (summary["step"], summary["num_params"]) == (20, found[True][1]["num_params"])
        assert '"attention/1/0/weight_sum"' in (folder / run_folder.METRICS).read_text("utf-8")
    (one, of_one), (two, of_two) = found[False], found[True]
    assert one.name.startswith("softmax")
    assert two.name.startswith("none-every2-softmax-theta_500")
    assert isinstance(of_one["implementation"], str)
    assert of_one["passed_over"].keys().isdisjoint(("backend", "then"))
    assert of_two["implementation"].keys() == of_two["passed_over"].keys() == {"backend", "then"}
    assert all(isinstance(name, str) for name in of_two["implementation"].values())
    assert of_one["val_loss"] != of_two["val_loss"]

    ran("-m", "xattn.cli", "report", str(study), cwd=tmp_path)
    page = (study / "report" / "report.md").read_text("utf-8")
    assert all(key in page for key in ("backend.every", "backend.then.activation", "backend.then.theta"))
    listed = ran("-m", "xattn.cli", "runs", str(study), cwd=tmp_path)
    assert all(folder.name in listed for folder, _ in found.values())


@pytest.mark.slow
def test_a_number_of_one_kind_is_tuned(tiny: list[str], tmp_path: Path) -> None:
    """A key that ``then`` does not have yet is added with a + in every trial."""
    pytest.importorskip("optuna", reason="the extra tune is not installed")
    tuned = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "+backend.then.theta=interval(100,200)"]
    pattern = ["model.num_layers=2", "backend=none", "backend.every=2", "backend.then={activation: softmax}"]
    out = ran(str(ROOT / "train.py"), "-m", *tiny, "trainer.steps=4", *pattern, *tuned, cwd=tmp_path)
    assert "best of 1 trials" in out
    (run,) = (path.parent for path in (tmp_path / "outputs" / "default").glob("*/config.yaml"))
    assert "every2-softmax-theta_1" in run.name
