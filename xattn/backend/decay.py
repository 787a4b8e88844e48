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
    after = jnp.where(jnp.arange(log_decay.shape[-1]) <= rows[:, None], log_decay[..., None, :], 0)
    return exclusive_to_end(after)


def exclusive_to_end(x: Float32[Array, "*shape S"]) -> Float32[Array, "*shape S"]:
    """Σ_{r>s} x_r along the last axis."""
    return to_end(jnp.pad(x[..., 1:], [(0, 0)] * (x.ndim - 1) + [(0, 1)]))


def to_end(x: Float32[Array, "*shape S"]) -> Float32[Array, "*shape S"]:
    """Σ_{r≥s} x_r along the last axis."""
    return jax.lax.cumsum(x, axis=x.ndim - 1, reverse=True)


def of_rows_and_columns(
    rows: Float32[Array, "B NKV S"], columns: Float32[Array, "B NKV S"]
) -> Float32[Array, "B NKV S"]:
    """The gradient of ℓ from that of D, dD_ts for s ≤ t, summed over each row's columns and each column's rows.

    dℓ_r = Σ_{s<r≤t} dD_ts = Σ_{t≥r} Σ_s dD_ts − Σ_{s≥r} Σ_t dD_ts.
    """
    return to_end(rows - columns)


class Tiles(NamedTuple):
    """A sequence's ℓ cut into N tiles of T tokens; a sum never crosses a tile's head but by adding whole tiles."""

    from_head: Float32[Array, "B NKV N T"]
    """Σ over the tile's tokens up to this one, itself included."""
    to_tail: Float32[Array, "B NKV N T"]
    """Σ over the tile's tokens after this one."""
    whole: Float32[Array, "B NKV N"]
    """Σ over the tile."""


def tiles(log_decay: LogDecay, tile: int) -> Tiles:
    """S is a multiple of the tile."""
    cut = log_decay.reshape(*log_decay.shape[:2], -1, tile)
    return Tiles(jax.lax.cumsum(cut, axis=3), exclusive_to_end(cut), jnp.sum(cut, axis=-1))
