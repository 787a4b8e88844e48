"""The formula of attention, stated once: from queries and keys to logits, from logits to weights, and who may attend.

Each function is evaluated over given rows (queries) and columns (keys): over all of them by the reference, a tile by
``blockwise``, a stretch by ``ring``, one row against a cache's slots by decoding, some rows by the attention study.

Shape letters: B batch, NH heads, NKV key/value heads, G = NH / NKV query heads a key/value head, T rows, S columns,
DHQK query/key head width, DHV value head width. H is NKV, G where query heads are grouped, or NH where keys and values
are repeated for each. Logits and weights are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xattn.backend.spec import AttentionSpec, product

F32 = jnp.float32
# Not −inf: a row of −inf alone has no softmax, and its gradient is NaN even where a later select drops the row.
LOWEST = float(jnp.finfo(jnp.float32).min)


class Tokens(NamedTuple):
    """The rows or the columns that are asked about."""

    positions: jax.Array
    """(T,) integers."""
    segments: jax.Array | None = None
    """(B, T) integers; None where the sequence is one document."""
    exist: jax.Array | None = None
    """(T,) bool; False where there is only padding, or an empty slot. None is True for all."""


def may_attend(rows: Tokens, columns: Tokens, spec: AttentionSpec, mask: jax.Array | None) -> jax.Array:
    """(the given mask, or causal) ∧ window ∧ equal segments: bool (1 or B, T, S), True = attend.

    mask: the part of a given mask for these rows and columns, (T, S); None is causal.
    """
    t, s = rows.positions[:, None], columns.positions[None, :]
    keep = s <= t if mask is None else mask
    if columns.exist is not None:
        keep = keep & columns.exist[None, :]
    if spec.window is not None:
        keep = keep & (s <= t) & (t - spec.window < s)
    keep = keep[None]
    if rows.segments is not None and columns.segments is not None:
        keep = keep & (rows.segments[:, :, None] == columns.segments[:, None, :])
    return keep


def grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """(B, NH, S, ·) as (B, NKV, G, S, ·): query head h reads key/value head ⌊h · NKV / NH⌋."""
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """A = q kᵀ / √DHQK of rotated q (B, H, T, DHQK) and k (B, NKV or NH, S, DHQK): (B, H, T, S)."""
    return product("bk...td,bksd->bk...ts", q, k) / math.sqrt(q.shape[-1])


def logits(scores: jax.Array, spec: AttentionSpec) -> jax.Array:
    """The scores and their additive terms, (B, H, T, S): what the activation is a function of."""
    return scores if spec.bias is None else scores + spec.bias.reshape(1, *scores.shape[1:-2], 1, 1)


def weights(logits: jax.Array, keep: jax.Array, spec: AttentionSpec) -> jax.Array:
    """The weights of whole rows, and 0 where keep (1 or B, T, S) is False. A row that may attend to nothing is 0."""
    keep = _of_heads(keep, logits)
    activation = spec.activation
    if not activation.is_normalised:
        return jnp.where(keep, activation(logits, spec.n), 0)
    logits = jnp.where(keep, logits, LOWEST)
    if activation.extra_logit is None:
        return jnp.where(keep, jax.nn.softmax(logits, axis=-1), 0)
    extra = jnp.full((*logits.shape[:-1], 1), activation.extra_logit, F32)
    return jnp.where(keep, jax.nn.softmax(jnp.concatenate([logits, extra], axis=-1), axis=-1)[..., :-1], 0)


def _of_heads(keep: jax.Array, logits: jax.Array) -> jax.Array:
    """With the logits' axes: (1 or B, 1, T, S) or (1 or B, 1, 1, T, S)."""
    return jnp.broadcast_to(keep[:, None] if logits.ndim == 4 else keep[:, None, None], logits.shape)


# ---- by parts: a row's columns one after the other

Results = tuple[jax.Array, jax.Array | None]
"""The output over some columns, (B, NKV, G, T, DHV); of a normalised activation also the log of each row's sum of
e^logit, (B, NKV, G, T, 1) in float32, LOWEST where the row may attend to none of them."""


class Sums(NamedTuple):
    """What rows have come to over the columns so far, float32. The last two count under a normalised activation."""

    weighted: jax.Array
    """Σ_s W_ts v_s, (B, NKV, G, T, DHV); normalised: Σ_s e^(A_ts − top) v_s."""
    top: jax.Array
    """The greatest logit, (B, NKV, G, T, 1)."""
    total: jax.Array
    """Σ_s e^(A_ts − top), (B, NKV, G, T, 1)."""


def no_sums(rows: tuple[int, ...], width: int) -> Sums:
    """Over no column: rows is (B, NKV, G, T), width DHV."""
    zeros = jnp.zeros((*rows, 1), F32)
    return Sums(jnp.zeros((*rows, width), F32), zeros + LOWEST, zeros)


def add_columns(sums: Sums, logits: jax.Array, keep: jax.Array, v: jax.Array, spec: AttentionSpec) -> Sums:
    """The sums over more columns, with values v (B, NKV, S, DHV): the online softmax of arXiv 1805.02867."""
    keep = _of_heads(keep, logits)
    weighted, top, total = sums
    if spec.activation.is_normalised:
        top = jnp.maximum(sums.top, jnp.max(jnp.where(keep, logits, LOWEST), axis=-1, keepdims=True))
        shrink = jnp.exp(sums.top - top)
        weights = jnp.where(keep, jnp.exp(logits - top), 0)
        weighted, total = weighted * shrink, total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
    else:
        weights = jnp.where(keep, spec.activation(logits, spec.n), 0)
    return Sums(weighted + product("bkgts,bksd->bkgtd", weights.astype(v.dtype), v), top, total)


def finished(sums: Sums, spec: AttentionSpec) -> Results:
    """The results over the columns that were added, the output in float32."""
    if not spec.activation.is_normalised:
        return sums.weighted, None
    total = jnp.where(empty := sums.total == 0, 1, sums.total)
    return sums.weighted / total, jnp.where(empty, LOWEST, sums.top + jnp.log(total))


def joined(a: Results, b: Results) -> Results:
    """The results over the columns of both."""
    if a[1] is None or b[1] is None:
        return a[0] + b[0], None
    lse = jnp.logaddexp(a[1], b[1])
    return a[0] * jnp.exp(a[1] - lse) + b[0] * jnp.exp(b[1] - lse), lse


def with_extra_logit(results: Results, spec: AttentionSpec) -> Results:
    """The results over all columns, and the activation's extra logit, which takes weight and has no value."""
    if (extra := spec.activation.extra_logit) is None:
        return results
    assert results[1] is not None
    return joined(results, (jnp.zeros((), F32), jnp.full_like(results[1], extra)))


def weights_again(
    logits: jax.Array, keep: jax.Array, lse: jax.Array | None, spec: AttentionSpec
) -> tuple[jax.Array, Callable[[jax.Array, jax.Array | None], jax.Array]]:
    """The weights of some columns, in the backward pass, and (their gradient, δ) → that of the logits.

    lse: of the row over *all* its columns, extra logit included. δ = Σ_d out_td · (its gradient)_td, (B, NKV, G, T, 1).
    Both are None of a pointwise activation, whose weights know nothing of each other.
    """
    keep = _of_heads(keep, logits)
    if lse is None:
        weights, pull = jax.vjp(lambda logits: jnp.where(keep, spec.activation(logits, spec.n), 0), logits)
        return weights, lambda gradient, delta: pull(gradient)[0]
    weights = jnp.where(keep, jnp.exp(logits - lse), 0)
    return weights, lambda gradient, delta: weights * (gradient - delta)
