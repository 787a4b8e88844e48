"""metrics.jsonl after a power cut or a slip of the hand: each row is there once in the end, or those lost are named.

Every case resumes a copy of one run that was killed in the save of step 20, with rows up to there and checkpoints of 16
and 18.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import Reference, Training, differences, runs, steps, summary, the_run, train

pytestmark = pytest.mark.faults

Damage = Callable[[list[bytes]], list[bytes]]  # of the file's lines, without their ends
ROWS = 10  # of steps 2, 4, … 20


@pytest.fixture(scope="session")
def killed(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that it was started in."""
    cwd = tmp_path_factory.mktemp("killed")
    training = train(*command, cwd=cwd, points=["rename:20"])
    assert training.wait() == -signal.SIGKILL, training.out + training.err
    metrics = the_run(cwd) / "metrics.jsonl"  # may have more: training does not wait for a save
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:ROWS]))
    assert steps(the_run(cwd)) == [16, 18]
    return cwd


def resumed(damage: Damage, killed: Path, cwd: Path, command: list[str], *more: str) -> tuple[Training, Path]:
    shutil.copytree(killed / "outputs", cwd / "outputs")
    metrics = the_run(cwd) / "metrics.jsonl"
    lines = metrics.read_bytes().split(b"\n")[:-1]
    assert len(lines) == ROWS
    metrics.write_bytes(b"".join(line + b"\n" for line in damage(lines)))
    return train(*command, *more, cwd=cwd), metrics


def test_rows_are_on_the_disk_before_the_checkpoint_that_relies_on_them(
    command: list[str], cwd: Path, reference: Reference
) -> None:
    """The power is cut as the checkpoint is there, and what was not synced is lost: no row of it is."""
    assert train(*command, cwd=cwd, points=["power-cut:16"]).wait() == -signal.SIGKILL
    training = train(*command, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []
    assert "resumed     from step 16" in training.out


REPAIRED: dict[str, Damage] = {
    "NULs after the last row": lambda lines: [*lines, b"\0" * 100],
    "NULs in place of the row after the checkpoint": lambda lines: [*lines[:-1], b"\0" * 100],
    "half a row after the checkpoint": lambda lines: [*lines[:-1], lines[-1][:20]],
    "half a row and the next on one line": lambda lines: [*lines, lines[-1][:20] + lines[-1]],
    "no UTF-8": lambda lines: [*lines, b"\xff\xfe\x80"],
    "a line between rows": lambda lines: [*lines[:3], b"", *lines[3:]],
    "rows twice": lambda lines: [*lines[:4], *lines],
    "rows in another order": lambda lines: lines[::-1],
}


@pytest.mark.parametrize("what", REPAIRED)
def test_damage_that_no_checkpoint_relies_on_is_repaired(
    what: str, killed: Path, command: list[str], cwd: Path, reference: Reference
) -> None:
    """The run goes on from its newest checkpoint to the same rows and bits; the file is kept as it was."""
    training, metrics = resumed(REPAIRED[what], killed, cwd, command)
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []
    assert "resumed     from step 18" in training.out
    assert "metrics.jsonl: damaged or repeated" in training.out or "metrics.jsonl: rows out of order" in training.out
    assert len(list(metrics.parent.glob("metrics.jsonl.damaged-*"))) == 1


MADE_AGAIN: dict[str, Damage] = {
    "NULs": lambda lines: [*lines[:8], b"\0" * 100, lines[9]],
    "gone": lambda lines: lines[:8],
    "a row of another type": lambda lines: [*lines[:8], b'{"step": "18"}', lines[9]],
    "a list": lambda lines: [*lines[:8], b"[18]", lines[9]],
}


@pytest.mark.parametrize("what", MADE_AGAIN)
def test_rows_lost_before_a_checkpoint_are_made_again_from_an_older_one(
    what: str, killed: Path, command: list[str], cwd: Path, reference: Reference
) -> None:
    """No hole is left: it goes back to the newest checkpoint to which all rows are there, and says so."""
    training, _ = resumed(MADE_AGAIN[what], killed, cwd, command)
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []
    assert "resumed     from step 16" in training.out
    assert "the rows of steps 18 are lost" in training.out


LOST: dict[str, Damage] = {
    "2, 4": lambda lines: [b"\0" * 300, *lines[2:]],
    "2, 4, 6, 8, 10 and 4 more": lambda lines: [],
}


@pytest.mark.parametrize("which", LOST)
def test_rows_that_cannot_be_made_again_are_named_and_nothing_is_touched(
    which: str, killed: Path, command: list[str], cwd: Path
) -> None:
    """However often it is started: 4 each time, the damaged file and the checkpoints as they were."""
    training, metrics = resumed(LOST[which], killed, cwd, command)
    damaged = metrics.read_bytes()
    for _ in range(4):
        assert training.wait() == 4, training.out + training.err
        assert f"the rows of steps {which} are lost" in training.err
        assert len(training.err.splitlines()) <= 5
        assert metrics.read_bytes() == damaged
        assert steps(metrics.parent) == [16, 18]
        training = train(*command, cwd=cwd)


def test_a_missing_file_is_as_an_empty_one(killed: Path, command: list[str], cwd: Path) -> None:
    shutil.copytree(killed / "outputs", cwd / "outputs")
    (the_run(cwd) / "metrics.jsonl").unlink()
    training = train(*command, cwd=cwd)
    assert training.wait() == 4, training.out + training.err
    assert "the rows of steps 2, 4, 6, 8, 10 and 4 more are lost" in training.err


def test_lost_rows_can_be_given_up(killed: Path, command: list[str], cwd: Path, reference: Reference) -> None:
    """As the message says: a row with the step alone, at any place of the file."""
    training, metrics = resumed(lambda lines: [*lines[:1], *lines[2:]], killed, cwd, command)
    assert training.wait() == 4, training.out + training.err
    with metrics.open("a") as file:
        file.write('{"step": 4}\n')
    again = train(*command, cwd=cwd)
    assert again.wait() == 0, again.out + again.err
    assert summary(the_run(cwd))["state_sha256"] == reference.state_sha256
    assert metrics.read_text("utf-8").splitlines()[1] == '{"step": 4}'


PACK = ["seed=0,1", "sweep.pack=2"]


@pytest.mark.parametrize(("lost", "from_step"), [(range(8, 9), 16), (range(1), None)])
def test_a_member_of_a_pack_takes_the_others_back_or_is_left_out(
    lost: range, from_step: int | None, command: list[str], cwd: Path
) -> None:
    """The pack resumes at the newest step to which all members have their rows; where there is none, the one that lacks
    them is refused and the other goes on by itself."""
    assert train("-m", *command, *PACK, cwd=cwd, points=["rename:20"]).wait() == -signal.SIGKILL
    first, second = runs(cwd)
    metrics = first / "metrics.jsonl"
    lines = metrics.read_bytes().split(b"\n")[:-1]
    keep = [line for i, line in enumerate(lines) if i not in lost]
    metrics.write_bytes(b"".join(line + b"\n" for line in keep))
    again = train("-m", *command, *PACK, cwd=cwd)
    assert again.wait() == (0 if from_step else 1), again.out + again.err
    assert summary(second)["status"] == "done"
    assert (summary(first)["status"] == "done") == (from_step is not None)
    where = f"resumed     from step {from_step or 18}"
    went_on = [where in (run / "log.txt").read_text("utf-8") for run in (first, second)]
    assert went_on == [from_step is not None, True]
    if from_step is None:
        assert "the rows of steps 2 are lost" in again.err
