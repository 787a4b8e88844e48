"""Checkpoints of older versions: what they may and may not lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.errors import IntegrityError
from xattn.model.transformer import LayerHyperparameters
from xattn.training.checkpoint import Checkpoints
from xattn.training.optimizer import OptimizerHyperparameters
from xattn.training.programs import Hyperparameters, TrainState


class BeforeLogitScale(NamedTuple):
    """A layer's hyperparameters as of commit 968f896."""

    theta: Any
    sigmoid_bias: Any


OLD = BeforeLogitScale(jnp.float32(3.0), jnp.float32(-2.0))
NEW = LayerHyperparameters(jnp.float32(9.0), jnp.float32(-9.0), jnp.float32(0.75))


def state_of(model: Any, **more: Any) -> TrainState:
    numbers = OptimizerHyperparameters(jnp.float32(0.1), jnp.float32(0.2), jnp.float32(0.3))
    params = {"weight": jnp.arange(5.0)}
    opt_state = ({"count": jnp.int32(4)}, (jnp.ones(3), more))
    halted = jnp.int32(-1)
    return TrainState(jnp.int32(4), params, opt_state, Hyperparameters(model, numbers, jnp.uint32(7)), halted, halted)


def saved_and_restored(folder: Path, saved: TrainState, asked: TrainState) -> Any:
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(4, saved, {"seen": 1}, val_loss=None)
        checkpoints.wait()
        return checkpoints.restore_state(asked)


@pytest.mark.parametrize("kinds", [False, True], ids=["one kind", "two kinds"])
def test_a_number_that_an_older_checkpoint_lacks_is_the_runs_own(kinds: bool, tmp_path: Path) -> None:
    """The checkpoint's own numbers stay as saved."""
    old: Any = {"backend": OLD, "then": OLD} if kinds else OLD
    new: Any = {"backend": NEW, "then": NEW._replace(logit_scale=jnp.float32(5.0))} if kinds else NEW
    found = saved_and_restored(tmp_path, state_of(old), state_of(new)).tree
    both = OLD.theta, OLD.sigmoid_bias
    expected: Any = LayerHyperparameters(*both, NEW.logit_scale)
    if kinds:
        expected = {"backend": expected, "then": expected._replace(logit_scale=jnp.float32(5.0))}
    assert jax.tree.structure(found) == jax.tree.structure(state_of(expected))
    jax.tree.map(np.testing.assert_array_equal, found, state_of(expected))


def test_nothing_else_may_be_missing_and_nothing_too_many(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="none of the checkpoints"):
        saved_and_restored(tmp_path / "state", state_of(NEW), state_of(NEW, more=jnp.ones(2)))
    with pytest.raises(IntegrityError, match="none of the checkpoints"):
        saved_and_restored(tmp_path / "number", state_of(NEW), state_of(OLD))
