"""Checkpoint files that are cut, changed or gone: what fails the check is never used, never deleted, always told of."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

import xattn.config
from xattn.errors import IntegrityError
from xattn.training.checkpoint import Checkpoints
from xattn.training.programs import TrainState, hyperparameters, programs

from .harness import STEPS, Reference, differences, steps, summary, the_run, train

pytestmark = pytest.mark.faults


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


# (name, what it does to a file)
DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut to zero": lambda file: cut(file, 0),
    "cut to half": lambda file: cut(file, file.stat().st_size // 2),
    "cut by one byte": lambda file: cut(file, file.stat().st_size - 1),
    "one bit flipped": lambda file: flip(file, 4 * file.stat().st_size),
    "deleted": Path.unlink,
}


def files(checkpoint: Path) -> list[Path]:
    return sorted(file for file in checkpoint.rglob("*") if file.is_file())


def found(folder: Path) -> list[int]:
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


@pytest.fixture(scope="module")
def shapes(command: list[str]) -> TrainState:
    config = xattn.config.compose(command)
    compiled, _ = programs(config, 256)
    state: TrainState = jax.eval_shape(compiled.init, hyperparameters(config))
    return state


class Restorer:
    """Restores from copies of the untouched run's checkpoints, in this process."""

    def __init__(self, untouched: Path, folder: Path, shapes: TrainState):
        self._untouched, self._folder, self._shapes, self._count = untouched, folder, shapes, 0

    def copy(self) -> Path:
        self._count += 1
        target = self._folder / str(self._count)
        shutil.copytree(self._untouched / "checkpoints", target)
        return target

    def names(self) -> list[str]:
        """Of the newest checkpoint's files."""
        newest = self._untouched / "checkpoints" / str(STEPS)
        return [str(file.relative_to(newest)) for file in files(newest)]

    def restore(self, folder: Path) -> tuple[int, list[str]]:
        """The step that was restored, and what was said."""
        said: list[str] = []
        with Checkpoints(folder, say=said.append) as checkpoints:
            restored = checkpoints.restore_state(self._shapes)
        assert restored is not None
        return restored.step, said


@pytest.fixture
def restorer(untouched: Path, tmp_path: Path, shapes: TrainState) -> Restorer:
    return Restorer(untouched, tmp_path / "copies", shapes)


def test_the_newest_is_used_where_nothing_is_wrong(restorer: Restorer) -> None:
    folder = restorer.copy()
    assert restorer.restore(folder) == (STEPS, [])
    assert not (folder / ".bad").exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damage_to_any_file_is_noticed_and_the_one_before_is_used(damage: str, restorer: Restorer) -> None:
    """With a warning; the bad one is moved aside and kept as it was."""
    damaged = 0
    for name in restorer.names():
        folder = restorer.copy()
        before = found(folder)
        file = folder / str(STEPS) / name
        if not file.stat().st_size and damage != "deleted":
            continue
        DAMAGE[damage](file)
        left = {str(f.relative_to(folder / str(STEPS))): f.read_bytes() for f in files(folder / str(STEPS))}
        step, said = restorer.restore(folder)
        damaged += 1
        assert step == before[-2], name
        assert len(said) == 1
        assert str(STEPS) in said[0]
        (aside,) = (folder / ".bad").iterdir()
        assert {str(f.relative_to(aside)): f.read_bytes() for f in files(aside)} == left
    assert damaged > 5


def test_twenty_random_bit_flips_are_twenty_detected(restorer: Restorer) -> None:
    """Anywhere in any file, in proportion to its size."""
    generator = random.Random(20)
    for _ in range(20):
        folder = restorer.copy()
        newest = files(folder / str(STEPS))
        (file,) = generator.choices(newest, [file.stat().st_size for file in newest])
        flip(file, generator.randrange(8 * file.stat().st_size))
        step, said = restorer.restore(folder)
        assert step < STEPS, file
        assert len(said) == 1


def test_an_empty_newest_step_is_not_believed(restorer: Restorer) -> None:
    folder = restorer.copy()
    (folder / str(STEPS + 1)).mkdir()
    step, said = restorer.restore(folder)
    assert step == STEPS
    assert str(STEPS + 1) in said[0]
    assert len(said) == 1


