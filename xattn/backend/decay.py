"""Sums of log decay, D_ts = Σ_{r=s+1..t} ℓ_r, without differences of two sums over the whole sequence.

ℓ ≤ 0 is the log of what is left of the past after a token. The difference of two sums from the head of the sequence
loses everything below 6e-8 of them: with ℓ near −20, that is the entire weight at S = 400. This module adds sums of the
same sign. Where it subtracts, both sums start at the head of the same tile. Every exponent is ≤ 0 and can't overflow.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

# Lower bound of ℓ: e^−100 vanishes beside any other weight, as long as the logits of a row span less than 80.
LEAST = -100.0
LogDecay = Float32[Array, "B NKV S"]


def sums(log_decay: LogDecay, rows: Int[Array, " T"]) -> Float32[Array, "B NKV T S"]:
    """Return D_ts for the queries at positions ``rows``; it is 0 for s ≥ t."""
    until = jnp.arange(log_decay.shape[-1])[None, :] <= rows[:, None]
    return exclusive_to_end(jnp.where(until[None, None], log_decay[..., None, :], 0))


def exclusive_to_end(x: Float32[Array, "*shape S"]) -> Float32[Array, "*shape S"]:
    """Return Σ_{r>s} x_r along the last axis."""
    return to_end(jnp.pad(x[..., 1:], [(0, 0)] * (x.ndim - 1) + [(0, 1)]))


def to_end(x: Float32[Array, "*shape S"]) -> Float32[Array, "*shape S"]:
    """Return Σ_{r≥s} x_r along the last axis."""
    return jax.lax.cumsum(x, axis=x.ndim - 1, reverse=True)


def gradient(rows: Float32[Array, "B NKV S"], columns: Float32[Array, "B NKV S"]) -> Float32[Array, "B NKV S"]:
    """Return the gradient of ℓ from dD_ts, s ≤ t, where ``rows`` is Σ_s dD_ts and ``columns`` is Σ_t dD_ts.

    dℓ_r = Σ_{s<r≤t} dD_ts = Σ_{t≥r} Σ_s dD_ts − Σ_{s≥r} Σ_t dD_ts.
    """
    return to_end(rows - columns)


class Stretches(NamedTuple):
    """D between a stretch of queries and a stretch of keys, each of N tiles of T tokens.

    Within a tile, D is the difference of two sums from its head. Between two tiles it adds up the three sums below.
    """

    rows: Float32[Array, "B NKV N T"]
    """Σ ℓ from the head of the query's tile up to and including the query."""
    columns: Float32[Array, "B NKV N T"]
    """Σ ℓ after the key, to the end of its tile."""
    between: Float32[Array, "B NKV N N"]
    """Σ ℓ over all tokens after the key's tile and before the query's tile."""
    are_one: Array | bool
    """Whether the two stretches are the same one."""

    def tile(self, i: Array, j: Array) -> Float32[Array, "B NKV T T"]:
        """Return D for query tile i and key tile j. For a key after its query it is an arbitrary number ≤ 0."""
        rows, columns = self.rows[:, :, i], self.columns[:, :, j]
        is_diagonal = self.are_one & (i == j)
        t = jnp.where(is_diagonal, rows, rows + self.between[:, :, i, j, None])
        s = jnp.where(is_diagonal, -rows, columns)
        return jnp.minimum(t[..., None] + s[..., None, :], 0)


def stretches(
    queries: LogDecay, keys: LogDecay, tile: int, are_one: Array | bool, between: Float32[Array, "B NKV"] | None
) -> Stretches:
    """Compute the stretches of queries and keys with these ℓ; S must be a multiple of ``tile``.

    ``between`` is Σ ℓ after the stretch of keys and before that of the queries; None means 0.
    """
    rows, columns = (x.reshape(*x.shape[:2], -1, tile) for x in (queries, keys))
    of_rows, of_columns = jnp.sum(rows, axis=-1), jnp.sum(columns, axis=-1)
    if are_one is True:
        across = sums(of_rows, jnp.arange(rows.shape[2]) - 1)
    else:
        before = jax.lax.cumsum(jnp.pad(of_rows[..., :-1], ((0, 0), (0, 0), (1, 0))), axis=2)
        across = before[..., :, None] + exclusive_to_end(of_columns)[..., None, :]
        across = across if between is None else across + between[..., None, None]
        across = jnp.where(are_one, sums(of_rows, jnp.arange(rows.shape[2]) - 1), across)
    return Stretches(jax.lax.cumsum(rows, axis=3), exclusive_to_end(columns), across, are_one)
