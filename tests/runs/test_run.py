"""A refused run leaves its folder unchanged; a failed run's folder records the failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xattn.config
from tests import processes
from xattn.backend import dispatch, reference
from xattn.backend.hopper.sizes import Tiles
from xattn.backend.proven import Proof
from xattn.config import compose
from xattn.errors import BadInput
from xattn.runs import run_folder
from xattn.runs.desk import run
from xattn.runs.job import Job
from xattn.runs.provenance import provenance
from xattn.runs.record import Run
from xattn.runs.run_folder import RunFolder
from xattn.training import memory

TINY = [
    *("trainer=debug", "trainer.steps=2", "tracking.wandb.mode=disabled", "model.embedding_dim=16"),
    *("model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16", "backend.context_length=16"),
]


@pytest.fixture
def command(text_file: Path) -> list[str]:
    return [*TINY, "data=text", f"data.path={text_file}", "evaluation.sequences=8"]


def put_run(folder: Path, command: list[str], summary: dict[str, object]) -> None:
    folder.mkdir()
    (folder / run_folder.CONFIG).write_text(xattn.config.save(compose(command)))
    run_folder.write_summary(folder, summary)
    (folder / run_folder.METRICS).write_text('{"step": 2}\n')


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("tracking.wandb.mode=online", "no API key"),
        ("data.path=nowhere.txt", "nowhere.txt"),
        ("parallel.data=64", "parallel.data"),
        ("backend.implementation=cudnn", "backend.implementation"),
    ],
)
def test_resume_never_moves_nothing_aside_before_all_is_accepted(
    override: str, told: str, command: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    put_run(folder, command, {"status": "running", "step": 2})
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(BadInput, match=told):
        run(compose([*command, override, "resume=never"]), folder, quiet=True)
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {name: content for name, content in after.items() if name in before} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_resume_never_moves_aside_what_a_new_run_takes_the_place_of(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a run that does not fit in memory has failed: its folder does not say that it is running."""
    folder = tmp_path / "run"
    put_run(folder, command, {"status": "done", "step": 2})
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(BadInput, match="GB is available"):
        run(compose([*command, "resume=never"]), folder, quiet=True)
    (aside,) = (tmp_path / run_folder.SUPERSEDED).iterdir()
    assert run_folder.read_summary(aside) == {"status": "done", "step": 2}
    assert aside.name in capsys.readouterr().out
    assert aside.name in (folder / run_folder.LOG).read_text()
    found = run_folder.read_summary(folder)
    assert found is not None
    assert (found["status"], found["step"]) == ("failed", 0)
    assert "failures" not in found


def test_failures_of_other_source_are_not_counted(command: list[str], tmp_path: Path) -> None:
    """Changed source has three tries of its own."""
    here = {key: provenance()[key] for key in ("source_sha256", "versions")}
    for before, count in ((here, 3), (here | {"source_sha256": "other"}, 1)):
        path = tmp_path / str(count)
        put_run(path, command, {})
        folder = RunFolder(path)
        failures = {"count": 2, "step": 0} | before
        attempt = Run(Job(compose(command), path), folder, {"status": "failed", "failures": failures}, quiet=True)
        attempt.failed(RuntimeError("planted"))
        attempt.display.close()
        folder.release()
        found = run_folder.read_summary(path)
        assert found is not None
        assert found["failures"] == here | {"count": count, "step": 0}


ASKS_FOR_DETERMINISM = """
import sys
from pathlib import Path
from xattn.runs import desk
from xattn.config import compose
from xattn.runs.desk import run

def look():
    print("jax" in sys.modules)
    raise SystemExit

desk.ask_for_determinism = look
run(compose([*sys.argv[2:], "trainer.deterministic=true"]), Path(sys.argv[1]), quiet=True)
"""


def test_determinism_is_asked_for_before_jax_is_there(command: list[str], tmp_path: Path) -> None:
    """On a GPU it is refused where jax has been loaded before: a run that stands alone could never have it."""
    root = Path(xattn.__file__).resolve().parent.parent
    asked = [sys.executable, "-c", ASKS_FOR_DETERMINISM, str(tmp_path / "run"), *command]
    done = subprocess.run(asked, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


ON_ONE_THREAD = """
import os, sys
from pathlib import Path
from xattn.config import compose
from xattn.errors import BadInput
from xattn.runs.desk import run
from xattn.runs.run_folder import read_summary

cores, folder, *command = sys.argv[1:]
if cores == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
run(compose([*command, "trainer.threads=1"]), Path(folder), quiet=True)
assert "NPROC" not in os.environ  # or what it starts would compute so too
print(read_summary(Path(folder))["state_sha256"])
try:
    run(compose([*command, "trainer.threads=2"]), Path(folder + "-2"), quiet=True)
except BadInput as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system keeps no process to a core")
def test_a_run_of_one_thread_has_the_same_bits_on_any_number_of_cores(text_file: Path, tmp_path: Path) -> None:
    """And a process has the number of threads that it began with: a run that asks for another is refused."""
    # Sums so long that two threads share them: with a thread for each core the bits of these two differ.
    wide = ["model.mlp_dim=344", "backend.context_length=128", "trainer.batch_size=32", "data=text"]
    wide += [f"data.path={text_file}", "trainer.steps=2"]
    told = []
    for cores in ("one", "all"):
        asked = [cores, str(tmp_path / cores), *TINY, *wide, "evaluation.sequences=8"]
        done = processes.run("-c", ON_ONE_THREAD, *asked, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.splitlines()[-2:])
    assert told[0][0] == told[1][0]
    assert (
        told[0][1]
        == "trainer.threads = 2: this process already has its threads (1); start the run in a process of its own"
    )
    # A finished run keeps the losses of its held-out sequences: nats and scored tokens, of which val_loss is the ratio.
    kept, found = (
        np.load(tmp_path / "all" / "artifacts" / "window_losses.npy"),
        run_folder.read_summary(tmp_path / "all"),
    )
    assert kept.shape == (8, 2)
    nats, tokens = kept.sum(axis=0)
    assert nats / tokens == pytest.approx((found or {})["val_loss"], rel=1e-6)


def test_what_proved_the_kernels_is_named_in_the_log_and_in_the_summary(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU another row of the table stands for theirs."""

    plain = reference.reference
    monkeypatch.setattr(reference, "reference", lambda q, k, v, spec, *tiles: plain(q, k, v, spec))
    row = dispatch.Implementation("reference", proof=lambda call: Proof("hopper-h100", Tiles()))
    monkeypatch.setattr(dispatch, "TABLE", (row,))
    assert run(compose(command), tmp_path / "run", quiet=True) == 0
    assert "computed by reference (record hopper-h100)" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    assert json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))["proven_by"] == "hopper-h100"
