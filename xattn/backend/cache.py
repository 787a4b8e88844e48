"""What a decoding keeps of the tokens so far: their keys and values, or one state per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from xattn.backend.formula import F32
from xattn.backend.spec import AttentionSpec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The keys and values of the last C tokens. The token at position p is in slot p mod C."""

    k: Float[Array, "*layers B NKV C DHQK"]
    """Rotated."""
    v: Float[Array, "*layers B NKV C DHV"]
    length: Int32[Array, "*layers"]
    """Number of tokens seen, which is the position of the next."""
    terms: Float32[Array, "*layers B NKV C"] | None = None
    """E_ts = D_ts + log i_s of each token s, where t is the newest token. None without decay and input gate."""
    segments: Int32[Array, "*layers B C"] | None = None
    """Segment id of each token; None without documents."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StateCache:
    """The sum over all tokens. With several documents, it covers only the last."""

    state: Float32[Array, "*layers B NKV DHQK DHV"]
    """Σ_s i_s e^{D_ts} R(s) k_s v_sᵀ / √DHQK, where t is the newest token."""
    length: Int32[Array, "*layers"]
    segment: Int32[Array, "*layers B"] | None = None
    """Segment id of the newest token; None without documents."""


Cache = KVCache | StateCache


class Entry(NamedTuple):
    """What one token adds to a cache, in the dtype of the cache."""

    key: Float[Array, "*layers B NKV 1 DHQK"] | Float32[Array, "*layers B NKV DHQK DHV"]
    """The rotated key. For a :class:`StateCache`, the state including the token."""
    value: Float[Array, "*layers B NKV 1 DHV"] | None
    """None for a :class:`StateCache`."""
    log_decay: Float32[Array, "*layers B NKV 1"] | None = None
    """Added to the terms of all earlier tokens; None for a cache without terms."""
    log_input_gate: Float32[Array, "*layers B NKV 1"] | None = None
    """The term of the token itself."""
    segment: Int32[Array, "*layers B 1"] | None = None


def init_cache(
    spec: AttentionSpec,
    *,
    batch: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_v: int,
    capacity: int,
    dtype: Any = jnp.float32,
    fades: bool = False,
    documents: bool = False,
) -> Cache:
    """Return an empty cache.

    Args:
        spec: from :func:`decoding_spec`.
        batch, num_kv_heads, head_dim_qk, head_dim_v: B, NKV, DHQK and DHV.
        capacity: expected number of tokens, including the prompt; less than 1 is a ValueError. :func:`grow` makes room
            for more. A window replaces it by its width, and ``none`` without one stores no tokens: neither overflows.
        dtype: dtype of keys and values; a state is always float32.
        fades: whether the specs of calls have a log_decay or a log_input_gate.
        documents: whether the specs of calls have segment_ids. A state covers only the last document, so an id that
            comes back after another starts a new document.
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    length = jnp.zeros((), jnp.int32)
    if spec.activation.is_linear and spec.window is None:
        segment = jnp.zeros(batch, jnp.int32) if documents else None
        return StateCache(jnp.zeros((batch, num_kv_heads, head_dim_qk, head_dim_v), F32), length, segment)
    # The full window, even if capacity is smaller: such a cache never has to grow.
    capacity = spec.window or capacity
    k, v = (jnp.zeros((batch, num_kv_heads, capacity, width), dtype) for width in (head_dim_qk, head_dim_v))
    terms = jnp.zeros((batch, num_kv_heads, capacity), F32) if fades else None
    return KVCache(k, v, length, terms, jnp.zeros((batch, capacity), jnp.int32) if documents else None)


def grow(cache: Cache, spec: AttentionSpec, tokens: int = 1) -> Cache:
    """Return the cache if it has room for ``tokens`` more, else a copy with doubled capacity. It can't run under jit.

    Doubling compiles the decode step a logarithmic number of times, and copies a token at most twice on average.
    """
    if isinstance(cache, StateCache) or spec.window is not None:
        return cache
    capacity = cache.k.shape[-2]
    while capacity < int(cache.length.max()) + tokens:
        capacity *= 2

    def longer(x: Any, axis: int) -> Any:
        if x is None:
            return None
        return jnp.pad(x, [(0, capacity - x.shape[axis] if i == x.ndim + axis else 0) for i in range(x.ndim)])

    k, v = longer(cache.k, -2), longer(cache.v, -2)
    return KVCache(k, v, cache.length, longer(cache.terms, -1), longer(cache.segments, -1))
