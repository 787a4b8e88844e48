"""The loss of a token: −log softmax(logits)[target], in float32, without logits of a whole batch in float32.

Shapes: B batch, S sequence, D embedding, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from xattn.backend.mesh import context_devices
from xattn.model.projection import projection

# The most bytes of logits that are there at once. In a narrower dtype than float32 they may be many: the log-sum-exp
# reads them in float32 without writing them so, and one product with a large vocabulary is faster than several (on an
# H100, 124M parameters, V 50k: 473 against 461 thousand tokens a second).
MOST_LOGITS = {"float32": 2**26, "bfloat16": 2**31}


def next_token_losses(logits: jax.Array, targets: jax.Array | np.ndarray) -> jax.Array:
    """−log p(target), in nats and float32: (B, S, V), int (B, S) → (B, S)."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def projected_losses(
    x: jax.Array, embedding: jax.Array, targets: jax.Array, *, precision: str = "default"
) -> jax.Array:
    """:func:`next_token_losses` of the logits x · embeddingᵀ: (B, S, D), (V, D), int (B, S) → float32 (B, S).

    Where the logits would take more than ``MOST_LOGITS`` they are made for a part of the positions at a time, and made
    again for the gradient: a third more work in this product, and memory that does not grow with S.
    precision: as in :func:`~xattn.model.projection.projection`.
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
    positions = -(-length // parts)  # parts of equal size: what they are padded with is least
    positions += -positions % context_devices()

    def in_parts(array: jax.Array) -> jax.Array:
        """(B, S, …) → (parts, B, positions, …): every so many positions, so that each device has its share of each part
        of a sequence that is split over several."""
        padding = [(0, 0), (0, parts * positions - length)] + [(0, 0)] * (array.ndim - 2)
        padded = jnp.pad(array, padding).reshape(batch, positions, parts, *array.shape[2:])
        return jnp.moveaxis(padded, 2, 0)

    def part(_: None, arrays: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, losses(*arrays)

    _, found = jax.lax.scan(jax.checkpoint(part, prevent_cse=False), None, (in_parts(x), in_parts(targets)))
    return jnp.moveaxis(found, 0, 2).reshape(batch, -1)[:, :length]


def at(places: jax.Array | np.ndarray) -> tuple[jax.Array, jax.Array]:
    """What indexes an array (B, S, …) by int places (B, K): (B, K, …) comes of it."""
    return jnp.arange(len(places))[:, None], jnp.asarray(places)


def spread(values: jax.Array, places: jax.Array | np.ndarray, length: int) -> jax.Array:
    """The values (B, K) at their places in (B, length), and 0 elsewhere."""
    return jnp.zeros((len(values), length), values.dtype).at[at(places)].set(values)
