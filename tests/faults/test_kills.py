"""kill −9 at each named point; then the same command again ends as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from .harness import STEPS, Reference, committed_and_unsound, differences, real, steps, the_run, train

pytestmark = pytest.mark.faults

# (name, points of the starts that are killed, one after the other in the same folder)
POINTS = [
    ["locked", "data"],
    ["replace:config.yaml", "replaced:config.yaml"],
    ["replace:provenance.json", "replaced:provenance.json"],
    ["replace:summary.json", "compile", "in-compile"],
    ["step:1", "step:7", "step:8"],
    ["log:2", "log:8"],
    ["logged:8", "logged:12"],
    ["torn-log:2", "torn-log:8"],
    ["evaluation:1", "evaluation:2"],
    ["save:1", "save:3"],
    ["half-manifest", "half-manifest"],
    ["rename:4", "rename:8"],
    ["renamed:4", "renamed:12"],
    ["replace:summary.json:3", "replaced:summary.json:3"],
    ["deleting", "deleting"],
    ["renamed:8", "restored", "replace:metrics.jsonl", "replaced:metrics.jsonl"],
    [f"rename:{STEPS}", f"renamed:{STEPS}"],
    ["sample", "replace:sample.txt", "sample"],
]


@pytest.mark.parametrize("points", POINTS, ids=" then ".join)
def test_killed_at_a_point_the_run_ends_with_the_same_bits(
    points: list[str], command: list[str], cwd: Path, reference: Reference
) -> None:
    """Lost work is at most the interval and a save in flight; no checkpoint is half there; no manual step."""
    for point in points:
        training = train(*command, cwd=cwd, points=[point])
        assert training.wait() == -signal.SIGKILL, training.out + training.err
        assert committed_and_unsound(the_run(cwd)) == []
    before = steps(the_run(cwd))
    training = train(*command, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    if before:
        assert f"resumed     from step {before[-1]}" in training.out
    assert differences(the_run(cwd), reference) == []
    assert not (the_run(cwd) / "checkpoints" / ".bad").exists()


def test_the_start_that_these_tests_use_is_the_start_of_a_person(
    command: list[str], cwd: Path, reference: Reference
) -> None:
    """A forked victim and ``python train.py`` come to the same bits."""
    code, out, err = real(*command, cwd=cwd)
    assert code == 0, out + err
    assert differences(the_run(cwd), reference) == []
