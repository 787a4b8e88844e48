"""The loop: which rows it writes, which update their numbers belong to, what it saves, and where it stops."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.config import compose
from xattn.data.batches import Batching, HeldOutBatches, TrainingBatches
from xattn.data.run_data import RunData
from xattn.data.tokenizer import ByteTokenizer
from xattn.errors import StorageError
from xattn.evaluation.loss import held_out_loss
from xattn.evaluation.probes import Scene, make_probes
from xattn.training import checkpoint
from xattn.training.checkpoint import Checkpoints
from xattn.training.loop import Member, Progress, train
from xattn.training.programs import Programs, TrainState, hyperparameters, programs
from xattn.training.state_hash import state_sha256

CONFIG = compose(
    [
        "backend.context_length=8",
        "model.num_layers=1",
        "model.num_heads=2",
        "model.embedding_dim=8",
        "model.mlp_dim=8",
        "trainer.batch_size=4",
        "trainer.steps=11",
        "trainer.log_every=3",
        "trainer.eval_every=4",
    ]
)
TEXT = np.frombuffer(b"to be or not to be, that is the question: " * 40, np.uint8)
BATCHING = Batching(context_length=8, batch_size=4, sequences="all", seed=0)
BATCHES = TrainingBatches([(TEXT, 1.0)], BATCHING)
HELD_OUT = HeldOutBatches([(TEXT[:300], 1.0)], BATCHING)


class Rows(list[Mapping[str, Any]]):
    """A tracker that keeps its rows."""

    def log(self, row: Mapping[str, Any]) -> None:
        self.append(dict(row))


@pytest.fixture(scope="module")
def compiled() -> Programs:
    return programs(CONFIG, 256)[0]


def fresh(compiled: Programs) -> Progress:
    return Progress(compiled.init(hyperparameters(CONFIG)))


def run(
    compiled: Programs,
    progress: Progress,
    folder: Path,
    stop: Callable[[], bool] = lambda: False,
    probes: Any = (),
    **trainer: Any,
) -> Rows:
    rows = Rows()
    config = CONFIG.trainer.model_copy(update=trainer)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        member = Member(progress, BATCHES, checkpoints, [rows], probes=probes)
        train(compiled, [member], HELD_OUT, config, bytes_per_token=1.0, stop=stop)
        assert not member.active
    return rows


def test_rows_are_written_at_their_steps_with_the_figures_of_that_update(compiled: Programs, tmp_path: Path) -> None:
    """Compared with stepping by hand: a training row has its update's own loss, an evaluation row that after it."""
    progress = fresh(compiled)
    rows = run(compiled, progress, tmp_path)
    assert [row["step"] for row in rows] == [3, 4, 6, 8, 9, 11]
    assert [step for step in range(1, 12) if CONFIG.trainer.leaves_row(step)] == [3, 4, 6, 8, 9, 11]
    training = {"train_loss", "grad_norm", "param_norm", "learning_rate", "tokens_per_second"}
    evaluation = {"val_loss", "val_bpb"}
    for row in rows:
        logs, evaluates = row["step"] in (3, 6, 9, 11), row["step"] in (4, 8, 11)
        assert set(row) == {"step", "tokens"} | (training if logs else set()) | (evaluation if evaluates else set())
        assert row["tokens"] == row["step"] * CONFIG.trainer.batch_size * CONFIG.backend.context_length

    state, by_step = fresh(compiled).state, {row["step"]: row for row in rows}
    evaluations = []
    for step in range(1, 12):
        state, metrics = compiled.step(state, BATCHES(step - 1))
        if step in (3, 6, 9, 11):
            for key in training - {"tokens_per_second"}:
                assert by_step[step][key] == getattr(metrics, key).item(), (step, key)
        if step in (4, 8, 11):
            hyper = state.hyperparameters.model
            expected = held_out_loss(compiled.score, state.params, hyper, HELD_OUT, bytes_per_token=1.0)
            assert {key: by_step[step][key] for key in evaluation} == expected.row()
            assert expected.val_bpb == pytest.approx(expected.val_loss / np.log(2))
            evaluations.append(expected.val_loss)
    assert state_sha256(progress.state.params, progress.state.opt_state) == state_sha256(state.params, state.opt_state)
    assert (progress.step, progress.halted_at) == (11, None)
    assert progress.train_loss == by_step[11]["train_loss"]
    assert progress.val_loss == evaluations[-1]
    assert progress.best_val_loss == min(evaluations)


