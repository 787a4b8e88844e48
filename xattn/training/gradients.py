"""The gradient of a batch, in one pass or in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xattn.data.batches import Batch

SummedLoss = Callable[[Any, Batch, jax.Array], jax.Array]
"""(parameters, batch, key of the dropout) → Σ weights · loss, a float32 scalar."""


def loss_and_gradient(
    summed_loss: SummedLoss, params: Any, batch: Batch, key: jax.Array, *, parts: int
) -> tuple[jax.Array, Any]:
    """Return the loss Σ weights · loss / Σ weights, and its gradient with respect to the parameters.

    Each part takes every parts-th row of the batch, so it lies on all devices like the whole batch. The sums over parts
    are in float32. The result differs only by rounding and by dropout, because each part has its own dropout key. Only
    one part's activations exist at a time.

    The division comes last. Over several devices, Σ weights is a sum that all of them wait for. If it were needed
    before the gradient, it would block a device, and its thread on a CPU, until the others reach it.
    """
    if parts == 1:
        total, sums = jnp.sum(batch.weights), jax.value_and_grad(summed_loss)(params, batch, key)
        return jax.tree.map(lambda leaf: leaf / total, sums)

    def add(sums: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        number, rows = part
        found = jax.value_and_grad(summed_loss)(params, rows, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, sums, (jnp.sum(rows.weights), found)), None

    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1), batch)
    nothing = (jnp.float32(0), (jnp.float32(0), jax.tree.map(jnp.zeros_like, params)))
    (total, sums), _ = jax.lax.scan(add, nothing, (jnp.arange(parts), rows))
    return jax.tree.map(lambda leaf: leaf / total, sums)
