"""Token by token: one interface for all activations, equal to the parallel form at every position.

    spec = decoding_spec(num_heads=4, activation_function="softmax")
    cache = init_cache(spec, batch=1, num_kv_heads=4, head_dim_qk=64, head_dim_v=64, capacity=512)
    out, cache = prefill(q, k, v, cache, spec)              # the prompt, at once
    out, cache = decode_step(q, k, v, cache, spec)          # then a token a call

A cache keeps rotated keys, and values; a window bounds how many. Of a linear activation without a window it keeps one
DHQK×DHV state a head, of constant size. Both keep *absolute* positions and a counter: rotating a state back at every
token, as the border of a call does (:func:`xattn.backend.linear.linear_with_state`), would drift.

The caches of a model's layers may be stacked along axes in front; :func:`grow` and :func:`append` take them together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from xattn.backend import dispatch, formula
from xattn.backend.arguments import checked_arrays, checked_spec
from xattn.backend.formula import F32, Tokens
from xattn.backend.linear import Tuning, chunked
from xattn.backend.spec import AttentionSpec, prepare, product


@partial(jax.tree_util.register_dataclass, data_fields=("k", "v", "length"), meta_fields=())
@dataclass(frozen=True)
class KVCache:
    """The last C tokens: the one at position p is in slot p mod C."""

    k: Float[Array, "*layers B NKV C DHQK"]
    """Rotated."""
    v: Float[Array, "*layers B NKV C DHV"]
    length: Int32[Array, "*layers"]
    """Tokens seen, which is the position of the next."""


@partial(jax.tree_util.register_dataclass, data_fields=("state", "length"), meta_fields=())
@dataclass(frozen=True)
class StateCache:
    """All tokens, summed."""

    state: Float32[Array, "*layers B NKV DHQK DHV"]
    """Σ_s R(s) k_s v_sᵀ / √DHQK."""
    length: Int32[Array, "*layers"]


Cache = KVCache | StateCache


class Entry(NamedTuple):
    """What one token adds to a cache, in the cache's dtype: its rotated key and its value; or as the key the state that
    includes it, and no value."""

    key: Float[Array, "*layers B NKV 1 DHQK"] | Float32[Array, "*layers B NKV DHQK DHV"]
    value: Float[Array, "*layers B NKV 1 DHV"] | None


def decoding_spec(*, num_heads: int, context_length: int | None = None, **choices: Any) -> AttentionSpec:
    """The spec of all calls of one decoding; the arguments are those of :func:`xattn.backend.api.attention`.

    Raises:
        ValueError: as there; and if the weights depend on n but neither context_length nor a bias is given. (n is not
            the length so far.)
    """
    spec = checked_spec(num_heads=num_heads, length=1, context_length=context_length, **choices)
    bias = choices.get("sigmoid_bias")
    if spec.activation.uses_n and context_length is None and (bias is None or not spec.activation.takes_bias):
        instead = ", or sigmoid_bias" if spec.activation.takes_bias else ""
        raise ValueError(f"decoding with {spec.activation.name} needs context_length, the n of its weights{instead}")
    return spec


def init_cache(
    spec: AttentionSpec,
    *,
    batch: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_v: int,
    capacity: int,
    dtype: Any = jnp.float32,
) -> Cache:
    """A cache that has seen nothing.

    Args:
        spec: from :func:`decoding_spec`.
        batch, num_kv_heads, head_dim_qk, head_dim_v: B, NKV, DHQK and DHV.
        capacity: tokens to come, prompt included; less than 1 is a ValueError. :func:`grow` makes room for more.
            With a window the cache keeps that many, and ``none`` without one keeps no token: neither overflows.
        dtype: of keys and values; a state is always float32.
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    length = jnp.zeros((), jnp.int32)
    if spec.activation.is_linear and spec.window is None:
        return StateCache(jnp.zeros((batch, num_kv_heads, head_dim_qk, head_dim_v), F32), length)
    # All of a window, even if capacity is less: such a cache never has to grow.
    capacity = spec.window or capacity
    k, v = (jnp.zeros((batch, num_kv_heads, capacity, width), dtype) for width in (head_dim_qk, head_dim_v))
    return KVCache(k, v, length)


def grow(cache: Cache, spec: AttentionSpec, tokens: int = 1) -> Cache:
    """The cache with room for ``tokens`` more: itself, or a copy of doubled capacity. Not under jit.

    Doubling compiles the decode step a logarithmic number of times, and copies a token at most twice on average.
    """
    if isinstance(cache, StateCache) or spec.window is not None:
        return cache
    capacity = cache.k.shape[-2]
    while capacity < int(cache.length.max()) + tokens:
        capacity *= 2
    more = [(0, 0)] * (cache.k.ndim - 2) + [(0, capacity - cache.k.shape[-2]), (0, 0)]
    return replace(cache, k=jnp.pad(cache.k, more), v=jnp.pad(cache.v, more))


