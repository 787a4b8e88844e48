"""``python examples/own_activation.py``: a user's activation trains, sweeps, resumes, samples and is reported."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

import xattn
from tests import processes
from xattn.backend import activations
from xattn.cli import main
from xattn.data.batches import Batching
from xattn.data.run_data import load_data
from xattn.errors import BadInput
from xattn.model.loss import next_token_losses
from xattn.runs import run_folder

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "own_activation.py"
pytestmark = pytest.mark.slow


def start(program: Path, *arguments: str, cwd: Path) -> str:
    """What it printed; it has to leave with 0."""
    done = processes.run(str(program), *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tiny(text_file: Path) -> list[str]:
    return [
        *("trainer=debug", "trainer.steps=4", "trainer.checkpoint_every=2", "tracking.wandb.mode=disabled"),
        *("data=text", f"data.path={text_file}", "evaluation.sequences=8", "backend.context_length=16"),
        *("model.embedding_dim=16", "model.num_layers=2", "model.num_heads=2", "model.mlp_dim=16"),
    ]


@pytest.fixture(scope="module")
def run(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of relu in every second layer."""
    cwd = tmp_path_factory.mktemp("own")
    start(EXAMPLE, "backend.every=2", "backend.then={activation: relu}", *tiny, cwd=cwd)
    (folder,) = (cwd / "outputs" / "default").iterdir()
    return folder


def test_it_is_computed_sampled_evaluated_and_reported(run: Path) -> None:
    summary = run_folder.read_summary(run) or {}
    assert summary["status"] == "done"
    assert summary["implementation"] == {"backend": "reference", "then": "reference"}
    assert "every2-relu" in run.name
    assert len(start(EXAMPLE, "sample", str(run), "--max-tokens", "5", cwd=run)) > 5
    assert f"{summary['val_loss']:.4f}" in start(EXAMPLE, "evaluate", str(run), cwd=run)
    assert main(["report", str(run.parent)]) == 0
    assert main(["runs", str(run.parent)]) == 0
    assert "examples/own_activation.py" in (run.parent / "report" / "report.html").read_text("utf-8")


def test_at_another_length_n_stays_that_of_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """relu divides by n: sequences of half the length are scored by the same weights, as sigmoid's bias is kept."""
    monkeypatch.setattr(activations, "_TABLE", dict(activations._TABLE))
    runpy.run_path(str(EXAMPLE))
    loaded = xattn.load(run)
    data = load_data(loaded.config.data, Batching(context_length=8, batch_size=8, sequences=8, seed=0))
    (batch,) = data.held_out
    losses = next_token_losses(loaded.logits(batch.inputs), np.asarray(batch.targets))
    expected = float(np.sum(losses * batch.weights) / batch.weights.sum())
    assert loaded.evaluate(["backend.context_length=8"])["val_loss"] == pytest.approx(expected, rel=1e-4)


def test_without_the_registration_loading_says_what_is_missing(run: Path) -> None:
    with pytest.raises(BadInput, match=r"'relu'.*\n.*registered by own_activation.py; run that"):
        xattn.load(run)


def test_an_edited_file_is_a_recorded_change_on_resume(run: Path, tiny: list[str], tmp_path: Path) -> None:
    """As edited source is: told, written down, and the run goes on."""
    own = tmp_path / "mine.py"
    own.write_text(EXAMPLE.read_text("utf-8"))
    typed = ("backend.activation=relu", *tiny)
    start(own, *typed, cwd=tmp_path)
    (folder,) = (tmp_path / "outputs" / "default").iterdir()
    before = run_folder.read_provenance(folder) or {}
    assert list(before["registered"]) == ["mine.py"]
    shutil.rmtree(folder / "checkpoints" / "4")
    summary = run_folder.read_summary(folder) or {}
    run_folder.write_summary(folder, summary | {"status": "running", "committed_step": 2})
    own.write_text(own.read_text("utf-8") + "# edited\n")
    assert "changed since this run began: registered" in start(own, *typed, cwd=tmp_path)
    after = run_folder.read_provenance(folder) or {}
    assert after["registered"] == before["registered"]
    assert after["resumed_with"][0]["registered"] != before["registered"]
    assert (run_folder.read_summary(folder) or {})["state_sha256"] == summary["state_sha256"]
    own.write_text(own.read_text("utf-8") + "# again\n")
    assert "changed since then: registered" in start(own, *typed, cwd=tmp_path)


def test_jobs_that_a_launcher_carries_elsewhere_know_it(tiny: list[str], tmp_path: Path) -> None:
    """A job of one run, and the worker processes of a job of two, which start with submitit's script and not this."""
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    by = ("hydra/launcher=slurm_local", "hydra.launcher.runs_per_job=2", "sweep.workers=2")
    start(EXAMPLE, "-m", *by, "backend.activation=relu", "seed=0,1,2", *tiny, cwd=tmp_path)
    summaries = [json.loads(file.read_text()) for file in tmp_path.glob("outputs/default/*/summary.json")]
    assert [summary["status"] for summary in summaries] == ["done", "done", "done"]
