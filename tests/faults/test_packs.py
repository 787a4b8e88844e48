"""A pack that is killed goes on with the same members in their places, to the same bits; and one that is bad harms no
other."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from .harness import Reference, Training, differences, last_step, rows, runs, steps, summary, train, until

pytestmark = pytest.mark.faults

PACK = ["sweep.pack=3", "seed=0,1,2"]


@pytest.fixture(scope="module")
def packed(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    """What the members of a pack come to that nobody touches."""
    cwd = tmp_path_factory.mktemp("packed")
    training = train("-m", *command, *PACK, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert [summary(run)["packed_with"] for run in runs(cwd)] == [3, 3, 3]
    return [Reference.of(run) for run in runs(cwd)]


def all_differences(cwd: Path, references: list[Reference]) -> list[list[str]]:
    return [differences(run, reference) for run, reference in zip(runs(cwd), references, strict=True)]


@pytest.mark.parametrize(
    "points",
    [
        ["step:7", "log:8"],
        ["renamed:8", "rename:8"],  # one member has the step and the others don't
        ["renamed:4", "evaluation:4"],
        ["renamed:12", "restored", "replace:metrics.jsonl"],
        ["sample", "sample"],  # the first is done, the others not
    ],
    ids=" then ".join,
)
def test_a_pack_that_is_killed_ends_with_the_same_bits(
    points: list[str], command: list[str], cwd: Path, packed: list[Reference]
) -> None:
    for point in points:
        training = train("-m", *command, *PACK, cwd=cwd, points=[point])
        assert training.wait() == -signal.SIGKILL, training.out + training.err
    training = train("-m", *command, *PACK, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert all_differences(cwd, packed) == [[], [], []]


def test_a_pack_that_is_asked_to_stop_saves_and_leaves(command: list[str], cwd: Path, packed: list[Reference]) -> None:
    training = Training("-m", *command, *PACK, cwd=cwd, points=["pace:100"])
    until(lambda: bool(runs(cwd)) and last_step(runs(cwd)[-1]) >= 4, training)
    training.send(signal.SIGTERM)
    assert training.wait() == 75, training.out + training.err
    stopped = [summary(run) for run in runs(cwd)]
    assert {found["status"] for found in stopped} == {"preempted"}
    assert len({found["committed_step"] for found in stopped}) == 1
    training = train("-m", *command, *PACK, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert all_differences(cwd, packed) == [[], [], []]


def test_one_that_diverges_harms_no_other_also_when_the_pack_is_resumed(command: list[str], cwd: Path) -> None:
    """Its place in the pack is kept, masked: the others end with the bits of a pack that nobody killed."""
    pack = ["sweep.pack=3", "optimizer.learning_rate=3e-3,1e30,1e-3"]
    untouched = cwd.parent / "untouched"
    untouched.mkdir()
    training = train("-m", *command, *pack, cwd=untouched)
    assert training.wait() == 0, training.out + training.err
    found = {run.name: summary(run) for run in runs(untouched)}
    assert sorted(each["status"] for each in found.values()) == ["diverged", "done", "done"]
    assert train("-m", *command, *pack, cwd=cwd, points=["renamed:12"]).wait() == -signal.SIGKILL
    training = train("-m", *command, *pack, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    for run in runs(cwd):
        expected = untouched / "outputs" / "default" / run.name
        assert (summary(run)["status"], rows(run)) == (found[run.name]["status"], rows(expected))
        assert summary(run)["state_sha256"] == found[run.name]["state_sha256"]


def test_a_member_that_is_resumed_alone_ends_within_tolerance_and_on_record(
    command: list[str], cwd: Path, packed: list[Reference]
) -> None:
    assert train("-m", *command, *PACK, cwd=cwd, points=["renamed:12"]).wait() == -signal.SIGKILL
    alone = train(*command, "seed=1", cwd=cwd)
    assert alone.wait() == 0, alone.out + alone.err
    assert "changed since this run began: pack" in alone.out
    (run,) = [run for run in runs(cwd) if "seed1" in run.name]
    assert summary(run)["val_loss"] == pytest.approx(packed[1].summary["val_loss"], rel=1e-4)
    assert [row["step"] for row in rows(run)] == [row["step"] for row in packed[1].rows]
    training = train("-m", *command, *PACK, cwd=cwd)  # the others go on as the pack that they were, its place masked
    assert training.wait() == 0, training.out + training.err
    assert all_differences(cwd, packed)[::2] == [[], []]


def test_a_member_whose_newest_checkpoint_is_broken_takes_the_pack_back_with_it(
    command: list[str], cwd: Path, packed: list[Reference]
) -> None:
    assert train("-m", *command, *PACK, cwd=cwd, points=["log:18"]).wait() == -signal.SIGKILL
    newest = steps(runs(cwd)[1])[-1]
    (runs(cwd)[1] / "checkpoints" / str(newest) / "manifest.json").write_text("{}")
    training = train("-m", *command, *PACK, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert f"checkpoint {newest} is broken" in training.out
    assert all_differences(cwd, packed) == [[], [], []]