def prefill(
    queries: Float[Array, "B *NH S DHQK"],
    keys: Float[Array, "B *NKV S DHQK"],
    values: Float[Array, "B *NKV S DHV"],
    cache: Cache,
    spec: AttentionSpec,
    *,
    length: Int[Array, ""] | int | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B *NH S DHV"], Cache]:
    """The parallel form over the prompt, at positions 0 … S − 1, and the cache after it.

    Args:
        queries, keys, values: of one dtype; three axes are one head.
        cache: one that has seen nothing.
        spec: from :func:`decoding_spec`.
        length: tokens of the prompt that count, at most S; None is all. The rest is padding, and the output there is
            meaningless.
        implementation: as in :func:`xattn.backend.api.attention`; ``none`` without a window takes ``auto`` and
            ``linear``, which are the same there.

    Raises:
        ValueError: arrays that don't fit each other, a prompt longer than the cache's capacity, or an implementation
            that is unknown or does not support the call.
    """
    q, k, v = checked_arrays(queries, keys, values)
    seen = jnp.asarray(q.shape[2] if length is None else length, jnp.int32)
    if isinstance(cache, StateCache):
        if implementation != dispatch.AUTO and dispatch.row(implementation).name != "linear":
            raise ValueError(f"attention implementation {implementation!r} does not keep the state that this cache is")
        counts = (jnp.arange(v.shape[2]) < seen)[None, None, :, None]
        out, state = chunked(q, k, jnp.where(counts, v, 0), spec, cache.state, Tuning.of_platform())
        after: Cache = StateCache(state, seen)
    else:
        capacity = cache.k.shape[2]
        if spec.window is None and q.shape[2] > capacity:
            raise ValueError(f"a prompt of {q.shape[2]} tokens does not fit a cache with a capacity of {capacity}")
        out = dispatch.compute(q, k, v, spec, implementation)
        positions = jnp.clip(_positions(seen, capacity), 0, q.shape[2] - 1)
        _, k = prepare(q, k, spec)
        k, v = (jnp.take(x, positions, axis=2) for x in (k, v))
        after = KVCache(k.astype(cache.k.dtype), v.astype(cache.v.dtype), seen)
    return (out if queries.ndim == 4 else out[:, 0]), after


def decode_step(
    queries: Float[Array, "B *NH 1 DHQK"],
    keys: Float[Array, "B *NKV 1 DHQK"],
    values: Float[Array, "B *NKV 1 DHV"],
    cache: Cache,
    spec: AttentionSpec,
) -> tuple[Float[Array, "B *NH 1 DHV"], Cache]:
    """The next token's output, and the cache after it; queries, keys, values and spec are as in :func:`prefill`.

    Past the capacity of a cache without a window the output is NaN: :func:`grow` in time.

    Raises:
        ValueError: arrays that don't fit each other, or more than one token.
    """
    out, entry = attend(queries, keys, values, cache, spec)
    return out, append(cache, entry)


def attend(
    queries: Float[Array, "B *NH 1 DHQK"],
    keys: Float[Array, "B *NKV 1 DHQK"],
    values: Float[Array, "B *NKV 1 DHV"],
    cache: Cache,
    spec: AttentionSpec,
) -> tuple[Float[Array, "B *NH 1 DHV"], Entry]:
    """The first half of :func:`decode_step`, with the same arguments: the output, and what :func:`append` adds.

    It only reads the cache. A model keeps the caches of its layers stacked and appends to all together: writing each
    before it is read would copy it.
    """
    q, k, v = checked_arrays(queries, keys, values)
    if q.shape[2] != 1:
        raise ValueError(f"decode_step takes one token, got {q.shape[2]}; prefill takes many")
    q, k = prepare(q, k, spec, cache.length)
    q = formula.grouped(q, k.shape[1])[..., 0, :]  # (B, NKV, G, DHQK): with two axes of 1, XLA:CPU copies the cache
    if isinstance(cache, StateCache):
        state = cache.state + product("bksd,bkse->bkde", k, v) / math.sqrt(q.shape[-1])
        out, entry = product("bkgd,bkde->bkge", q.astype(F32), state), Entry(state, None)
    else:
        out, entry = _attend_to_tokens(q, k, v, cache, spec), Entry(k.astype(cache.k.dtype), v.astype(cache.v.dtype))
    return out.astype(values.dtype).reshape(*queries.shape[:-1], v.shape[-1]), entry


def append(cache: Cache, entry: Entry) -> Cache:
    """The cache after the token of :func:`attend`."""
    if isinstance(cache, StateCache):
        return StateCache(entry.key, cache.length + 1)
    assert entry.value is not None
    slot = jnp.max(cache.length) % cache.k.shape[-2]
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=cache.k.ndim - 2)
    return KVCache(put(cache.k, entry.key), put(cache.v, entry.value), cache.length + 1)


def _attend_to_tokens(q: Array, k: Array, v: Array, cache: KVCache, spec: AttentionSpec) -> Array:
    """Over the tokens in the cache, and the new one: (B, NKV, G, DHV), float32."""
    t, capacity = cache.length, cache.k.shape[2]
    positions = _positions(t, capacity)
    # The new token comes last, and may always be attended to: no row is empty.
    columns = Tokens(jnp.append(positions, t), exist=jnp.append(positions >= 0, True))
    keep = formula.may_attend(Tokens(t[None]), columns, spec, None)
    scores = jnp.concatenate([formula.scores(q, cache.k.astype(q.dtype)), formula.scores(q, k)], axis=-1)
    weights = formula.weights(formula.logits(scores[..., None, :], spec), keep, spec)[..., 0, :].astype(v.dtype)
    out = product("bkgs,bkse->bkge", weights[..., :-1], cache.v.astype(v.dtype))
    out = out + product("bkgs,bkse->bkge", weights[..., -1:], v)
    return out if spec.window is not None else jnp.where(t < capacity, out, jnp.nan)


def _positions(length: Int[Array, ""], capacity: int) -> Int[Array, " C"]:
    """The position of the token in each slot after ``length`` tokens; negative in an empty slot."""
    newest = length - 1
    return newest - (newest - jnp.arange(capacity)) % capacity