def test_an_update_that_is_not_finite_between_two_rows_is_named(compiled: Programs, tmp_path: Path) -> None:
    calls = []

    def step(state: TrainState, tokens: Any) -> Any:
        calls.append(0)
        hyper = state.hyperparameters
        theta = jnp.float32(float("nan") if len(calls) == 7 else 1e4)
        return compiled.step(
            state._replace(hyperparameters=hyper._replace(model=hyper.model._replace(theta=theta))), tokens
        )

    progress = fresh(compiled)
    rows = run(compiled._replace(step=step), progress, tmp_path)
    assert [row["step"] for row in rows] == [3, 4, 6]
    assert (progress.halted_at, progress.step) == (7, 6)
    assert len(calls) == 8  # the loop looks only at the next row
    state = fresh(compiled).state
    for number in range(6):
        state, _ = compiled.step(state, BATCHES(number))
    assert state_sha256(progress.state.params, progress.state.opt_state) == state_sha256(state.params, state.opt_state)


def test_attention_is_studied_on_its_steps_and_changes_no_bit(compiled: Programs, tmp_path: Path) -> None:
    plain, watched = fresh(compiled), fresh(compiled)
    expected = run(compiled, plain, tmp_path / "plain")
    rows = run(compiled, watched, tmp_path / "watched", attention_stats_every=5)
    assert [row["step"] for row in rows] == [3, 4, 5, 6, 8, 9, 10, 11]
    names = {f"attention/0/{head}/{name}" for head in range(2) for name in ("entropy", "max_logit", "output_norm")}
    assert [row["step"] for row in rows if names <= row.keys()] == [5, 10, 11]
    assert set(rows[2]) == {"step", "tokens", *watched.measured}

    def losses(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
        clock = ("attention", "tokens_per_second")
        kept = [{key: value for key, value in row.items() if not key.startswith(clock)} for row in rows]
        return [row for row in kept if row.keys() > {"step", "tokens"}]

    assert losses(rows) == losses(expected)
    assert watched.measured == {key: value for key, value in rows[-1].items() if key.startswith("attention/")}
    assert watched.saved()["measured"] == watched.measured
    assert plain.measured == {}
    assert state_sha256(watched.state.params, watched.state.opt_state) == state_sha256(
        plain.state.params, plain.state.opt_state
    )


def test_a_run_of_one_step_logs_evaluates_and_saves(compiled: Programs, tmp_path: Path) -> None:
    rows = run(compiled, fresh(compiled), tmp_path, steps=1)
    assert [row["step"] for row in rows] == [1]
    assert {"train_loss", "val_loss"} < set(rows[0])
    assert Checkpoints(tmp_path / "checkpoints").steps() == [1]


def test_before_a_checkpoint_has_its_name_somebody_may_do_something(compiled: Programs, tmp_path: Path) -> None:
    """If ``before_commit`` fails, there is no checkpoint."""
    state, seen = fresh(compiled).state, []

    def look() -> None:
        seen.append(checkpoints.steps())
        if len(seen) == 2:
            raise OSError(errno.EIO, "Input/output error")

    checkpoints = Checkpoints(tmp_path, before_commit=look)
    checkpoints.save(1, state, {}, val_loss=None)
    checkpoints.wait()
    checkpoints.save(2, state, {}, val_loss=None)
    with pytest.raises(StorageError):
        checkpoints.wait()
    assert seen == [[], [1]]
    assert checkpoints.steps() == [1]


def test_a_run_that_is_stopped_saves_and_goes_on_to_the_same_bits(compiled: Programs, tmp_path: Path) -> None:
    whole = fresh(compiled)
    expected = run(compiled, whole, tmp_path / "whole")

    asked = iter([False] * 4 + [True])
    first = fresh(compiled)
    rows = run(compiled, first, tmp_path / "parts", stop=lambda: next(asked))
    assert first.step == 5
    with Checkpoints(tmp_path / "parts" / "checkpoints") as checkpoints:
        restored = checkpoints.restore_state(first.state)
    assert restored is not None
    assert restored.step == 5
    second = fresh(compiled)
    second.restore(restored.step, restored.tree, restored.progress)
    rows += run(compiled, second, tmp_path / "parts")

    def without_clock(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]

    assert without_clock(rows) == without_clock(expected)
    assert state_sha256(second.state.params, second.state.opt_state) == state_sha256(
        whole.state.params, whole.state.opt_state
    )
    assert second.best_val_loss == whole.best_val_loss


def test_probes_are_in_the_rows_and_change_no_bit(compiled: Programs, tmp_path: Path) -> None:
    """Every evaluation row has them, and the last values are kept. State and losses equal those of a run without."""
    plain, probed = fresh(compiled), fresh(compiled)
    rows = run(compiled, plain, tmp_path / "plain")
    data = RunData(BATCHES, HELD_OUT, ByteTokenizer(), "", "")
    names = ("in_context", "induction")
    probes = make_probes(names, Scene(CONFIG.data, data, CONFIG.backend, 4))
    probed_rows = run(compiled, probed, tmp_path / "probed", probes=probes)
    added = [{key: value for key, value in row.items() if key.startswith("probe/")} for row in probed_rows]
    for row, probed_row, more in zip(rows, probed_rows, added, strict=True):
        assert {"probe/in_context/score", "probe/induction/accuracy"} <= set(more) or "val_loss" not in row
        same = {key: value for key, value in probed_row.items() if key not in more}
        assert same | {"tokens_per_second": 0} == dict(row) | {"tokens_per_second": 0}
    assert added[-1] == probed.measured
    assert added[1] != added[-1]
    assert state_sha256(plain.state.params, plain.state.opt_state) == state_sha256(
        probed.state.params, probed.state.opt_state
    )


def test_a_run_restored_from_its_last_step_has_ended(compiled: Programs, tmp_path: Path) -> None:
    """A run killed between its last save and its summary has nothing left to train."""
    done = fresh(compiled)
    run(compiled, done, tmp_path, steps=3)
    assert run(compiled, done, tmp_path, steps=3) == []
    assert done.step == 3


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept_to_the_bit(compiled: Programs, tmp_path: Path) -> None:
    state = fresh(compiled).state
    kept: dict[int, TrainState] = {}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, val_loss in enumerate([2.0, 1.0, 3.0, None, None, None], start=1):
            state, _ = compiled.step(state, BATCHES(step))
            kept[step] = jax.device_get(state)
            checkpoints.save(step, state, {"note": step}, val_loss=val_loss)
        checkpoints.wait()
        assert {2, 6} <= set(checkpoints.steps()) <= {2, 5, 6}
        last = checkpoints.restore_state(state)
        best = checkpoints.restore_params("best", state.params)
        newest = checkpoints.restore_params("last", state.params)
    assert last is not None
    assert (last.step, best.step, newest.step) == (6, 2, 6)
    assert last.progress == {"note": 6}
    for restored, saved in ((last.tree, kept[6]), (best.tree, kept[2].params), (newest.tree, kept[6].params)):
        assert jax.tree.structure(restored) == jax.tree.structure(saved)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
            assert a.dtype == b.dtype
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_every_file_and_folder_of_a_checkpoint_is_synced_before_it_has_its_name(
    compiled: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(checkpoint, "fsync", synced.append)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, fresh(compiled).state, {}, val_loss=None)
    there = {path.relative_to(tmp_path / "checkpoints" / "7") for path in (tmp_path / "checkpoints" / "7").rglob("*")}
    assert {Path("params"), Path("training"), Path("manifest.json")} < there
    *before, last = synced
    assert {path.relative_to(tmp_path / "checkpoints" / ".tmp-7") for path in before} == there | {Path()}
    assert last == tmp_path / "checkpoints"


def test_the_fingerprint_of_a_state() -> None:
    """It is checked by hand for a tree of two leaves. A change of any bit, dtype, shape or name changes it."""
    import hashlib

    leaf = np.arange(3, dtype=np.float32)
    digest = hashlib.sha256()
    digest.update(b"['opt_state'][0]|int32|()|" + np.int32(7).tobytes())
    digest.update(b"['params']['a']|float32|(3,)|" + leaf.tobytes())
    base = state_sha256({"a": jnp.asarray(leaf)}, (jnp.int32(7),))
    assert base == digest.hexdigest()
    flipped = leaf.copy()
    flipped.view(np.uint32)[1] ^= 1
    others = [{"a": flipped}, {"b": leaf}, {"a": leaf.view(np.int32)}, {"a": leaf[None]}]
    assert len({base, *(state_sha256(other, (jnp.int32(7),)) for other in others)}) == 5
    assert state_sha256({"a": np.asfortranarray(np.ones((2, 3)) * [[1], [2]])}, ()) == state_sha256(
        {"a": np.ones((2, 3)) * [[1], [2]]}, ()
    )
