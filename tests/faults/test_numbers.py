"""Losses and gradients that are not finite, planted inside the compiled step: nothing of them gets into the state."""

from __future__ import annotations

import signal
from pathlib import Path

import jax
import pytest

import xattn.config
from xattn.training.checkpoint import Checkpoints
from xattn.training.programs import hyperparameters, programs
from xattn.training.state_hash import state_sha256

from .harness import (
    STEPS,
    Reference,
    Training,
    differences,
    last_step,
    rows,
    runs,
    steps,
    summary,
    the_run,
    train,
    until,
)

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    ("point", "update"),
    [
        ("nonfinite:loss:nan:7", 7),
        ("nonfinite:gradient:inf:8", 8),
        ("nonfinite:gradient:1e30:7", 7),  # its float32 norm overflows
        ("nonfinite:loss:-inf:1", 1),
        (f"nonfinite:gradient:nan:{STEPS}", STEPS),
    ],
)
def test_stop_ends_at_the_exact_update_with_the_parameters_before_it(
    point: str, update: int, command: list[str], cwd: Path, reference: Reference
) -> None:
    """Between logged steps, at one, at the first, at the last. Exit 3, again and again."""
    training = train(*command, cwd=cwd, points=[point])
    assert training.wait() == 3, training.out + training.err
    assert f"update {update} " in training.out
    run = the_run(cwd)
    found = summary(run)
    assert found["status"] == "diverged"
    assert found["step"] == update - 1
    assert rows(run) == [row for row in reference.rows if row["step"] < update]
    again = train(*command, cwd=cwd)
    assert again.wait() == 3
    assert "diverged" in again.out


def test_the_parameters_are_those_of_the_step_before(command: list[str], cwd: Path) -> None:
    """To the bit: as a checkpoint of that step has them, which an untouched run wrote."""
    (cwd / "bad").mkdir()
    (cwd / "good").mkdir()
    train(*command, cwd=cwd / "bad", points=["nonfinite:loss:nan:9"])
    train(*command, cwd=cwd / "good", points=["renamed:8"])
    compiled, _ = programs(xattn.config.compose(command), 256)
    shapes = jax.eval_shape(compiled.init, hyperparameters(xattn.config.compose(command)))
    with Checkpoints(the_run(cwd / "good") / "checkpoints") as checkpoints:
        restored = checkpoints.restore_state(shapes)
    assert restored is not None
    assert restored.step == 8
    expected = state_sha256(restored.tree.params, restored.tree.opt_state)
    assert summary(the_run(cwd / "bad"))["state_sha256"] == expected


def test_a_huge_finite_loss_is_logged_as_it_is(command: list[str], cwd: Path, reference: Reference) -> None:
    """And changes nothing where the gradient is sound."""
    training = train(*command, cwd=cwd, points=["nonfinite:loss:1e30:8"])
    assert training.wait() == 0, training.out + training.err
    (row,) = [row for row in rows(the_run(cwd)) if row["step"] == 8]
    assert row["train_loss"] == pytest.approx(1e30, rel=1e-6)
    assert summary(the_run(cwd))["state_sha256"] == reference.state_sha256


def test_skip_leaves_the_update_out_and_goes_on(command: list[str], cwd: Path, reference: Reference) -> None:
    """Its row has null; a run that is killed and resumed in between ends with the same bits."""
    skip = [*command, "trainer.nonfinite=skip"]
    bad = "nonfinite:loss:nan:7:8:15"
    for name, kills in (("untouched", []), ("killed", ["step:7", "step:14", "logged:16"])):
        (cwd / name).mkdir()
        for kill in kills:
            assert train(*skip, cwd=cwd / name, points=[bad, kill]).wait() == -signal.SIGKILL
        training = train(*skip, cwd=cwd / name, points=[bad])
        assert training.wait() == 0, training.out + training.err
    untouched = Reference.of(the_run(cwd / "untouched"))
    assert differences(the_run(cwd / "killed"), untouched) == []
    assert untouched.state_sha256 != reference.state_sha256
    (row,) = [row for row in untouched.rows if row["step"] == 8]
    assert row["train_loss"] is None


