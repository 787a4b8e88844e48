"""The specification: attention as its formula, S×S weights and all. Every other implementation is tested to equal it.

Shape letters: B batch, NH heads, NKV key/value heads, S sequence, DHQK query/key head width, DHV value head width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from xattn.backend.spec import AttentionSpec, prepare, product


def reference(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> jax.Array:
    """out = weights · v with weights = f(R(q) R(k)ᵀ / √DHQK), and 0 where a token may not attend.

    f is softmax over the keys that may be attended to, σ(· + bias), or the identity. Logits and weights are float32;
    the weights are rounded to v's dtype before they meet v, and that product too is accumulated in float32. A row
    that may attend to nothing is 0.

    Args:
        q: (B, NH, S, DHQK).
        k: (B, NKV, S, DHQK); query head h reads key/value head ⌊h · NKV / NH⌋.
        v: (B, NKV, S, DHV), of the dtype of q and k.
        spec: everything else.

    Returns:
        (B, NH, S, DHV) in the dtype of v.
    """
    logits, keep = masked_logits(q, k, spec)
    v = jnp.repeat(v, q.shape[1] // v.shape[1], axis=1)
    return product("bhts,bhsd->bhtd", weights_of(logits, keep, spec).astype(v.dtype), v).astype(v.dtype)


def masked_logits(
    q: jax.Array, k: jax.Array, spec: AttentionSpec, rows: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """A = R(q) R(k)ᵀ / √DHQK in float32, and where its tokens may attend: both (B, NH, T, S).

    rows: the T positions of the queries that are asked about, int (T,); None is all of them.
    """
    q, k = prepare(q, k, spec)
    group = q.shape[1] // k.shape[1]
    k = jnp.repeat(k, group, axis=1)
    q = q if rows is None else q[:, :, rows]
    logits = product("bhtd,bhsd->bhts", q, k) / math.sqrt(q.shape[-1])
    return logits, jnp.broadcast_to(may_attend(k.shape[-2], spec, rows), logits.shape)


def weights_of(logits: jax.Array, keep: jax.Array, spec: AttentionSpec) -> jax.Array:
    """f of the logits, and 0 where keep is False: float32, of the logits' shape (B, NH, T, S)."""
    match spec.activation:
        case "softmax":
            # The lowest float, not −inf: a row of −inf alone has no softmax, and its gradient is NaN even where a
            # later select drops the row.
            lowest = jnp.finfo(jnp.float32).min
            return jnp.where(keep, jax.nn.softmax(jnp.where(keep, logits, lowest), axis=-1), 0)
        case "sigmoid":
            assert spec.bias is not None
            return jnp.where(keep, jax.nn.sigmoid(logits + spec.bias[None, :, None, None]), 0)
        case "none":
            return jnp.where(keep, logits, 0)


def may_attend(length: int, spec: AttentionSpec, rows: jax.Array | None = None) -> jax.Array:
    """(the given mask, or causal) ∧ window ∧ equal segments: bool (1 or B, 1, T, S), True = attend; T as above."""
    rows = jnp.arange(length) if rows is None else rows
    t, s = rows[:, None], jnp.arange(length)[None, :]
    keep = s <= t if spec.mask is None else spec.mask[rows]
    if spec.window is not None:
        keep = keep & (s <= t) & (t - spec.window < s)
    keep = keep[None, None]
    if spec.segment_ids is not None:
        keep = keep & (spec.segment_ids[:, rows][:, None, :, None] == spec.segment_ids[:, None, None, :])
    return keep
