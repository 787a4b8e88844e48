"""The formula of attention, written once: queries and keys to logits, logits to weights, and the masking rule.

Every function works on some rows (queries) and some columns (keys). The reference passes all of them, ``blockwise`` a
tile, ``ring`` a stretch, decoding one row against a cache's slots, and attention statistics a sample of rows.

In shapes, T is the number of rows and S the number of columns. Query heads have the axes NKV, G. Where keys and values
are repeated for each query head, they have the single axis NKV.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from xattn.backend import decay
from xattn.backend.spec import AttentionSpec, Values, product

F32 = jnp.float32
# Not −inf: the softmax of a row of −inf is undefined, and its gradient is NaN even if a later select drops the row.
LOWEST = float(jnp.finfo(jnp.float32).min)
Scores = Float32[Array, "B NKV *G T S"]
Keep = Bool[Array, "#B T S"]
Terms = Float32[Array, "B KV #T S"]
"""E_ts = D_ts + log i_s: the log of what decay and input gate leave of token s at t. KV is the number of key heads."""


class Tokens(NamedTuple):
    """A set of rows or columns."""

    positions: Int[Array, " T"]
    segments: Int[Array, "B T"] | None = None
    """None if the sequence is a single document."""
    exist: Bool[Array, " T"] | None = None
    """False for padding and for empty slots; None means that all tokens exist."""


def may_attend(rows: Tokens, columns: Tokens, spec: AttentionSpec, mask: Bool[Array, "T S"] | None) -> Keep:
    """Return (given mask, or causal) ∧ window ∧ equal segments; True means attend. A decay also makes it causal.

    ``mask`` is the part of the given mask for these rows and columns; None means causal.
    """
    t, s = rows.positions[:, None], columns.positions[None, :]
    keep = s <= t if mask is None else mask
    if columns.exist is not None:
        keep = keep & columns.exist[None, :]
    if spec.window is not None:
        keep = keep & (s <= t) & (t - spec.window < s)
    if spec.log_decay is not None:
        keep = keep & (s <= t)
    keep = keep[None]
    if rows.segments is not None and columns.segments is not None:
        keep = keep & (rows.segments[:, :, None] == columns.segments[:, None, :])
    return keep


def grouped(x: Float[Array, "B NH T D"], kv_heads: int) -> Float[Array, "B NKV G T D"]:
    """Group query heads by the key/value head they read: query head h reads ⌊h · NKV / NH⌋."""
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def scores(q: Float[Array, "B NKV *G T DHQK"], k: Float[Array, "B NKV S DHQK"]) -> Scores:
    """Return A = q kᵀ / √DHQK for rotated q and k."""
    return product("bk...td,bksd->bk...ts", q, k) / math.sqrt(q.shape[-1])


def logits(scores: Scores, spec: AttentionSpec, terms: Terms | None = None) -> Scores:
    """Return the input of the activation: A + b + E, or A · e^E for an activation whose weight is the logit."""
    logits = scores if spec.bias is None else scores + _of_query_heads(spec.bias, scores)
    if terms is None:
        return logits
    terms = _of_terms(terms, logits)
    return logits * jnp.exp(terms) if spec.activation.is_linear else logits + terms


def _of_terms(terms: Terms, logits: Array) -> Array:
    """Expand ``terms`` to the heads of the logits, or add an axis that broadcasts over them."""
    return terms[:, :, None] if logits.ndim == 5 else jnp.repeat(terms, logits.shape[1] // terms.shape[1], axis=1)


def gradients_of_logits(
    gradient: Scores, logits: Scores, spec: AttentionSpec, terms: Terms | None
) -> tuple[Scores, Scores]:
    """Return the gradients of :func:`logits` with respect to the scores and to E, if there is one, per query head."""
    if terms is None or not spec.activation.is_linear:
        return gradient, gradient
    return gradient * jnp.exp(_of_terms(terms, logits)), gradient * logits


def terms(spec: AttentionSpec, rows: Int[Array, " T"]) -> Terms | None:
    """Return E_ts for the queries at positions ``rows`` and all keys; None without decay and input gate."""
    decayed = None if spec.log_decay is None else decay.sums(spec.log_decay, rows)
    if spec.log_input_gate is None:
        return decayed
    gate = spec.log_input_gate[:, :, None, :]
    return jnp.broadcast_to(gate, (*gate.shape[:2], rows.size, gate.shape[3])) if decayed is None else decayed + gate


def weights(logits: Scores, keep: Keep, spec: AttentionSpec) -> Scores:
    """Return the weights of complete rows. They are 0 where ``keep`` is False, even if it is False for a whole row."""
    keep = _of_heads(keep, logits)
    activation = spec.activation
    if not activation.is_normalised:
        return jnp.where(keep, activation(logits, spec.n), 0)
    logits = jnp.where(keep, logits, LOWEST)
    if spec.sink is None:
        return jnp.where(keep, jax.nn.softmax(logits, axis=-1), 0)
    sink = jnp.broadcast_to(_of_query_heads(spec.sink, logits), (*logits.shape[:-1], 1))
    return jnp.where(keep, jax.nn.softmax(jnp.concatenate([logits, sink], axis=-1), axis=-1)[..., :-1], 0)


def _of_query_heads(x: Float32[Array, " NH"], logits: Array) -> Array:
    """Reshape x, one number per head, to broadcast against the logits."""
    return x.reshape(1, *logits.shape[1:-2], 1, 1)


def _of_heads(keep: Array, logits: Array) -> Array:
    """Broadcast ``keep`` to the shape of the logits."""
    return jnp.broadcast_to(keep[:, None] if logits.ndim == 4 else keep[:, None, None], logits.shape)


# ---- in parts: the columns of a row arrive in several pieces

Results = tuple[Float[Array, "B NKV G T DHV"], Float32[Array, "B NKV G T 1"] | None]
"""The output over some columns; a normalised activation adds the log of each row's Σ e^logit, which is LOWEST if the
row may attend to none of them."""


class Sums(NamedTuple):
    """Running sums of each row over the columns so far. Only a normalised activation reads the last two."""

    weighted: Float32[Array, "B NKV G T DHV"]
    """Σ_s W_ts v_s, or Σ_s e^(A_ts − top) v_s for a normalised activation."""
    top: Float32[Array, "B NKV G T 1"]
    """The largest logit."""
    total: Float32[Array, "B NKV G T 1"]
    """Σ_s e^(A_ts − top)."""


def no_sums(rows: tuple[int, ...], width: int) -> Sums:
    """Return the sums before any column is added; ``rows`` is (B, NKV, G, T) and ``width`` is DHV."""
    zeros = jnp.zeros((*rows, 1), F32)
    return Sums(jnp.zeros((*rows, width), F32), zeros + LOWEST, zeros)


def add_columns(sums: Sums, logits: Scores, keep: Keep, v: Values, spec: AttentionSpec) -> Sums:
    """Add columns with the values ``v`` to the sums, by the online softmax of arXiv 1805.02867."""
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
    """Return the results over the columns added so far, with the output in float32."""
    if not spec.activation.is_normalised:
        return sums.weighted, None
    total = jnp.where(empty := sums.total == 0, 1, sums.total)
    return sums.weighted / total, jnp.where(empty, LOWEST, sums.top + jnp.log(total))


def joined(a: Results, b: Results) -> Results:
    """Combine the results over two disjoint sets of columns."""
    if a[1] is None or b[1] is None:
        return a[0] + b[0], None
    lse = jnp.logaddexp(a[1], b[1])
    return a[0] * jnp.exp(a[1] - lse) + b[0] * jnp.exp(b[1] - lse), lse


def with_sink(results: Results, spec: AttentionSpec) -> Results:
    """Add the sink, which takes weight but has no value, to the results over all columns."""
    if spec.sink is None:
        return results
    assert results[1] is not None
    lse = jnp.logaddexp(results[1], _of_query_heads(spec.sink, results[1]))
    return results[0] * jnp.exp(results[1] - lse), lse


def gradient_of_sink(
    lse: Float32[Array, "B NKV G T 1"], delta: Float32[Array, "B NKV G T 1"], spec: AttentionSpec
) -> Float32[Array, " NH"]:
    """Return Σ −p δ, where p = e^(z − lse) is the sink's weight; for ``lse`` and δ see :func:`weights_again`."""
    assert spec.sink is not None
    return -jnp.sum(jnp.exp(_of_query_heads(spec.sink, lse) - lse) * delta, axis=(0, 3, 4)).reshape(-1)


def weights_again(
    logits: Scores, keep: Keep, lse: Float32[Array, "B NKV *G T 1"] | None, spec: AttentionSpec
) -> tuple[Scores, Callable[[Array, Array | None], Array]]:
    """Return the weights of some columns for the backward pass, and (their gradient, δ) → gradient of the logits.

    ``lse`` covers *all* columns of a row and the sink; δ = Σ_d out_td · (gradient of out)_td, one per row. Both are
    None for a pointwise activation, in which each weight depends on its own logit only.
    """
    keep = _of_heads(keep, logits)
    if lse is None:
        weights, pull = jax.vjp(lambda logits: jnp.where(keep, spec.activation(logits, spec.n), 0), logits)
        return weights, lambda gradient, delta: pull(gradient)[0]
    weights = jnp.where(keep, jnp.exp(logits - lse), 0)
    return weights, lambda gradient, delta: weights * (gradient - delta)
