"""``none`` in linear time: attention without a normaliser is a sum of outer products, computed chunk by chunk.

With rotated q and k, out_t = q_t · C_t and C_t = e^{ℓ_t} C_{t−1} + i_t k_t v_tᵀ / √DHQK, exactly; ℓ = 0 without decay
and i = 1 without gate. Inside a chunk of T tokens the T×T weights are formed as in the reference. One DHQK×DHV state
stands for everything before the chunk. Every exponent is a sum of ℓ that starts at the head of the chunk. At the start
of a document the state is dropped. Time is O(S · (T + DHQK) · DHV), memory O(S · (DHQK + DHV)): both linear in S.

Letters in einsum: b B, k NKV, g G, n concurrent chunks, t and s tokens of a chunk, d DHQK, e DHV.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int

from xattn.backend import decay
from xattn.backend.blockwise import blockwise
from xattn.backend.formula import F32
from xattn.backend.mesh import CONTEXT, SEQUENCE_SPLIT, context_devices, on_each, split_by_sequence
from xattn.backend.rope import rotate
from xattn.backend.spec import AttentionSpec, Keys, Output, Queries, Values, prepare, product, spec_tables

State = Float[Array, "B NKV DHQK DHV"]
"""Always float32 when returned."""


@dataclass(frozen=True)
class Chunks:
    """How the sequence is cut. It affects the result through rounding only."""

    size: int = 64
    """Tokens per chunk, T."""
    concurrent: int = 1
    """Chunks computed together in one step of the loop over the sequence."""

    @classmethod
    def of_platform(cls) -> Chunks:
        """Choose one chunk at a time on a CPU, where it fits into the cache, and many to fill an accelerator."""
        return cls(concurrent=1 if jax.default_backend() == "cpu" else 32)


class Documents(NamedTuple):
    """The document of each token. A document is a run of tokens with the same segment id."""

    runs: Int[Array, "B S"]
    """Index of the token's document, from 0."""
    previous: Int[Array, "B S"]
    """Index of the preceding token's document. The first token has its own, so a state from before the call counts."""


class Stretch(NamedTuple):
    """The place of some tokens in their sequence."""

    documents: Documents | None
    """Those of the tokens' segment_ids; None if there are none."""
    before: State
    """The state before the first token, unrotated: its keys are R(s) k_s."""
    first: Array | None = None
    """Position of the first token; None means 0, which is then static."""


def documents(spec: AttentionSpec) -> Documents | None:
    """Return the documents, given that no segment id comes back after another; None without segment ids."""
    if (ids := spec.segment_ids) is None:
        return None
    begins = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    runs = jnp.cumsum(begins, axis=1, dtype=jnp.int32)
    return Documents(runs, runs - begins.astype(jnp.int32))


def linear(q: Queries, k: Keys, v: Values, spec: AttentionSpec, chunks: Chunks | None = None) -> Output:
    """Compute :func:`xattn.backend.reference.reference` for ``none``, without a window or a given mask.

    If the active mesh splits the sequence, each device computes its own stretch. The devices exchange states only, no
    keys or values. A state can't handle a segment id that comes back after another, since it has dropped the earlier
    segment. Unless the spec rules that out, the ids are checked at run time, and
    :func:`xattn.backend.blockwise.blockwise` takes over if one comes back. ``chunks`` None suits the platform.
    """
    _check(spec)
    chunks = chunks or Chunks.of_platform()
    known = documents(spec)
    if spec.segment_ids is None or known is None or spec.segments_are_runs:
        return _in_runs(q, k, v, spec, known, chunks)
    ordered = jnp.sort(spec.segment_ids, axis=1)
    segments = 1 + jnp.sum(ordered[:, 1:] != ordered[:, :-1], axis=1, dtype=jnp.int32)
    return jax.lax.cond(
        jnp.any(segments != known.runs[:, -1] + 1),
        lambda q, k, v, spec, known: blockwise(q, k, v, spec),
        lambda q, k, v, spec, known: _in_runs(q, k, v, spec, known, chunks),
        *(q, k, v, spec, known),
    )


def _in_runs(
    q: Queries, k: Keys, v: Values, spec: AttentionSpec, documents: Documents | None, chunks: Chunks
) -> Output:
    """Compute :func:`linear`, given that no segment id comes back after another."""
    devices = context_devices()
    if devices == 1 or q.shape[2] % devices:
        zeros = jnp.zeros((*k.shape[:2], k.shape[-1], v.shape[-1]), F32)
        return chunked(q, k, v, spec, Stretch(documents, zeros), chunks)[0]
    places = split_by_sequence(spec)
    of_documents = None if documents is None else Documents(places.segment_ids, places.segment_ids)
    states = on_each(
        _state_of_device, in_specs=(SEQUENCE_SPLIT, SEQUENCE_SPLIT, places, of_documents), out_specs=P(CONTEXT)
    )(k, v, spec, documents)
    # Sum outside of shard_map, so that batch and heads keep their sharding.
    earlier = _earlier(devices, spec, documents)
    what = "mn,nbkde->mbkde" if earlier.ndim == 2 else "bkmn,nbkde->mbkde"
    before = jnp.einsum(what, earlier, states, precision=jax.lax.Precision.HIGHEST)
    run = on_each(
        lambda index, q, k, v, spec, documents, before: chunked(
            q, k, v, spec, Stretch(documents, before[0], index * q.shape[2]), chunks
        )[0],
        in_specs=(*[SEQUENCE_SPLIT] * 3, places, of_documents, P(CONTEXT)),
        out_specs=SEQUENCE_SPLIT,
    )
    return run(q, k, v, spec, documents, before)


