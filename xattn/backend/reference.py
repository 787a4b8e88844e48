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
    q, k = prepare(q, k, spec)
    group = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    logits = product("bhtd,bhsd->bhts", q, k) / math.sqrt(q.shape[-1])
    keep = jnp.broadcast_to(may_attend(q.shape[-2], spec), logits.shape)
    match spec.activation:
        case "softmax":
            # The lowest float, not −inf: a row of −inf alone has no softmax, and its gradient is NaN even where a
            # later select drops the row.
            lowest = jnp.finfo(jnp.float32).min
            weights = jnp.where(keep, jax.nn.softmax(jnp.where(keep, logits, lowest), axis=-1), 0)
        case "sigmoid":
            assert spec.bias is not None
            weights = jnp.where(keep, jax.nn.sigmoid(logits + spec.bias[None, :, None, None]), 0)
        case "none":
            weights = jnp.where(keep, logits, 0)
    return product("bhts,bhsd->bhtd", weights.astype(v.dtype), v).astype(v.dtype)


def may_attend(length: int, spec: AttentionSpec) -> jax.Array:
    """(the given mask, or causal) ∧ window ∧ equal segments: bool (1 or B, 1, S, S), True = attend."""
    t, s = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    keep = s <= t if spec.mask is None else spec.mask
    if spec.window is not None:
        keep = keep & (s <= t) & (t - spec.window < s)
    keep = keep[None, None]
    if spec.segment_ids is not None:
        keep = keep & (spec.segment_ids[:, None, :, None] == spec.segment_ids[:, None, None, :])
    return keep
