"""SLURM and Ray jobs without either: fake SLURM commands on PATH, and a stand-in for Ray's module."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from hydra_plugins.xattn_remote import Handed
from tests import processes
from xattn.errors import BadInput, ExitCode
from xattn.runs.run_folder import read_summary
from xattn.sweep import cluster

ROOT = Path(__file__).resolve().parent.parent.parent
SLURM = {"launcher": {"_target_": "of.submitit.SlurmLauncher", "submitit_folder": "a/.submitit/%j"}}
LOCAL = {"launcher": {"_target_": "of.submitit.LocalLauncher"}}
RAY = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"

# There is one job, 77, and its process has no parent here. $FAKE has its script, process id and scontrol's arguments.
COMMANDS = {
    "sbatch": """
        cp "$1" "$FAKE/job.sh"
        export SLURM_JOB_ID=77 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
        setsid bash "$FAKE/job.sh" > /dev/null 2>&1 < /dev/null &
        echo Submitted batch job 77
    """,
    "srun": """
        while [[ $1 == --* ]]; do [[ $1 == --output || $1 == --error ]] && shift; shift; done
        echo $$ > "$FAKE/pid"
        exec "$@" >> "$FAKE/out" 2>&1
    """,
    "scontrol": """
        echo "$*" >> "$FAKE/asked"
        [[ $1 == show ]] && echo "JobId=77 JobState=$(cat "$FAKE/state")"
        [[ $1 == requeue && -e $FAKE/broken ]] && exit 1
        [[ $1 == requeue && -e $FAKE/job.sh ]] && setsid bash -c '
            while kill -0 $(cat "$FAKE/pid"); do sleep 0.1; done; exec bash "$FAKE/job.sh"
        ' > /dev/null 2>&1 < /dev/null &
        exit 0
    """,
    "sacct": """
        echo "JobID|State|NodeList"
        echo "77|RUNNING|here"
    """,
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder $FAKE, which precedes all others in PATH."""
    fake = tmp_path / "slurm"
    fake.mkdir()
    for name, script in COMMANDS.items():
        (fake / name).write_text(f"#!/bin/bash\n{script}")
        (fake / name).chmod(0o755)
    (fake / "state").write_text("RUNNING")
    monkeypatch.setenv("FAKE", str(fake))
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    return fake


