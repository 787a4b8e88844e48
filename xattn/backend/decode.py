"""Decoding token by token: one interface for all activations, equal to the parallel form at every position.

    spec = decoding_spec(num_heads=4, activation_function="softmax")
    cache = init_cache(spec, batch=1, num_kv_heads=4, head_dim_qk=64, head_dim_v=64, capacity=512)
    out, cache = prefill(q, k, v, cache, spec)              # the whole prompt in one call
    out, cache = decode_step(q, k, v, cache, spec)          # then one token per call

A cache keeps rotated keys, and values; a window limits how many. For a linear activation without a window it keeps one
DHQK×DHV state per head, of constant size. Both use *absolute* positions and a counter. Rotating the state back after
every token, as :func:`xattn.backend.linear.linear_with_state` does after every call, would accumulate rounding errors.

For a decay, an input gate or documents, create the cache for them, and give each call the arrays of its tokens::

    cache = init_cache(spec, …, fades=True)
    out, cache = decode_step(q, k, v, cache, of_tokens(spec, k, log_decay=log_decay))

Caches of a model's layers may be stacked along leading axes; :func:`grow` and :func:`append` accept such stacks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from xattn.backend import dispatch, formula, linear, xla_cpu
from xattn.backend.arguments import checked_arrays, checked_spec
from xattn.backend.cache import Cache, Entry, KVCache, StateCache
from xattn.backend.formula import F32, Tokens
from xattn.backend.spec import AttentionSpec, prepare, product


def decoding_spec(*, num_heads: int, context_length: int | None = None, **choices: Any) -> AttentionSpec:
    """Return the spec for all calls of one decoding. The arguments are those of :func:`xattn.backend.api.attention`.

    Raises:
        ValueError: as there; also if the weights depend on n but neither context_length nor a bias is given. (n is not
            the number of tokens so far.)
    """
    spec = checked_spec(num_heads=num_heads, length=1, context_length=context_length, **choices)
    bias = choices.get("sigmoid_bias")
    if spec.activation.uses_n and context_length is None and (bias is None or not spec.activation.takes_bias):
        instead = ", or sigmoid_bias" if spec.activation.takes_bias else ""
        raise ValueError(f"decoding with {spec.activation.name} needs context_length, the n of its weights{instead}")
    return spec


def of_tokens(
    spec: AttentionSpec,
    keys: Float[Array, "B NKV S DHQK"],
    *,
    log_decay: Float[Array, "B NKV S"] | None = None,
    log_input_gate: Float[Array, "B NKV S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
) -> AttentionSpec:
    """Return the spec of one call: ``spec`` with the arrays of the call's tokens.

    Raises:
        ValueError: as for :func:`xattn.backend.api.attention`.
    """
    batch, kv_heads, length, _ = keys.shape
    given: dict[str, Any] = {"log_decay": log_decay, "log_input_gate": log_input_gate, "segment_ids": segment_ids}
    checked = checked_spec(num_heads=kv_heads, num_kv_heads=kv_heads, batch=batch, length=length, **given)
    return replace(spec, **{name: getattr(checked, name) for name in given})


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
    """Attend over the prompt in parallel, at positions 0 … S − 1; return the output and the cache after it.

    Args:
        queries, keys, values: arrays of one dtype; three axes mean a single head.
        cache: an empty cache.
        spec: from :func:`decoding_spec` or :func:`of_tokens`.
        length: number of prompt tokens that count, at most S; None means all. The rest is padding, and the output there
            is meaningless.
        implementation: as in :func:`xattn.backend.api.attention`. ``none`` without a window accepts only ``auto`` and
            ``linear``, which are the same there.

    Raises:
        ValueError: the arrays don't fit each other, the prompt is longer than the cache's capacity, or the
            implementation is unknown or does not support the call.
    """
    q, k, v = checked_arrays(queries, keys, values)
    spec = _fitting(cache, spec)
    seen = jnp.asarray(q.shape[2] if length is None else length, jnp.int32)
    if isinstance(cache, StateCache):
        if implementation != dispatch.AUTO and dispatch.row(implementation).name != "linear":
            raise ValueError(f"attention implementation {implementation!r} cannot use the state in this cache")
        out, after = _prefill_state(q, k, v, cache, spec, seen)
    else:
        capacity = cache.k.shape[2]
        if spec.window is None and q.shape[2] > capacity:
            raise ValueError(f"a prompt of {q.shape[2]} tokens does not fit a cache with a capacity of {capacity}")
        out = dispatch.compute(q, k, v, spec, implementation)
        positions = jnp.clip(_positions(seen, capacity), 0, q.shape[2] - 1)
        _, k = prepare(q, k, spec)
        k, v = (jnp.take(x, positions, axis=2) for x in (k, v))
        terms = formula.terms(spec, seen[None] - 1)
        after = KVCache(
            k.astype(cache.k.dtype),
            v.astype(cache.v.dtype),
            seen,
            None if terms is None else jnp.take(terms[:, :, 0], positions, axis=2),
            None if spec.segment_ids is None else jnp.take(spec.segment_ids, positions, axis=1),
        )
    return (out if queries.ndim == 4 else out[:, 0]), after


def _fitting(cache: Cache, spec: AttentionSpec) -> AttentionSpec:
    """Return the spec with segment_ids in the dtype of caches.

    Raise ValueError if its terms or segment_ids don't match those the cache was made for.
    """
    has_documents = spec.segment_ids is not None
    of_documents = (cache.segment if isinstance(cache, StateCache) else cache.segments) is not None
    fades = spec.has_terms if isinstance(cache, StateCache) else cache.terms is not None
    for name, made, given in (("fades", fades, spec.has_terms), ("documents", of_documents, has_documents)):
        if made != given:
            raise ValueError(f"the cache was made with {name}={made}, and this call has {name}={given}; see init_cache")
    return spec if spec.segment_ids is None else replace(spec, segment_ids=spec.segment_ids.astype(jnp.int32))


def _until(spec: AttentionSpec, length: Int[Array, ""]) -> AttentionSpec:
    """Return the spec with tokens from ``length`` on as padding: nothing decays there, and no document begins."""
    decays, segments = spec.log_decay, spec.segment_ids
    if decays is not None:
        decays = jnp.where(jnp.arange(decays.shape[2]) < length, decays, 0)
    if segments is not None:
        last = jax.lax.dynamic_slice_in_dim(segments, length - 1, 1, axis=1)
        segments = jnp.where(jnp.arange(segments.shape[1]) < length, segments, last)
    return replace(spec, log_decay=decays, segment_ids=segments)


def _prefill_state(
    q: Array, k: Array, v: Array, cache: StateCache, spec: AttentionSpec, seen: Int[Array, ""]
) -> tuple[Array, Cache]:
    counts = (jnp.arange(v.shape[2]) < seen)[None, None, :, None]
    spec = _until(spec, seen)
    stretch = linear.Stretch(linear.documents(spec), cache.state)
    segment = None if spec.segment_ids is None else spec.segment_ids[:, -1]
    out, state = linear.chunked(q, k, jnp.where(counts, v, 0), spec, stretch, linear.Chunks.of_platform())
    return out, StateCache(state, seen, segment)


def decode_step(
    queries: Float[Array, "B *NH 1 DHQK"],
    keys: Float[Array, "B *NKV 1 DHQK"],
    values: Float[Array, "B *NKV 1 DHV"],
    cache: Cache,
    spec: AttentionSpec,
) -> tuple[Float[Array, "B *NH 1 DHV"], Cache]:
    """Return the next token's output and the cache after it. The arguments are those of :func:`prefill`.

    Without a window, the output past the cache's capacity is NaN: call :func:`grow` in time.

    Raises:
        ValueError: the arrays don't fit each other, or have more than one token.
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
    """Compute the first half of :func:`decode_step`: the output, and the entry for :func:`append`.

    It only reads the cache. A model keeps the caches of its layers stacked and appends to all of them together, because
    writing to a cache before reading it would copy it.
    """
    q, k, v = checked_arrays(queries, keys, values)
    if q.shape[2] != 1:
        raise ValueError(f"decode_step takes one token, got {q.shape[2]}; use prefill for several")
    spec = _fitting(cache, spec)
    q, k = prepare(q, k, spec, cache.length)
    q = xla_cpu.without_token_axis(formula.grouped(q, k.shape[1]))  # (B, NKV, G, DHQK)
    if isinstance(cache, StateCache):
        state = _state_with(k, v, cache, spec)
        out, entry = product("bkgd,bkde->bkge", q.astype(F32), state), Entry(state, None, segment=spec.segment_ids)
    else:
        out = _attend_to_tokens(q, k, v, cache, spec)
        entry = Entry(k.astype(cache.k.dtype), v.astype(cache.v.dtype), segment=spec.segment_ids)
        if cache.terms is not None:
            falls, own = _own_terms(spec, *k.shape[:2])
            entry = entry._replace(log_decay=falls, log_input_gate=own)
    return out.astype(values.dtype).reshape(*queries.shape[:-1], v.shape[-1]), entry


