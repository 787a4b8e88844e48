"""The three kills of the plain ``pytest``: real processes, from outside, at moments that the run's files tell."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from .harness import (
    PATIENCE,
    Reference,
    committed_and_unsound,
    differences,
    last_step,
    runs,
    start,
    steps,
    the_run,
    until,
)

pytestmark = pytest.mark.slow


def test_killed_three_times_the_run_ends_with_the_same_bits(
    command: list[str], cwd: Path, reference: Reference
) -> None:
    """In its beginning, at its first checkpoint, and later on; then the same command again finishes it."""
    moments = [
        lambda: bool(runs(cwd)) and (the_run(cwd) / "config.yaml").exists(),
        lambda: steps(the_run(cwd)) != [],
        lambda: last_step(the_run(cwd)) >= 14,
    ]
    for moment in moments:
        with start(*command, cwd=cwd, points=["pace:50"]) as process:
            until(moment)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert committed_and_unsound(the_run(cwd)) == []
    with start(*command, cwd=cwd) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out + err
    assert "resumed     from step" in out
    assert differences(the_run(cwd), reference) == []
