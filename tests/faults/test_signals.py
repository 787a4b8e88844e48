"""Signals that ask for an end, and SIGSTOP: from the moment that the run folder is held."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from xattn.system.signals import DEMANDS, WARNINGS

from .harness import (
    PATIENCE,
    ROOT,
    STEPS,
    Reference,
    Training,
    differences,
    last_step,
    runs,
    steps,
    summary,
    the_run,
    train,
    until,
)

pytestmark = pytest.mark.faults

SLOW = "pace:100"


def wait_for_step(training: Training, cwd: Path, step: int) -> None:
    """Of any run there."""
    until(lambda: any(last_step(run) >= step for run in runs(cwd)), training)


@pytest.mark.parametrize("number", [*DEMANDS, *WARNINGS])
def test_the_first_signal_saves_and_leaves_with_75(
    number: signal.Signals, command: list[str], cwd: Path, reference: Reference
) -> None:
    """Nothing is lost: the checkpoint is of the step at whose end the process left."""
    training = Training(*command, cwd=cwd, points=[SLOW])
    wait_for_step(training, cwd, 6)
    training.send(number)
    assert training.wait() == 75, training.out + training.err
    run = the_run(cwd)
    found = summary(run)
    assert found["status"] == "preempted"
    assert 6 <= found["step"] < STEPS
    assert steps(run)[-1] == found["committed_step"] == found["step"]
    again = train(*command, cwd=cwd)
    assert again.wait() == 0, again.out + again.err
    assert f"resumed     from step {found['step']}" in again.out
    assert differences(run, reference) == []


@pytest.mark.parametrize("number", DEMANDS)
def test_the_second_signal_leaves_at_once_and_the_run_is_still_resumable(
    number: signal.Signals, command: list[str], cwd: Path, reference: Reference
) -> None:
    training = Training(*command, cwd=cwd, points=["pace:30", "slow-save:3000"])
    wait_for_step(training, cwd, 4)
    training.send(number)
    time.sleep(0.2)
    sent = time.monotonic()
    training.send(number)
    assert training.wait() == 128 + number
    assert time.monotonic() - sent < 2
    again = train(*command, cwd=cwd)
    assert again.wait() == 0, again.out + again.err
    assert differences(the_run(cwd), reference) == []


def test_a_warning_that_is_repeated_lets_the_save_end(command: list[str], cwd: Path) -> None:
    """A shell hands on the hangup that its jobs have had from the kernel; a CPU limit warns every second."""
    training = Training(*command, cwd=cwd, points=["pace:30", "slow-save:1000"])
    wait_for_step(training, cwd, 4)
    for number in WARNINGS * 2:
        training.send(number)
        time.sleep(0.1)
    assert training.wait() == 75, training.out + training.err
    assert summary(the_run(cwd))["status"] == "preempted"


def test_a_demand_after_a_warning_leaves_at_once(command: list[str], cwd: Path) -> None:
    training = Training(*command, cwd=cwd, points=["pace:30", "slow-save:3000"])
    wait_for_step(training, cwd, 4)
    training.send(signal.SIGUSR1)
    time.sleep(0.2)
    training.send(signal.SIGTERM)
    assert training.wait() == 128 + signal.SIGTERM


def test_a_signal_that_is_ignored_at_the_start_stays_ignored(
    command: list[str], cwd: Path, reference: Reference
) -> None:
    """nohup's hangup, and the Ctrl-C of who started it in the background of a script."""
    training = Training(*command, cwd=cwd, points=["ignored:SIGHUP", "ignored:SIGINT", "pace:30"])
    wait_for_step(training, cwd, 4)
    training.send(signal.SIGHUP)
    training.send(signal.SIGINT)
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []


def test_a_handler_that_stands_already_is_called_after_the_save(
    command: list[str], cwd: Path, reference: Reference
) -> None:
    """submitit's queues the job again and leaves: called at once, it would lose the steps since the last checkpoint."""
    training = Training(*command, cwd=cwd, points=["standing:SIGUSR2", SLOW])
    wait_for_step(training, cwd, 6)
    training.send(signal.SIGUSR2)
    assert training.wait() == 255, training.out + training.err
    found = summary(the_run(cwd))
    assert found["status"] == "preempted"
    assert found["step"] == found["committed_step"] >= 6
    assert (cwd / "queued-again").exists()
    again = train(*command, cwd=cwd)
    assert again.wait() == 0, again.out + again.err
    assert differences(the_run(cwd), reference) == []