def test_a_checkpoint_under_another_steps_name_is_not_believed(restorer: Restorer) -> None:
    """Its digests are right, and it would make the run repeat or skip steps."""
    folder = restorer.copy()
    (folder / str(STEPS)).rename(folder / str(STEPS + 1))
    step, said = restorer.restore(folder)
    assert step < STEPS
    assert len(said) == 1


def test_where_none_is_whole_nothing_is_restored(restorer: Restorer) -> None:
    folder = restorer.copy()
    for step in found(folder):
        flip(folder / str(step) / "manifest.json", 0)
    with pytest.raises(IntegrityError):
        restorer.restore(folder)


# ---- through the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def partial(command: list[str], cwd: Path) -> Path:
    """The folder of a run that was killed at step 15, with several checkpoints."""
    train(*command, cwd=cwd, points=["step:15"])
    assert len(steps(the_run(cwd))) >= 2
    return the_run(cwd)


def test_a_broken_newest_checkpoint_costs_steps_and_nothing_else(
    partial: Path, command: list[str], cwd: Path, reference: Reference
) -> None:
    before = steps(partial)
    largest = max(files(partial / "checkpoints" / str(before[-1])), key=lambda file: file.stat().st_size)
    flip(largest, 8 * largest.stat().st_size // 2)
    training = train(*command, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert f"checkpoint {before[-1]} is broken" in training.out
    assert f"resumed     from step {before[-2]}" in training.out
    assert differences(partial, reference) == []
    assert len(list((partial / "checkpoints" / ".bad").iterdir())) == 1


def _break_all(run: Path) -> None:
    for step in steps(run):
        flip(run / "checkpoints" / str(step) / "manifest.json", 99)


def test_where_no_checkpoint_is_whole_it_is_four_every_time_and_never_a_fresh_start(
    partial: Path, command: list[str], cwd: Path, reference: Reference
) -> None:
    """Nothing is deleted: with the files mended and put back, the run goes on."""
    kept = cwd.parent / "kept"
    shutil.copytree(partial / "checkpoints", kept)
    metrics = (partial / "metrics.jsonl").read_bytes()
    _break_all(partial)
    for _ in range(2):
        training = train(*command, cwd=cwd)
        assert training.wait() == 4, training.out + training.err
        assert len(training.err.splitlines()) <= 5
        assert "Traceback" not in training.err
        assert (partial / "metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(partial / "checkpoints")
    training = train(*command, cwd=cwd)
    assert training.wait() == 4
    shutil.copytree(kept, partial / "checkpoints")
    training = train(*command, cwd=cwd)
    assert training.wait() == 0, training.out + training.err
    assert differences(partial, reference) == []


def test_a_first_checkpoint_that_was_committed_counts_though_a_kill_came_right_after(
    command: list[str], cwd: Path
) -> None:
    """The rename is the commit: once it is made there is no fresh start, even if no summary had the time to say so."""
    train(*command, cwd=cwd, points=["renamed:4"])
    _break_all(the_run(cwd))
    for _ in range(2):
        training = train(*command, cwd=cwd)
        assert training.wait() == 4, training.out + training.err


def test_where_none_was_ever_committed_it_begins_at_step_zero(
    command: list[str], cwd: Path, reference: Reference
) -> None:
    train(*command, cwd=cwd, points=["rename:4"])
    assert summary(the_run(cwd))["committed_step"] is None
    training = train(*command, cwd=cwd)
    assert training.wait() == 0
    assert "resumed" not in training.out
    assert differences(the_run(cwd), reference) == []


def test_damaged_compiled_programs_change_no_result(
    command: list[str], cwd: Path, reference: Reference, tmp_path: Path
) -> None:
    """The cache of compiled programs is a cache: cut or flipped entries cost time and nothing else."""
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert train(*command, cwd=cwd, env=env).wait() == 0
    entries = [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.stat().st_size > 1000]
    assert entries
    for i, file in enumerate(entries):
        DAMAGE[list(DAMAGE)[i % 4]](file)
    training = train(*command, "resume=never", cwd=cwd, env=env)
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(cwd), reference) == []