def _earlier(
    devices: int, spec: AttentionSpec, documents: Documents | None
) -> Float32[Array, "*B_NKV devices devices"]:
    """Return (m, n): the factor left of device n's state at the head of device m; 0 unless n comes before m."""
    earlier = jnp.tri(devices, k=-1, dtype=F32)
    if spec.log_decay is not None:
        whole = jnp.sum(spec.log_decay.reshape(*spec.log_decay.shape[:2], devices, -1), axis=-1)
        earlier = earlier[None, None] * jnp.exp(decay.sums(whole, jnp.arange(devices) - 1))
    if documents is not None:
        runs, previous = (x.reshape(x.shape[0], devices, -1) for x in documents)
        goes_on = previous[:, :, None, 0] == runs[:, None, :, -1]
        earlier = jnp.where(goes_on[:, None], earlier if earlier.ndim == 4 else earlier[None, None], 0)
    return earlier


@jax.checkpoint
def _state_of_device(index: Array, k: Array, v: Array, spec: AttentionSpec, documents: Documents | None) -> Array:
    """Return what the device's stretch, with keys R(s) k_s, adds to the state at its end, (1, B, NKV, DHQK, DHV)."""
    _, rotated_k = prepare(k, k, spec, index * k.shape[2])
    left = _left_of(_PerToken.of(spec, documents, lambda x, **_: x))
    rotated_k = rotated_k if left is None else (rotated_k.astype(F32) * left[..., None]).astype(k.dtype)
    return product("bksd,bkse->bkde", rotated_k, v)[None] / math.sqrt(k.shape[-1])


def linear_with_state(
    q: Queries, k: Keys, v: Values, spec: AttentionSpec, initial: State | None, chunks: Chunks | None = None
) -> tuple[Output, State]:
    """Compute :func:`linear` from an initial state, and also return the final state; ``initial`` None is 0.

    A state is c = Σ_s i_s e^{Σ_{r>s} ℓ_r} R(s − S) k_s v_sᵀ / √DHQK over the S tokens seen. The keys are rotated back
    by S positions, so the next call, with positions from 0 again, continues exactly. Splitting a sequence at any point
    gives the same result. With several documents, the state holds only the last. The backward pass keeps only the
    arguments and recomputes everything else.
    """
    _check(spec)
    if initial is None:
        initial = jnp.zeros((*k.shape[:2], k.shape[-1], v.shape[-1]), F32)
    stretch = Stretch(documents(spec), initial.astype(F32))
    out, state = chunked(q, k, v, spec, stretch, chunks or Chunks.of_platform())
    sin, cos = spec_tables(jnp.array([-q.shape[2]]), q.shape[-1], spec)
    return out, rotate(state.swapaxes(-1, -2), sin, cos).swapaxes(-1, -2)


def _check(spec: AttentionSpec) -> None:
    assert spec.activation.is_linear
    assert spec.mask is None
    assert spec.window is None


class _PerToken(NamedTuple):
    """Per-token arrays of some chunks, other than q, k and v. The last axis counts the tokens of a chunk."""

    log_decay: Float32[Array, "B NKV *n T"] | None
    log_input_gate: Float32[Array, "B NKV *n T"] | None
    runs: Int[Array, "B 1 *n T"] | None
    previous: Int[Array, "B 1 *n T"] | None

    @classmethod
    def of(cls, spec: AttentionSpec, documents: Documents | None, cut: Callable[..., Array]) -> _PerToken:
        """Cut the arrays with ``cut``, (B, NKV or 1, S) → chunks. Padding is 0, or repeats the last document."""
        arrays = (None, None) if documents is None else tuple(x[:, None] for x in documents)
        logs = (None if x is None else cut(x) for x in (spec.log_decay, spec.log_input_gate))
        return cls(*logs, *(None if x is None else cut(x, mode="edge") for x in arrays))


def _left_of(of: _PerToken) -> Float32[Array, "B NKV *n T"] | None:
    """Return the factor on a token's k vᵀ at the chunk's end: i_s e^{Σ_{r>s} ℓ_r}, or 0 if a document starts later."""
    exponents = [decay.exclusive_to_end(of.log_decay)] if of.log_decay is not None else []
    exponents += [of.log_input_gate] if of.log_input_gate is not None else []
    left = jnp.exp(sum(exponents)) if exponents else None
    if of.runs is None:
        return left
    return jnp.where(of.runs == of.runs[..., -1:], jnp.float32(1) if left is None else left, 0)


