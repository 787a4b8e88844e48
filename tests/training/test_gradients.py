"""Gradient accumulation equals the gradient of the whole batch, and a step that does not fit in memory is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.config import compose
from xattn.data.batches import Batch
from xattn.errors import BadInput
from xattn.training import memory
from xattn.training.gradients import loss_and_gradient
from xattn.training.memory import available_bytes, refuse_what_does_not_fit
from xattn.training.programs import hyperparameters, programs

TINY = [
    *("backend.context_length=8", "model.num_layers=1", "model.num_heads=2", "model.embedding_dim=8"),
    *("model.mlp_dim=8", "trainer.batch_size=6", "optimizer=sgd", "optimizer.momentum=0"),
]
_random = np.random.default_rng(0)
# The weights differ between the parts, so that a mean of the parts' means would be wrong.
BATCH = Batch(_random.integers(0, 7, (6, 9), dtype=np.int32), (_random.random((6, 8)) ** 3).astype(np.float32))


def test_in_parts_it_is_the_gradient_at_once() -> None:
    params = {"table": jnp.asarray(_random.standard_normal((7, 7)), jnp.float32)}

    def summed_loss(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        logits = params["table"][batch.tokens[:, :-1]]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(chosen * batch.weights)

    key = jax.random.key(0)
    loss, gradient = loss_and_gradient(summed_loss, params, BATCH, key, parts=1)
    for parts in (2, 3, 6):
        again, in_parts = loss_and_gradient(summed_loss, params, BATCH, key, parts=parts)
        np.testing.assert_allclose(again, loss, rtol=1e-6)
        np.testing.assert_allclose(in_parts["table"], gradient["table"], rtol=1e-5, atol=1e-7)


def test_a_run_in_parts_makes_the_updates_of_one_at_once() -> None:
    losses = []
    for parts in (1, 3):
        config = compose([*TINY, f"trainer.gradient_accumulation={parts}"])
        compiled, _ = programs(config, 7)
        state = compiled.init(hyperparameters(config))
        for _ in range(3):
            state, metrics = compiled.step(state, BATCH)
        losses.append((float(metrics.train_loss), float(metrics.grad_norm), float(metrics.param_norm)))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_the_knobs_save_memory() -> None:
    shape = ["backend.context_length=128", "model.num_layers=3", "trainer.batch_size=8", "model.layers=scanned"]

    def bytes_of(*overrides: str) -> int:
        return programs(compose([*TINY, *shape, *overrides]), 7)[0].peak_memory_bytes

    plain = bytes_of()
    assert bytes_of("model.remat=full") < 0.7 * plain
    assert bytes_of("trainer.gradient_accumulation=4") < 0.5 * plain


def test_parts_divide_the_batch() -> None:
    with pytest.raises(BadInput, match="batch_size 6 is not a multiple of gradient_accumulation 4"):
        compose([*TINY, "trainer.gradient_accumulation=4"])


def test_a_step_that_does_not_fit_is_refused_with_both_numbers_and_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e6 < available_bytes() < 1e15
    monkeypatch.setattr(memory, "available_bytes", lambda: 2_000_000_000)
    config = compose(TINY)
    refuse_what_does_not_fit(2_000_000_000, config)
    with pytest.raises(BadInput) as refusal:
        refuse_what_does_not_fit(3_500_000_000, config)
    message = str(refusal.value)
    assert "3.50 GB" in message
    assert "2.00 GB" in message
    assert "trainer.gradient_accumulation=2 " in message
    assert "model.remat=full" in message
    exhausted = compose([*TINY, "trainer.gradient_accumulation=6", "model.remat=full"])
    with pytest.raises(BadInput) as refusal:
        refuse_what_does_not_fit(3_500_000_000, exhausted)
    assert "gradient_accumulation=" not in str(refusal.value)
    assert "remat" not in str(refusal.value)
    dropping = compose([*TINY, "model.dropout=0.1"])
    assert "gradient_accumulation=2 (same result except for dropout's draws)" in memory.what_helps(dropping, "cpu")


def test_of_a_containers_memory_only_what_it_has_not_used_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def available(limit: str, used: int) -> int:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text("anon 50000\ninactive_file 20000\nactive_file 7\n")
        return memory._machine_bytes()

    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    assert memory._machine_bytes() > 1e6  # there are no such files yet
    assert available("100000", 70_000) == 50_000  # the page cache counts as available
    assert available("100000", 130_000) == 0
    assert available("max", 70_000) > 1e6