def test_skip_gives_up_after_ten_in_a_row(command: list[str], cwd: Path) -> None:
    updates = ":".join(str(update) for update in range(5, 20))
    training = train(*command, "trainer.nonfinite=skip", cwd=cwd, points=[f"nonfinite:loss:nan:{updates}"])
    assert training.wait() == 3, training.out + training.err
    assert "update 15 " in training.out
    assert summary(the_run(cwd))["status"] == "diverged"


def test_rollback_passes_the_bad_batch_and_comes_to_the_same_bits_however_it_was_treated(
    command: list[str], cwd: Path
) -> None:
    """Where it goes back to is an accident of what was saved when, and must not show in the result."""
    rollback = [*command, "trainer.nonfinite=rollback"]
    bad = "bad-batch:7:17"
    for name, kills in (("untouched", []), ("killed", ["renamed:4", "step:6", "logged:8", "step:20"])):
        (cwd / name).mkdir()
        for kill in kills:
            assert train(*rollback, cwd=cwd / name, points=[bad, kill]).wait() == -signal.SIGKILL
        training = train(*rollback, cwd=cwd / name, points=[bad])
        assert training.wait() == 0, training.out + training.err
    untouched = Reference.of(the_run(cwd / "untouched"))
    assert differences(the_run(cwd / "killed"), untouched) == []

    (folder := cwd / "preempted").mkdir()
    training = Training(*rollback, cwd=folder, points=[bad, "pace:100"])
    until(lambda: any(last_step(run) >= 2 for run in runs(folder)), training)
    training.send(signal.SIGTERM)
    assert training.wait() == 75
    training = train(*rollback, cwd=folder, points=[bad])
    assert training.wait() == 0, training.out + training.err
    assert differences(the_run(folder), untouched) == []


def test_rollback_before_the_first_checkpoint_goes_back_to_the_beginning(command: list[str], cwd: Path) -> None:
    """How often checkpoints are written decides nothing."""
    results = []
    for every in ("null", "1"):
        (folder := cwd / every).mkdir()
        rollback = [*command, "trainer.nonfinite=rollback", f"trainer.checkpoint_every={every}"]
        training = train(*rollback, cwd=folder, points=["bad-batch:1:3"])
        assert training.wait() == 0, training.out + training.err
        results.append(Reference.of(the_run(folder)))
    assert results[0].state_sha256 == results[1].state_sha256
    assert results[0].rows == results[1].rows
    assert [row["step"] for row in results[0].rows] == list(range(2, STEPS + 1, 2))


def test_rollback_gives_up_after_three_times(command: list[str], cwd: Path) -> None:
    """Also with a row logged, gone back behind, and logged again."""
    training = train(
        *command, "trainer.nonfinite=rollback", "trainer.log_every=1", cwd=cwd, points=["nonfinite:loss:nan:7"]
    )
    assert training.wait() == 3, training.out + training.err
    assert "3 of at most 3 times" in training.out
    assert summary(the_run(cwd))["status"] == "diverged"
    assert [row["step"] for row in rows(the_run(cwd))] == list(range(1, 7))


def test_an_evaluation_that_is_not_finite_is_null_and_never_the_best(
    command: list[str], cwd: Path, reference: Reference
) -> None:
    training = train(*command, cwd=cwd, points=["nonfinite-evaluation:2"])
    assert training.wait() == 0, training.out + training.err
    found = {row["step"]: row for row in rows(the_run(cwd))}
    assert found[12]["val_loss"] is None
    assert found[12]["val_bpb"] is None
    text = (the_run(cwd) / "metrics.jsonl").read_text("utf-8")
    assert "NaN" not in text
    assert summary(the_run(cwd))["best_val_loss"] == reference.summary["best_val_loss"]
    assert summary(the_run(cwd))["state_sha256"] == reference.state_sha256


def test_at_the_last_step_it_makes_the_run_diverged(command: list[str], cwd: Path) -> None:
    training = train(*command, cwd=cwd, points=["nonfinite-evaluation:4"])
    assert training.wait() == 3, training.out + training.err
    found = summary(the_run(cwd))
    assert (found["status"], found["val_loss"]) == ("diverged", None)
    assert steps(the_run(cwd))[-1] == STEPS
