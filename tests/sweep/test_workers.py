"""How many processes share a sweep, and which GPU or core each has, with stand-ins for the machine."""

from __future__ import annotations

import importlib.metadata
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import xattn.config
from tests.quick import composed
from xattn.errors import BadInput
from xattn.runs import run_folder
from xattn.runs.job import Job
from xattn.sweep import study, workers
from xattn.sweep.workers import Seat, gpus, run_study


def jobs_of(outputs: Path, *overrides: str) -> list[Job]:
    configs = [composed("trainer=debug", f"seed={seed}", *overrides) for seed in range(2)]
    return [Job(config, outputs / "default" / xattn.config.run_name(config)) for config in configs]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[Seat]]:
    """The seats of the processes of each study; empty if it stays in its own process. The machine has two GPUs."""
    started: list[list[Seat]] = []
    monkeypatch.setattr(workers, "gpus", lambda: ["0", "1"])
    monkeypatch.setattr(workers, "check_devices", lambda jobs: None)
    monkeypatch.setattr(study, "train_each_once", lambda jobs, outcomes: started.append([]))
    monkeypatch.setattr(workers, "_train_in_processes", lambda jobs, unfinished, seats, *_: started.append(list(seats)))
    return started


def test_auto_is_a_process_for_each_gpu_unless_a_run_is_over_several(started: list[list[Seat]], tmp_path: Path) -> None:
    run_study(jobs_of(tmp_path))
    run_study(jobs_of(tmp_path, "parallel.data=2"))
    run_study(jobs_of(tmp_path, "parallel.fsdp=null"))
    run_study(jobs_of(tmp_path, "parallel.data=2", "sweep.workers=1"))
    run_study(jobs_of(tmp_path, "sweep.workers=2"))
    both = [Seat(gpu="0"), Seat(gpu="1")]
    assert started == [both, [], [], [], both]
    with pytest.raises(BadInput, match=r"sweep\.workers = 2: each worker has one GPU.*parallel\.data = 2"):
        run_study(jobs_of(tmp_path, "parallel.data=2", "sweep.workers=2"))
    assert len(started) == 5


def test_auto_is_a_process_for_each_core_where_a_run_computes_with_one_thread(
    started: list[list[Seat]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its core to itself. Runs with another number of threads train afterwards in their own process."""
    monkeypatch.setattr(workers, "gpus", list)
    monkeypatch.setattr(workers, "cores", lambda: [3, 5, 6])
    monkeypatch.setattr(workers, "compute_with", lambda threads: None)
    one = jobs_of(tmp_path, "trainer.threads=1")
    all_cores, two = jobs_of(tmp_path), jobs_of(tmp_path, "trainer.threads=2")
    for jobs in (one, all_cores, one[:1], jobs_of(tmp_path, "trainer.threads=1", "sweep.workers=2"), [*one, *two]):
        run_study(jobs)
    assert started == [[Seat(core=3), Seat(core=5)], [], [], [Seat(), Seat()], [Seat(core=3), Seat(core=5)], [Seat()]]
    monkeypatch.setattr(workers, "cores", list)  # a system that cannot pin processes
    run_study(one)
    assert started[-1] == []


def test_resume_never_is_once_a_command(
    started: list[list[Seat]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise each process would move aside what another has just made."""
    handed: list[Job] = []
    monkeypatch.setattr(workers, "_train_in_processes", lambda jobs, unfinished, *_: handed.extend(unfinished))
    jobs = jobs_of(tmp_path, "resume=never")
    earlier = jobs[0].folder
    earlier.mkdir(parents=True)
    (earlier / run_folder.CONFIG).write_text(xattn.config.save(jobs[0].config))
    run_folder.write_summary(earlier, {"status": "done"})
    run_study(jobs)
    assert [job.config.resume for job in handed] == ["auto", "auto"]
    assert [job.folder for job in handed] == [job.folder for job in jobs]
    assert run_folder.read_summary(earlier) is None
    (aside,) = (earlier.parent / run_folder.SUPERSEDED).iterdir()
    assert (run_folder.read_summary(aside) or {})["status"] == "done"


def test_the_gpus_are_those_that_jax_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins: list[Any] = []
    listed = "GPU 0: NVIDIA H100 (UUID: GPU-a)\n  MIG 1g.10gb Device 0: (UUID: MIG-b)\nGPU 1: H100 (UUID: GPU-c)"
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: SimpleNamespace(stdout=listed, returncode=0))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus() == []  # jax is for CPUs only, whatever cards exist
    plugins.append(SimpleNamespace(name="xla_cuda12"))
    assert gpus() == ["0", "1"]
    for platforms, found in (("cpu", []), ("cpu,cuda", []), ("cuda,cpu", ["0", "1"]), ("tpu", [])):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        assert gpus() == found
    monkeypatch.delenv("JAX_PLATFORMS")
    for visible, found in (("", []), ("-1", []), ("1, 3", ["1", "3"]), ("GPU-a,-1,GPU-c", ["GPU-a"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus() == found


def test_a_config_that_a_worker_unpickles_has_all_its_keys() -> None:
    """A worker composes no config before. Once, its config.yaml lacked the keys of the optimizer and the data, so the
    run could be neither resumed nor loaded."""
    config = xattn.config.compose(["optimizer=muon", "data=mqar"])
    program = (
        "import pickle, sys; config = pickle.load(sys.stdin.buffer); import xattn.config as c; "
        "print(c.run_hash(config), c.save(config), end='')"
    )
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(config), capture_output=True)
    assert done.stdout.decode() == f"{xattn.config.run_hash(config)} {xattn.config.save(config)}"
