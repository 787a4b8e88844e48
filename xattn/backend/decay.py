"""Sums of log decay, D_ts = Σ_{r=s+1..t} ℓ_r, and none of them a difference of two sums over the whole sequence.

ℓ ≤ 0 is the log of what is left of the past after a token. The difference of two sums from the sequence's head loses
what lies below 6e-8 of them: with ℓ near −20, all of a weight at S 400. Here sums of one sign are added, and where two
are subtracted they start at the head of the same tile. So every exponent is ≤ 0, and nothing overflows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

# ℓ is not less than this: e^−100 is 0 beside any weight, while a row's logits span less than 80.
LEAST = -100.0
LogDecay = Float32[Array, "B NKV S"]


def sums(log_decay: LogDecay, rows: Int[Array, " T"]) -> Float32[Array, "B NKV T S"]:
    """D_ts of the queries at the positions ``rows``; 0 for s ≥ t."""
    until = jnp.arange(log_decay.shape[-1])[None, :] <= rows[:, None]
    return exclusive_to_end(jnp.where(until[None, None], log_decay[..., None, :], 0))


def exclusive_to_end(x: Float32[Array, "*shape S"]) -> Float32[Array, "*shape S"]:
    """Σ_{r>s} x_r along the last axis."""
    return to_end(jnp.pad(x[..., 1:], [(0, 0)] * (x.ndim - 1) + [(0, 1)]))


def to_end(x: Float32[Array, "*shape S"]) -> Float32[Array, "*shape S"]:
    """Σ_{r≥s} x_r along the last axis."""
    return jax.lax.cumsum(x, axis=x.ndim - 1, reverse=True)


def gradient(rows: Float32[Array, "B NKV S"], columns: Float32[Array, "B NKV S"]) -> Float32[Array, "B NKV S"]:
    """The gradient of ℓ from that of D, dD_ts for s ≤ t, summed over each row's columns and each column's rows.

    dℓ_r = Σ_{s<r≤t} dD_ts = Σ_{t≥r} Σ_s dD_ts − Σ_{s≥r} Σ_t dD_ts.
    """
    return to_end(rows - columns)


class Stretches(NamedTuple):
    """D of all pairs of a tile of queries and a tile of keys, from two stretches of a sequence in N tiles of T each.

    Within a tile sums start at its head; from tile to tile they are sums of whole tiles.
    """

    rows: Float32[Array, "B NKV N T"]
    """Σ ℓ from the head of the query's tile to the query, itself included."""
    columns: Float32[Array, "B NKV N T"]
    """Σ ℓ after the key, to the end of its tile."""
    between: Float32[Array, "B NKV N N"]
    """Σ ℓ of all tokens after the key's tile and before the query's."""
    are_one: Array | bool
    """Whether both are the same stretch."""

    def tile(self, i: Array, j: Array) -> Float32[Array, "B NKV T T"]:
        """D of query tile i and key tile j; some number ≤ 0 for a key after its query."""
        rows, columns = self.rows[:, :, i], self.columns[:, :, j]
        is_diagonal = self.are_one & (i == j)
        t = jnp.where(is_diagonal, rows, rows + self.between[:, :, i, j, None])
        s = jnp.where(is_diagonal, -rows, columns)
        return jnp.minimum(t[..., None] + s[..., None, :], 0)


def stretches(
    queries: LogDecay, keys: LogDecay, tile: int, are_one: Array | bool, between: Float32[Array, "B NKV"] | None
) -> Stretches:
    """Of queries and keys with these ℓ; S is a multiple of the tile.

    between: Σ ℓ after the stretch of keys and before that of the queries; None is 0.
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
