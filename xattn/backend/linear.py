"""``none`` in linear time: attention without a normaliser is a sum of outer products, and may be summed chunk by chunk.

With rotated q and k, out_t = q_t · C_t and C_t = Σ_{s≤t} k_s v_sᵀ / √DHQK, exactly. Inside a chunk of T tokens the T×T
weights are formed as in the reference; what lies before the chunk arrives as one DHQK×DHV state. All chunks are computed
at once, their states by a running sum, so no loop runs over time. Time O(S · (T + DHQK) · DHV), memory O(S · T).

Shape letters: B batch, NH heads, NKV key/value heads, G = NH / NKV, S sequence, N chunks, T tokens a chunk,
DHQK query/key head width, DHV value head width. In einsum: b, k, g, n, t or s, d, e.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from xattn.backend.rope import rotary_tables, rotate
from xattn.backend.spec import AttentionSpec, prepare

F32 = jnp.float32


@dataclass(frozen=True)
class Tuning:
    """How the work is cut; the result depends on it by rounding only."""

    chunk: int = 64
    """Tokens a chunk, T."""


def linear(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, tuning: Tuning = Tuning()) -> jax.Array:
    """:func:`xattn.backend.reference.reference` for ``none``, causal, without window, segments or a given mask."""
    return linear_with_state(q, k, v, spec, None, tuning)[0]


def linear_with_state(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: AttentionSpec,
    initial: jax.Array | None,
    tuning: Tuning = Tuning(),
) -> tuple[jax.Array, jax.Array]:
    """As :func:`linear`, continuing from a state and returning the last.

    A state is c = Σ_s R(s − S) k_s v_sᵀ / √DHQK over the S tokens seen: their keys are rotated back by S positions, so
    that the next call, whose positions begin at 0 again, continues exactly. Two halves equal the whole at any cut.

    Args:
        q: (B, NH, S, DHQK).
        k: (B, NKV, S, DHQK).
        v: (B, NKV, S, DHV).
        spec: its activation is ``none``, and it has neither mask nor window nor segments.
        initial: (B, NKV, DHQK, DHV), or None for the empty past, which is 0.
        tuning: the chunk.

    Returns:
        out (B, NH, S, DHV) in v's dtype, and the state (B, NKV, DHQK, DHV), float32. For the backward only the arguments
        are kept; everything else is recomputed.
    """
    assert spec.activation == "none"
    assert spec.mask is None
    assert spec.window is None
    assert spec.segment_ids is None
    if initial is None:
        initial = jnp.zeros((*k.shape[:2], k.shape[-1], v.shape[-1]), F32)
    out, state = _chunked(q, k, v, spec, initial.astype(F32), min(tuning.chunk, q.shape[2]))
    sin, cos = rotary_tables(jnp.array([-q.shape[2]]), q.shape[-1], spec.theta)
    return out, rotate(state.swapaxes(-1, -2), sin, cos).swapaxes(-1, -2)


@partial(jax.checkpoint, static_argnums=5)
def _chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, initial: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """out, and the state with its keys at absolute positions."""
    length, scale = q.shape[2], 1 / math.sqrt(q.shape[-1])
    product = partial(jnp.einsum, preferred_element_type=F32)
    rotated_q, rotated_k = prepare(q, k, spec)
    q_, k_, v_ = (_chunks(x, chunk) for x in (rotated_q, rotated_k, v))
    q_ = q_.reshape(k_.shape[0], k_.shape[1], -1, *q_.shape[2:])

    causal = jnp.broadcast_to(jnp.tri(chunk, dtype=bool), (*q_.shape[:-1], chunk))
    weights = jnp.where(causal, product("bkgntd,bknsd->bkgnts", q_, k_) * scale, 0)
    out = product("bkgnts,bknse->bkgnte", weights.astype(v.dtype), v_)

    sums = jnp.cumsum(product("bknsd,bknse->bknde", k_, v_) * scale, axis=2) + initial[:, :, None]
    before = jnp.concatenate([initial[:, :, None], sums[:, :, :-1]], axis=2)
    out = out + product("bkgntd,bknde->bkgnte", q_, before.astype(v.dtype))

    out = out.reshape(*q.shape[:2], -1, v.shape[-1])[:, :, :length]
    return out.astype(v.dtype), sums[:, :, -1]


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """(B, heads, S, ·) as (B, heads, N, T, ·), filled with zeros: a key of zeros adds nothing to any sum."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % chunk), (0, 0)))
    return x.reshape(*x.shape[:2], -1, chunk, x.shape[-1])