def _weighted(weights: Array, of: _PerToken) -> Float32[Array, "B NKV G n T T"]:
    """Return A_ts e^{E_ts} within a chunk, for s ≤ t; 0 where a document begins between s and t."""
    if of.log_decay is not None or of.log_input_gate is not None:
        exponent = jnp.float32(0)
        if of.log_decay is not None:
            sums = jax.lax.cumsum(of.log_decay, axis=3)
            exponent = sums[..., :, None] - sums[..., None, :]
            # Rounding may leave it slightly above 0. jnp.minimum would halve the gradient where nothing decays.
            exponent = exponent - jax.lax.stop_gradient(jnp.maximum(exponent, 0))
        if of.log_input_gate is not None:
            exponent = exponent + of.log_input_gate[..., None, :]
        weights = weights * jnp.exp(exponent)[:, :, None]
    if of.runs is not None:
        same = of.runs[..., :, None] == of.runs[..., None, :]
        weights = jnp.where(same[:, :, None], weights, 0)
    return weights


def _from_before(of: _PerToken) -> tuple[Array, Array] | None:
    """Return the factor left of the state before a chunk: at each token (B, NKV, n, T) and at its end (B, NKV, n)."""
    if of.log_decay is None and of.runs is None:
        return None
    left = jnp.float32(1) if of.log_decay is None else jnp.exp(jax.lax.cumsum(of.log_decay, axis=3))
    if of.runs is not None:
        assert of.previous is not None
        left = jnp.where(of.runs == of.previous[..., :1], left, 0)
    return left, left[..., -1]


# The backward keeps nothing of the forward. Each scan step is checkpointed as well, so the recomputation stores one
# state per step and no weights.
@partial(jax.checkpoint, static_argnums=5)
def chunked(
    q: Queries, k: Keys, v: Values, spec: AttentionSpec, stretch: Stretch, chunks: Chunks
) -> tuple[Output, State]:
    """Compute :func:`linear_with_state` for a stretch of the sequence; the final state is unrotated as well."""
    length, kv_heads = k.shape[2], k.shape[1]
    chunk = min(chunks.size, length)
    concurrent = min(chunks.concurrent, -(-length // chunk))
    scale = 1 / math.sqrt(q.shape[-1])
    # A state grows with the sequence and may exceed float16's range (65504) where the output does not.
    past = F32 if v.dtype == jnp.float16 else v.dtype

    def cut(x: Array, **mode: Any) -> Array:
        # (steps, B, heads, N, T, …), padded with zeros: a zero key adds nothing to any sum.
        filling = [(0, 0)] * x.ndim
        filling[2] = (0, -length % (concurrent * chunk))
        x = jnp.pad(x, filling, **mode)
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, concurrent, chunk, *x.shape[3:]), 2, 0)

    def step(state: Array, arrays: tuple[Any, ...]) -> tuple[Array, Array]:
        q, k, v, of = arrays
        q = q.reshape(q.shape[0], kv_heads, -1, *q.shape[2:])
        causal = jnp.broadcast_to(jnp.tri(chunk, dtype=bool), (*q.shape[:-1], chunk))
        weights = jnp.where(causal, _weighted(product("bkgntd,bknsd->bkgnts", q, k) * scale, of), 0)
        left, carried = _left_of(of), _from_before(of)
        added = k if left is None else (k.astype(F32) * left[..., None]).astype(k.dtype)
        own = product("bknsd,bknse->bknde", added, v) * scale
        before, after = _states(state, own, None if carried is None else carried[1])
        out = product("bkgnts,bknse->bkgnte", weights.astype(v.dtype), v)
        past_out = product("bkgntd,bknde->bkgnte", q.astype(past), before.astype(past))
        out += past_out if carried is None else past_out * carried[0][:, :, None, ..., None]
        return after[:, :, -1], out.reshape(q.shape[0], -1, *out.shape[3:]).astype(v.dtype)

    rotated_q, rotated_k = prepare(q, k, spec, 0 if stretch.first is None else stretch.first)
    arrays = (cut(rotated_q), cut(rotated_k), cut(v), _PerToken.of(spec, stretch.documents, cut))
    state, out = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), stretch.before, arrays)
    return jnp.moveaxis(out, 0, 2).reshape(*q.shape[:2], -1, v.shape[-1])[:, :, :length], state


def _states(state: State, own: Array, kept: Float32[Array, "B NKV n"] | None) -> tuple[Array, Array]:
    """Return the states before and after each chunk, from what each adds and the factor it keeps; chunks are axis 2."""
    if kept is None:
        after = jnp.cumsum(own, axis=2) + state[:, :, None]
    else:

        def then(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
            return a[0] * b[0], a[1] * b[0] + b[1]

        kept, sums = jax.lax.associative_scan(then, (kept[..., None, None], own), axis=2)
        after = sums + kept * state[:, :, None]
    return jnp.concatenate([state[:, :, None], after[:, :, :-1]], axis=2), after