def append(cache: Cache, entry: Entry) -> Cache:
    """Return the cache with the entry from :func:`attend` added."""
    if isinstance(cache, StateCache):
        return StateCache(entry.key, cache.length + 1, None if entry.segment is None else entry.segment[..., 0])
    assert entry.value is not None
    slot = jnp.max(cache.length) % cache.k.shape[-2]
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=cache.k.ndim - 2)
    terms, segments = cache.terms, cache.segments
    if terms is not None:
        assert entry.log_decay is not None
        assert entry.log_input_gate is not None
        own = entry.log_input_gate
        terms = jax.lax.dynamic_update_slice_in_dim(terms + entry.log_decay, own, slot, axis=terms.ndim - 1)
    if segments is not None:
        assert entry.segment is not None
        segments = jax.lax.dynamic_update_slice_in_dim(segments, entry.segment, slot, axis=segments.ndim - 1)
    return KVCache(put(cache.k, entry.key), put(cache.v, entry.value), cache.length + 1, terms, segments)


def _own_terms(spec: AttentionSpec, batch: int, kv_heads: int) -> tuple[Array, ...]:
    """Return (ℓ, log i) of the token, (B, NKV, 1) each; 0 for what the spec lacks."""
    none = jnp.zeros((batch, kv_heads, 1), F32)
    return tuple(none if x is None else x for x in (spec.log_decay, spec.log_input_gate))


