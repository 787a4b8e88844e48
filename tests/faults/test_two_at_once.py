"""A run folder has one process at a time; what another is doing is not done twice."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from .harness import (
    Reference,
    Training,
    differences,
    last_step,
    runs,
    start,
    steps,
    summary,
    the_run,
    train,
    until,
)

pytestmark = pytest.mark.faults


def begun(cwd: Path) -> bool:
    return any(last_step(run) > 0 for run in runs(cwd))


def test_a_second_process_leaves_with_five_at_once_and_the_first_is_unharmed(
    command: list[str], cwd: Path, reference: Reference
) -> None:
    """Within two seconds of work; wall-clock time is the machine's affair here. Also where it asks to begin anew."""
    first = Training(*command, cwd=cwd, points=["pace:300"])
    until(lambda: begun(cwd), first)
    for more in ([], ["resume=never"]):
        second = start(*command, *more, cwd=cwd)
        assert second.stderr is not None
        err = second.stderr.read()
        _, status, usage = os.wait4(second.pid, 0)
        second.returncode = os.waitstatus_to_exitcode(status)
        second.communicate()
        assert second.returncode == 5
        assert the_run(cwd).name in err
        assert len(err.splitlines()) <= 5
        assert usage.ru_utime + usage.ru_stime < 2
    assert first.wait() == 0
    assert differences(the_run(cwd), reference) == []


def test_of_four_starts_at_once_one_trains(command: list[str], cwd: Path, reference: Reference) -> None:
    started = [Training(*command, cwd=cwd, points=["pace:50"]) for _ in range(4)]
    codes = sorted(training.wait() for training in started)
    assert codes == [0, 5, 5, 5]
    assert differences(the_run(cwd), reference) == []


def test_a_stopped_process_holds_its_folder_and_a_dead_one_does_not(
    command: list[str], cwd: Path, reference: Reference
) -> None:
    first = Training(*command, cwd=cwd, points=["pace:100"])
    until(lambda: steps(the_run(cwd)) != [] if runs(cwd) else False, first)
    first.send(signal.SIGSTOP)
    assert train(*command, cwd=cwd).wait() == 5
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    again = train(*command, cwd=cwd)
    assert again.wait() == 0, again.out + again.err
    assert differences(the_run(cwd), reference) == []


def test_two_sweeps_of_one_study_share_the_work(command: list[str], cwd: Path, reference: Reference) -> None:
    """Each run is made once, and both end well."""
    sweep = ["-m", *command, "seed=0,1,2"]
    both = [Training(*sweep, cwd=cwd, points=["pace:30"]) for _ in range(2)]
    assert [training.wait() for training in both] == [0, 0], both[0].err + both[1].err
    assert len(runs(cwd)) == 3
    for run in runs(cwd):
        assert summary(run)["status"] == "done"
        assert (run / "log.txt").read_text("utf-8").count("computed by") == 1
    assert differences(runs(cwd)[0], reference) == []


def test_a_sweep_takes_over_from_one_that_dies(command: list[str], cwd: Path, reference: Reference) -> None:
    sweep = ["-m", *command, "seed=0,1"]
    first = Training(*sweep, cwd=cwd, points=["pace:300"])
    until(lambda: begun(cwd), first)
    second = Training(*sweep, cwd=cwd)
    time.sleep(4)
    first.send(signal.SIGKILL)
    assert second.wait() == 0, second.out + second.err
    assert differences(runs(cwd)[0], reference) == []
    assert [summary(run)["status"] for run in runs(cwd)] == ["done", "done"]


@pytest.mark.parametrize("more", [(), ("-m", "seed=0,1")])
def test_without_locks_no_run_is_made(more: tuple[str, ...], command: list[str], cwd: Path) -> None:
    """A line with the file system and what helps, and no run that a second process could destroy."""
    training = train(*more, *command, cwd=cwd, points=["no-locks"])
    assert training.wait() == (1 if more else 6), training.out + training.err
    assert "has no locks (" in training.err
    assert "Traceback" not in training.out + training.err
    assert not any((run / "config.yaml").exists() for run in runs(cwd))
