"""The loss of a token, −log softmax(logits)[target], in float32 but without float32 logits for a whole batch.

Shapes: B batch, S sequence, D embedding, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from xattn.backend.mesh import context_devices
from xattn.model.functions import projection

# Most bytes of logits in memory at a time. A dtype narrower than float32 may take many: the log-sum-exp converts them
# to float32 on the fly, and one product with a large vocabulary is faster than several (on an H100 with 124M
# parameters and V = 50k: 473 versus 461 thousand tokens per second).
MOST_LOGITS = {"float32": 2**26, "bfloat16": 2**31}


def next_token_losses(logits: jax.Array, targets: jax.Array | np.ndarray) -> jax.Array:
    """Return −log p(target) in nats, float32: (B, S, V), int (B, S) → (B, S)."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def projected_losses(
    x: jax.Array, embedding: jax.Array, targets: jax.Array, *, precision: str = "default"
) -> jax.Array:
    """Compute :func:`next_token_losses` of logits x · embeddingᵀ: (B, S, D), (V, D), int (B, S) → float32 (B, S).

    If the logits would exceed ``MOST_LOGITS``, they are computed for some positions at a time, and recomputed for the
    gradient. That costs a third more work in this product, and memory no longer grows with S. ``precision`` is as in
    :func:`~xattn.model.functions.projection`.
    """
    batch, length, _ = x.shape
    vocab_size = embedding.shape[0]
    kernel = embedding.astype(x.dtype).T

    def losses(x: jax.Array, targets: jax.Array) -> jax.Array:
        return next_token_losses(projection(x, kernel, precision=precision), targets)

    positions = max(MOST_LOGITS[x.dtype.name] // (batch * vocab_size * x.dtype.itemsize), 1)
    if positions >= length:
        return losses(x, targets)
    parts = -(-length // positions)
    positions = -(-length // parts)  # parts of equal size need the least padding
    positions += -positions % context_devices()

    def in_parts(array: jax.Array) -> jax.Array:
        """Divide (B, S, …) → (parts, B, positions, …). Each part takes every parts-th position, so that every device
        has its share of each part if the sequence is split over devices."""
        padding = [(0, 0), (0, parts * positions - length)] + [(0, 0)] * (array.ndim - 2)
        padded = jnp.pad(array, padding).reshape(batch, positions, parts, *array.shape[2:])
        return jnp.moveaxis(padded, 2, 0)

    def part(_: None, arrays: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, losses(*arrays)

    _, found = jax.lax.scan(jax.checkpoint(part, prevent_cse=False), None, (in_parts(x), in_parts(targets)))
    return jnp.moveaxis(found, 0, 2).reshape(batch, -1)[:, :length]


def at(places: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Return an index that picks the int places (B, K) from an array: (B, S, …) → (B, K, …)."""
    return jnp.arange(len(places))[:, None], jnp.asarray(places)


def spread(values: jax.Array, places: jax.Array | np.ndarray, length: int) -> jax.Array:
    """Put the values (B, K) at their places in an array (B, length) that is 0 elsewhere."""
    return jnp.zeros((len(values), length), values.dtype).at[at(places)].set(values)