def asked(fake: Path) -> list[str]:
    """Return the arguments of each call of scontrol."""
    file = fake / "asked"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def descendants(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [each for child in map(int, children) for each in (child, *descendants(child))]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not list a process's children")
@pytest.mark.parametrize(
    ("number", "workers", "begun", "requests"),
    [(signal.SIGTERM, 1, 1, ["show job 77", "requeue 77"]), (signal.SIGUSR2, 2, 2, ["requeue 77"])],
)
def test_a_job_that_slurm_stops_is_requeued_and_makes_the_rest_of_its_runs(
    number: signal.Signals, workers: int, begun: int, requests: list[str], tiny: list[str], slurm: Path, tmp_path: Path
) -> None:
    """Every process of the job gets the signal; USR2 is submitit's own. Each process saves its running run. The second
    attempt resumes these, and then makes the others."""
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    typed = ["hydra/launcher=slurm", "hydra.launcher.runs_per_job=2", f"sweep.workers={workers}", *tiny, "seed=0,1"]
    typed += ["trainer.steps=800", "trainer.eval_every=800"]
    sweep = processes.Process(str(ROOT / "train.py"), "-m", *typed, cwd=tmp_path)
    study = tmp_path / "outputs" / "default"
    wait_for(lambda: len([*study.glob("*/metrics.jsonl")]) >= begun)
    job = int((slurm / "pid").read_text())
    for process in (*descendants(job), job):
        os.kill(process, number)
    assert sweep.wait() == 0, sweep.out + sweep.err + (slurm / "out").read_text()
    out = sweep.out + sweep.err
    assert asked(slurm) == requests
    logs = [(run / "log.txt").read_text("utf-8") for run in sorted(study.glob("softmax*"))]
    assert ["resumed     from step" in log for log in logs] == [True, workers == 2]
    assert [(read_summary(run) or {})["status"] for run in study.glob("softmax*")] == ["done", "done"]
    assert "submitted 2 runs to SLURM as 1 job" in out
    assert "run folders outputs/default/" in out
    assert "job logs    outputs/default/.submitit/JOB/JOB_0_log.out" in out
    assert [path for path in study.rglob("*") if "%" in path.name] == []


@pytest.fixture
def requeued(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A job submitted to SLURM by submitit; returns the signals that its SIGUSR2 handler was called with."""
    called: list[int] = []

    def handler(number: int, frame: object) -> None:
        called.append(number)
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    before = signal.signal(signal.SIGUSR2, handler)
    yield called
    signal.signal(signal.SIGUSR2, before)


def test_only_a_job_of_submitit_s_is_queued_again(
    slurm: Path, requeued: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own SLURM job is left alone, even if submitit starts local processes in it."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    cluster.queue_again()
    monkeypatch.delenv("SUBMITIT_EXECUTOR")
    cluster.queue_again()
    assert (requeued, asked(slurm)) == ([], [])
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    cluster.queue_again()
    assert (requeued, asked(slurm)) == ([signal.SIGUSR2], ["show job 77", "requeue 77"])


def test_of_an_array_the_task_alone_is_asked_about(
    slurm: Path, requeued: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SLURM_JOB_ID of the last task is also the id of the whole array: all of it would be requeued."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    cluster.queue_again()
    assert asked(slurm)[0] == "show job 77_3"


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_job_that_was_cancelled_is_not_queued_again(
    state: str, slurm: Path, requeued: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "state").write_text(state)
    cluster.queue_again()
    assert requeued == []
    assert f"SLURM is ending job 77 ({state}) and does not requeue it" in capsys.readouterr().out


def test_a_job_that_cannot_be_queued_again_says_why(
    slurm: Path, requeued: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cluster may forbid requeueing. The job then ends like one that was stopped and saved."""
    (slurm / "broken").touch()
    monkeypatch.setattr(HydraConfig, "get", lambda: SimpleNamespace(job=SimpleNamespace(num=0)))
    nothing: Any = None
    handed = Handed(nothing, nothing, lambda config: ExitCode.PREEMPTED)
    handed.groups = {0: [(0, [])]}
    assert handed(OmegaConf.create({"resume": "auto"})) == ExitCode.PREEMPTED
    assert requeued == [signal.SIGUSR2]
    assert re.search("the job was not requeued: .*scontrol.*requeue", capsys.readouterr().err)


def test_without_srun_nothing_is_handed_to_slurm(tiny: list[str], tmp_path: Path) -> None:
    """It exits with 2 and names the way out, before anything is written; also under the plugin's own name."""
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    for choice in ("slurm", "submitit_slurm"):
        typed = ["-m", f"hydra/launcher={choice}", *tiny, "seed=0,1"]
        done = processes.train(*typed, cwd=tmp_path, env=os.environ | {"PATH": str(tmp_path)})
        assert done.returncode == 2
        assert f"hydra/launcher={choice}: sbatch and srun not found on PATH" in done.stderr
        assert "hydra/launcher=slurm_local" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [0, -1, 1.5, True, "all"])
def test_runs_per_job_is_a_whole_number(given: object) -> None:
    with pytest.raises(
        BadInput, match=rf"hydra\.launcher\.runs_per_job = {given}: must be a whole number of at least 1"
    ):
        cluster.check_group(given, SLURM)


def test_a_group_of_runs_is_not_given_to_several_tasks() -> None:
    """Each task would make every run of the group."""
    settings = {"launcher": SLURM["launcher"] | {"nodes": 2, "tasks_per_node": 8}}
    assert cluster.check_group(1, settings) == 1
    assert cluster.check_group(64, SLURM) == 64
    with pytest.raises(BadInput, match=r"got .*\.nodes = 2, hydra\.launcher\.launcher\.tasks_per_node = 8"):
        cluster.check_group(64, settings)


@pytest.mark.parametrize(("code", "requests"), [(75, ["requeue 77"]), (0, []), (3, [])])
def test_the_script_of_the_documentation_requeues_what_was_stopped(
    code: int, requests: list[str], slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is a plain SLURM job, without submitit."""
    page = (ROOT / "docs" / "devices.md").read_text("utf-8")
    (script,) = [block for block in page.split("```")[1::2] if "#SBATCH" in block]
    (slurm / "python").write_text(f"#!/bin/bash\nexit {code}\n")
    (slurm / "python").chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert subprocess.run(["bash", "-c", script.removeprefix("bash\n")]).returncode == code
    assert asked(slurm) == requests


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for Ray's module: two nodes with 8 cores and a GPU each, and a third that has died."""
    small = {"CPU": 8.0, "GPU": 1.0, "memory": 1e10, "accelerator_type:H100": 1.0}
    nodes = [{"Alive": True, "Resources": small}] * 2 + [{"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]
    started: list[Any] = []
    module = SimpleNamespace(
        started=started,
        init=lambda **given: started.append(given),
        is_initialized=lambda: bool(started),
        nodes=lambda: nodes,
    )
    monkeypatch.setitem(sys.modules, "ray", module)
    return module


def on_ray(**remote: Any) -> dict[str, Any]:
    return {"launcher": {"_target_": RAY, "ray": {"init": {"address": None}, "remote": remote}}}


@pytest.mark.parametrize(
    ("remote", "told"),
    [
        ({"num_gpus": 2}, r"CPU = 1 \(the most on a node: 8\), GPU = 2 \(the most on a node: 1\)"),
        ({"num_gpus": 1, "num_cpus": 16}, r"CPU = 16 \(the most on a node: 8\)"),
        ({"resources": {"tpu": 4}}, r"tpu = 4 \(the most on a node: 0\)"),
        ({"accelerator_type": "A100"}, "accelerator_type:A100"),
    ],
)
def test_a_task_that_no_node_of_ray_s_can_take_is_refused(
    remote: dict[str, Any], told: str, ray: SimpleNamespace
) -> None:
    """If two nodes have one GPU each, no node has two."""
    with pytest.raises(BadInput, match=told):
        cluster.check_resources(on_ray(**remote))


def test_a_task_that_a_node_can_take_goes_to_ray(ray: SimpleNamespace) -> None:
    for remote in ({"num_gpus": 1, "max_calls": 1}, {"num_gpus": 0, "num_cpus": 8}, {"accelerator_type": "H100"}):
        cluster.check_resources(on_ray(**remote))
    assert ray.started == [{"address": None}]


def test_a_cluster_that_is_not_there_is_refused(ray: SimpleNamespace) -> None:
    def init(**given: Any) -> None:
        raise ConnectionError("no GCS at 10.0.0.1:6379")

    ray.init = init
    with pytest.raises(BadInput, match="no cluster to run on: no GCS at"):
        cluster.check_resources(on_ray(num_gpus=1))


def test_nobody_but_ray_s_launcher_starts_ray(ray: SimpleNamespace) -> None:
    cluster.check_resources(SLURM)
    assert ray.started == []


def test_the_local_executor_s_folder_names_no_job() -> None:
    """The executor would create a folder with the literal name."""
    assert cluster.without_ids("outputs/a/.submitit/%j") == "outputs/a/.submitit"
    assert cluster.without_ids("outputs/a/.submitit") == "outputs/a/.submitit"
    assert (cluster.is_local(LOCAL), cluster.is_local(SLURM)) == (True, False)