def _state_with(k: Array, v: Array, cache: StateCache, spec: AttentionSpec) -> Float32[Array, "B NKV DHQK DHV"]:
    """Return the state including the token."""
    before, added = cache.state, product("bksd,bkse->bkde", k, v) / math.sqrt(k.shape[-1])
    if spec.log_decay is not None:
        before = before * jnp.exp(spec.log_decay)[..., None]
    if spec.log_input_gate is not None:
        added = added * jnp.exp(spec.log_input_gate)[..., None]
    if cache.segment is not None:
        assert spec.segment_ids is not None
        goes_on = (spec.segment_ids[:, 0] == cache.segment) | (cache.length == 0)
        before = jnp.where(goes_on[:, None, None, None], before, 0)
    return before + added


def _attend_to_tokens(q: Array, k: Array, v: Array, cache: KVCache, spec: AttentionSpec) -> Array:
    """Attend to the tokens in the cache and the new one; return (B, NKV, G, DHV), float32."""
    t, capacity = cache.length, cache.k.shape[2]
    positions = _positions(t, capacity)
    # The new token comes last. It may always be attended to, so no row is empty.
    segments = spec.segment_ids
    if cache.segments is not None and segments is not None:
        segments = jnp.concatenate([cache.segments, segments], axis=1)
    columns = Tokens(jnp.append(positions, t), segments, exist=jnp.append(positions >= 0, True))
    keep = formula.may_attend(Tokens(t[None], spec.segment_ids), columns, spec, None)
    scores = jnp.concatenate([formula.scores(q, cache.k.astype(q.dtype)), formula.scores(q, k)], axis=-1)
    terms = None
    if cache.terms is not None:
        falls, own = _own_terms(spec, *k.shape[:2])
        terms = jnp.concatenate([cache.terms + falls, own], axis=-1)[:, :, None]
    logits = formula.logits(scores[..., None, :], spec, terms)
    weights = formula.weights(logits, keep, spec)[..., 0, :].astype(v.dtype)
    out = product("bkgs,bkse->bkge", weights[..., :-1], cache.v.astype(v.dtype))
    out = out + product("bkgs,bkse->bkge", weights[..., -1:], v)
    return out if spec.window is not None else jnp.where(t < capacity, out, jnp.nan)


def _positions(length: Int[Array, ""], capacity: int) -> Int[Array, " C"]:
    """Return the position of the token in each slot after ``length`` tokens; negative for an empty slot."""
    newest = length - 1
    return newest - (newest - jnp.arange(capacity)) % capacity
