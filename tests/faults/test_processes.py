"""One run over several processes: what one of them meets, all answer."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from .harness import STEPS, Reference, Training, differences, last_step, rows, runs, steps, summary, the_run, until

pytestmark = pytest.mark.faults

HEARTBEAT = 4
SLOW = "pace:60"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def start(
    command: Sequence[str],
    *,
    cwd: Path,
    count: int = 2,
    port: int | None = None,
    points: Sequence[str] = (),
    alone: Mapping[int, Sequence[str]] | None = None,
) -> list[Training]:
    """The processes of one run. alone: overrides that only one of them is given."""
    port = port or free_port()
    pace = [f"parallel.heartbeat_seconds={HEARTBEAT}", "parallel.connect_seconds=60"]
    started = []
    for index in range(count):
        env = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        overrides = [*command, "parallel=data", *pace, *(alone or {}).get(index, ())]
        started.append(Training(*overrides, cwd=cwd, points=points, env=env))
    return started


def end(team: list[Training]) -> list[int]:
    return [training.wait() for training in team]


def said(team: list[Training]) -> str:
    return "".join(f"\n--- process {i}\n{training.out}{training.err}" for i, training in enumerate(team))


def scratch_folders() -> list[Path]:
    import tempfile

    return list(Path(tempfile.gettempdir()).glob("xattn-process*"))


@pytest.fixture(scope="module")
def pair(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What two processes come to that nobody touches."""
    cwd = tmp_path_factory.mktemp("pair")
    team = start(command, cwd=cwd)
    assert end(team) == [0, 0], said(team)
    return Reference.of(the_run(cwd))


def losses(reference: Reference) -> list[float]:
    return [row["train_loss"] for row in reference.rows]


def test_two_processes_compute_what_one_computes(pair: Reference, reference: Reference) -> None:
    np.testing.assert_allclose(losses(pair), losses(reference), rtol=1e-4)
    np.testing.assert_allclose(pair.summary["val_loss"], reference.summary["val_loss"], rtol=1e-4)
    assert [row["step"] for row in pair.rows] == [row["step"] for row in reference.rows]


def test_four_processes_compute_what_one_computes(command: list[str], cwd: Path, reference: Reference) -> None:
    """Over an axis each: parameters are split over processes, and gathered for checkpoints and the fingerprint."""
    before = set(scratch_folders())
    team = start([*command, "parallel.data=2", "parallel.fsdp=2"], cwd=cwd, count=4)
    assert end(team) == [0] * 4, said(team)
    np.testing.assert_allclose(losses(Reference.of(the_run(cwd))), losses(reference), rtol=1e-4)
    assert [training.out.count("step ") for training in team[1:]] == [0] * 3  # the first alone has the screen
    assert set(scratch_folders()) <= before


def test_a_signal_to_one_makes_all_save_the_same_step(command: list[str], cwd: Path, pair: Reference) -> None:
    team = start(command, cwd=cwd, points=[SLOW])
    until(lambda: any(last_step(run) >= 4 for run in runs(cwd)), team[0])
    team[1].send(signal.SIGTERM)
    assert end(team) == [75, 75], said(team)
    found = summary(the_run(cwd))
    assert found["status"] == "preempted"
    assert 4 <= found["step"] == found["committed_step"] == steps(the_run(cwd))[-1] < STEPS
    again = start(command, cwd=cwd)
    assert end(again) == [0, 0], said(again)
    assert f"resumed     from step {found['step']}" in again[0].out
    assert differences(the_run(cwd), pair) == []


@pytest.mark.parametrize("killed", [0, 1])
def test_one_is_killed_and_all_leave(killed: int, command: list[str], cwd: Path, pair: Reference) -> None:
    """jax ends the others with 134; the same command goes on from the last checkpoint, with the same bits."""
    team = start(command, cwd=cwd, points=[SLOW])
    until(lambda: any(steps(run)[-1:] >= [4] for run in runs(cwd)), team[0])
    team[killed].send(signal.SIGKILL)
    sent = time.monotonic()
    assert team[killed].wait() == -signal.SIGKILL
    assert team[1 - killed].wait() == -signal.SIGABRT, said(team)  # what a shell calls 134
    assert time.monotonic() - sent < HEARTBEAT + 10
    assert "failures" not in summary(the_run(cwd))
    again = start(command, cwd=cwd)
    assert end(again) == [0, 0], said(again)
    assert differences(the_run(cwd), pair) == []


def test_a_run_goes_on_with_another_number_of_processes(command: list[str], cwd: Path, reference: Reference) -> None:
    """With a warning, on record, and within rounding."""
    team = start(command, cwd=cwd, points=[SLOW])
    until(lambda: any(last_step(run) >= 6 for run in runs(cwd)), team[0])
    team[0].send(signal.SIGTERM)
    assert end(team) == [75, 75], said(team)
    one = Training(*command, cwd=cwd)
    assert one.wait() == 0, one.out + one.err
    assert "changed since this run began: device_count, process_count, mesh" in one.out
    np.testing.assert_allclose([row["train_loss"] for row in rows(the_run(cwd))], losses(reference), rtol=1e-4)


def test_processes_that_disagree_on_the_config_end_before_the_first_step(command: list[str], cwd: Path) -> None:
    team = start(command, cwd=cwd, alone={1: ["optimizer.learning_rate=0.5"]})
    assert end(team) == [2, 2], said(team)
    assert "optimizer.learning_rate: 0.003 in process 0, 0.5 in process 1" in team[0].err
    assert "xattn:" not in team[1].err
    assert not any((run / "config.yaml").exists() for run in runs(cwd))
    again = start(command, cwd=cwd)
    assert end(again) == [0, 0], said(again)


def test_what_only_the_first_can_see_ends_all(command: list[str], cwd: Path, text_file: Path) -> None:
    """The folder holds another run; each process leaves with 2, and one of them says why."""
    named = [*command, "hydra.run.dir=here"]
    team = start(named, cwd=cwd)
    assert end(team) == [0, 0], said(team)
    again = start([*named, "trainer.steps=30"], cwd=cwd)
    assert end(again) == [2, 2], said(again)
    assert "trainer.steps: 24 there, 30 now" in again[0].err
    assert "xattn:" not in again[1].err
    third = start(named, cwd=cwd)
    assert end(third) == [0, 0], said(third)
    assert "already done" in third[0].out


def test_a_port_in_use_is_told_before_the_first_step(command: list[str], cwd: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (first,) = start(command, cwd=cwd, count=2, port=port)[:1]
        assert first.wait() == 2, said([first])
        assert f"JAX_COORDINATOR_ADDRESS = localhost:{port}: this port cannot be used" in first.err
        assert "Traceback" not in first.err