def test_a_closed_terminal_loses_nothing(command: list[str], cwd: Path, reference: Reference) -> None:
    """The hangup comes, and from then on every line for the screen fails (EIO)."""
    ours, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "faults" / "victim.py"), SLOW, "--", *command],
        cwd=cwd,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    until(lambda: any(last_step(run) >= 6 for run in runs(cwd)))
    os.close(ours)
    assert process.wait(PATIENCE) == 75
    found = summary(the_run(cwd))
    assert found["status"] == "preempted"
    assert found["step"] == found["committed_step"]
    again = train(*command, cwd=cwd)
    assert again.wait() == 0, again.out + again.err
    assert differences(the_run(cwd), reference) == []


def test_a_signal_before_the_first_step_is_not_lost(command: list[str], cwd: Path, reference: Reference) -> None:
    """It comes as soon as the folder is held, while jax is loaded and the program compiled."""
    training = Training(*command, cwd=cwd, points=[SLOW])
    until(lambda: bool(runs(cwd)) and (the_run(cwd) / "log.txt").exists(), training)
    training.send(signal.SIGTERM)
    assert training.wait() == 75, training.out + training.err
    assert summary(the_run(cwd))["status"] == "preempted"
    again = train(*command, cwd=cwd)
    assert again.wait() == 0, again.out + again.err
    assert differences(the_run(cwd), reference) == []


def test_stopped_for_ten_seconds_it_goes_on_as_if_nothing_had_been(
    command: list[str], cwd: Path, reference: Reference
) -> None:
    training = Training(*command, cwd=cwd, points=[SLOW])
    wait_for_step(training, cwd, 4)
    training.send(signal.SIGSTOP)
    before = last_step(the_run(cwd))
    time.sleep(10)
    assert last_step(the_run(cwd)) <= before + 2
    training.send(signal.SIGCONT)
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []


def test_a_signal_between_the_last_step_and_the_end_stops_a_sweep(command: list[str], cwd: Path) -> None:
    """The run that is ending may end; the next must not begin: whoever asked waits for this process to leave."""
    training = Training("-m", *command, "seed=0,1", cwd=cwd, points=["slow-finish:3000"])
    until(lambda: any(steps(run)[-1:] == [STEPS] for run in runs(cwd)), training)
    training.send(signal.SIGTERM)
    assert training.wait() == 75, training.out + training.err
    assert sum(last_step(run) > 0 for run in runs(cwd)) == 1


def test_a_signal_stops_a_sweep_and_the_same_command_finishes_it(
    command: list[str], cwd: Path, reference: Reference
) -> None:
    sweep = ["-m", *command, "seed=0,1"]
    training = Training(*sweep, cwd=cwd, points=[SLOW])
    wait_for_step(training, cwd, 4)
    training.send(signal.SIGTERM)
    assert training.wait() == 75, training.out + training.err
    again = train(*sweep, cwd=cwd)
    assert again.wait() == 0, again.out + again.err
    first, second = runs(cwd)
    assert differences(first, reference) == []
    assert summary(second)["status"] == "done"


def test_failures_of_its_own_are_not_tried_for_ever_and_kills_never_count(
    command: list[str], cwd: Path, reference: Reference
) -> None:
    """Three errors in a row without a new step: the next start says so and leaves with 1. Kills don't count."""
    for point in ("step:6", "error:6", "compile", "error:6", "in-compile"):
        train(*command, cwd=cwd, points=[point])
    assert summary(the_run(cwd))["failures"]["count"] == 2
    # Errors at a place that a new step has been made before are the first in their row.
    training = train(*command, cwd=cwd, points=["error:20"])
    assert training.wait() == 1
    assert summary(the_run(cwd))["failures"]["count"] == 1
    for _ in range(2):
        training = train(*command, cwd=cwd, points=["error:20"])
        assert training.wait() == 1
        assert "RuntimeError: planted" in training.out
        assert "Traceback" not in training.out + training.err
        assert "Traceback" in (the_run(cwd) / "log.txt").read_text("utf-8")
    began = time.monotonic()
    training = train(*command, cwd=cwd)
    assert training.wait() == 1
    assert time.monotonic() - began < 5
    assert "3 times in a row" in training.err
    assert len(training.err.splitlines()) <= 5
    begun_anew = train(*command, "resume=never", cwd=cwd)
    assert begun_anew.wait() == 0, begun_anew.out + begun_anew.err
    assert differences(the_run(cwd), reference) == []


def test_an_error_of_our_own_before_the_config_is_written_blocks_nothing(
    command: list[str], cwd: Path, reference: Reference
) -> None:
    training = train(*command, cwd=cwd, points=["error-in-data"])
    assert training.wait() == 1, training.out + training.err
    again = train(*command, cwd=cwd)
    assert again.wait() == 0, again.out + again.err
    assert differences(the_run(cwd), reference) == []
