"""``none`` in linear time: attention without a normaliser is a sum of outer products, and may be summed chunk by chunk.

With rotated q and k, out_t = q_t · C_t and C_t = e^{ℓ_t} C_{t−1} + i_t k_t v_tᵀ / √DHQK, exactly; ℓ = 0 without decay
and i = 1 without gate. Inside a chunk of T tokens the T×T weights are formed as in the reference; what lies before the
chunk arrives as one DHQK×DHV state. Every exponent is a sum of ℓ that starts at the chunk's head. Where a document
begins the state counts for nothing. Time and memory are linear in S: O(S · (T + DHQK) · DHV) and O(S · (DHQK + DHV)).

In einsum: b B, k NKV, g G, n chunks at once, t and s tokens of a chunk, d DHQK, e DHV.
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
"""Float32 where it is returned."""


@dataclass(frozen=True)
class Tuning:
    """How the work is cut; the result depends on it by rounding only."""

    chunk: int = 64
    """Tokens a chunk, T."""
    concurrent: int = 1
    """Chunks computed together in one step of the loop over the sequence."""

    @classmethod
    def of_platform(cls) -> Tuning:
        """One chunk stays in a CPU's cache; many together fill an accelerator."""
        return cls(concurrent=1 if jax.default_backend() == "cpu" else 32)


class Documents(NamedTuple):
    """Where documents begin: a document is a run of tokens with one segment id."""

    runs: Int[Array, "B S"]
    """The number of the token's document, counted from 0."""
    previous: Int[Array, "B S"]
    """That of the token before it; of the first token its own, so that a state from before the call counts."""


def documents(segment_ids: Int[Array, "B S"]) -> Documents:
    """The documents of segments of which none comes back after another."""
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    runs = jnp.cumsum(begins, axis=1, dtype=jnp.int32)
    return Documents(runs, runs - begins.astype(jnp.int32))


def linear(q: Queries, k: Keys, v: Values, spec: AttentionSpec, tuning: Tuning | None = None) -> Output:
    """:func:`xattn.backend.reference.reference` for ``none``, without window or a given mask.

    Where the mesh that is set splits the sequence, each device computes its own stretch. What comes before it arrives
    as the other devices' states; no key or value travels. A segment id that comes back after another is beyond a sum
    that has forgotten it: where the spec doesn't know that none does, the ids are looked at, and if one does
    :func:`xattn.backend.blockwise.blockwise` computes the call. tuning: None is what suits the platform.
    """
    _check(spec)
    tuning = tuning or Tuning.of_platform()
    if spec.segment_ids is None:
        return _in_runs(q, k, v, spec, None, tuning)
    known = documents(spec.segment_ids)
    if spec.segments_are_runs:
        return _in_runs(q, k, v, spec, known, tuning)
    return jax.lax.cond(
        jnp.any(_number_of_segments(spec.segment_ids) != known.runs[:, -1] + 1),
        lambda q, k, v, spec, known: blockwise(q, k, v, spec),
        lambda q, k, v, spec, known: _in_runs(q, k, v, spec, known, tuning),
        *(q, k, v, spec, known),
    )


def _number_of_segments(segment_ids: Int[Array, "B S"]) -> Int[Array, " B"]:
    ordered = jnp.sort(segment_ids, axis=1)
    return 1 + jnp.sum(ordered[:, 1:] != ordered[:, :-1], axis=1, dtype=jnp.int32)


def _in_runs(
    q: Queries, k: Keys, v: Values, spec: AttentionSpec, documents: Documents | None, tuning: Tuning
) -> Output:
    """:func:`linear` of documents that don't come back."""
    devices = context_devices()
    if devices == 1 or q.shape[2] % devices:
        zeros = jnp.zeros((*k.shape[:2], k.shape[-1], v.shape[-1]), F32)
        return chunked(q, k, v, spec, documents, zeros, tuning)[0]
    places = split_by_sequence(spec)
    of_documents = None if documents is None else Documents(places.segment_ids, places.segment_ids)
    states = on_each(
        _state_of_device, in_specs=(SEQUENCE_SPLIT, SEQUENCE_SPLIT, places, of_documents), out_specs=P(CONTEXT)
    )(k, v, spec, documents)
    # Summed outside of what is split by hand, so that rows and heads stay split as they are.
    earlier = _earlier(devices, spec, documents)
    what = "mn,nbkde->mbkde" if earlier.ndim == 2 else "bkmn,nbkde->mbkde"
    before = jnp.einsum(what, earlier, states, precision=jax.lax.Precision.HIGHEST)
    run = on_each(
        lambda index, q, k, v, spec, documents, before: chunked(
            q, k, v, spec, documents, before[0], tuning, index * q.shape[2]
        )[0],
        in_specs=(*[SEQUENCE_SPLIT] * 3, places, of_documents, P(CONTEXT)),
        out_specs=SEQUENCE_SPLIT,
    )
    return run(q, k, v, spec, documents, before)


def _earlier(
    devices: int, spec: AttentionSpec, documents: Documents | None
) -> Float32[Array, "*B_NKV devices devices"]:
    """(m, n): what is left, at the head of device m, of device n's state; 0 where n does not come before m."""
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
    """What the device's own stretch adds to the state at its end, (1, B, NKV, DHQK, DHV), keys rotated as they are."""
    _, rotated_k = prepare(k, k, spec, index * k.shape[2])
    left = _left_of(_Chunks.of(spec, documents, lambda x, **_: x))
    rotated_k = rotated_k if left is None else (rotated_k.astype(F32) * left[..., None]).astype(k.dtype)
    return product("bksd,bkse->bkde", rotated_k, v)[None] / math.sqrt(k.shape[-1])


def linear_with_state(
    q: Queries, k: Keys, v: Values, spec: AttentionSpec, initial: State | None, tuning: Tuning | None = None
) -> tuple[Output, State]:
    """As :func:`linear`, but continues from a state and returns the last; ``initial`` None is 0.

    A state is c = Σ_s i_s e^{Σ_{r>s} ℓ_r} R(s − S) k_s v_sᵀ / √DHQK over the S tokens seen: their keys are rotated back
    by S positions, so that the next call, whose positions begin at 0 again, continues exactly. Two halves equal the
    whole at any cut. Of several documents only the last is in it. The backward keeps only the arguments and recomputes
    everything else.
    """
    _check(spec)
    if initial is None:
        initial = jnp.zeros((*k.shape[:2], k.shape[-1], v.shape[-1]), F32)
    known = None if spec.segment_ids is None else documents(spec.segment_ids)
    out, state = chunked(q, k, v, spec, known, initial.astype(F32), tuning or Tuning.of_platform())
    sin, cos = spec_tables(jnp.array([-q.shape[2]]), q.shape[-1], spec)
    return out, rotate(state.swapaxes(-1, -2), sin, cos).swapaxes(-1, -2)


def _check(spec: AttentionSpec) -> None:
    assert spec.activation.is_linear
    assert spec.mask is None
    assert spec.window is None


class _Chunks(NamedTuple):
    """What belongs to the tokens of some chunks besides q, k and v; the tokens of a chunk are the last axis."""

    log_decay: Float32[Array, "B NKV *n T"] | None
    log_input_gate: Float32[Array, "B NKV *n T"] | None
    runs: Int[Array, "B 1 *n T"] | None
    previous: Int[Array, "B 1 *n T"] | None

    @classmethod
    def of(cls, spec: AttentionSpec, documents: Documents | None, cut: Callable[..., Array]) -> _Chunks:
        """cut: (B, NKV or 1, S) → the chunks that are asked for; what fills the last one is 0, or its last number."""
        arrays = (None, None) if documents is None else tuple(x[:, None] for x in documents)
        logs = (None if x is None else cut(x) for x in (spec.log_decay, spec.log_input_gate))
        return cls(*logs, *(None if x is None else cut(x, mode="edge") for x in arrays))


def _left_of(of: _Chunks) -> Float32[Array, "B NKV *n T"] | None:
    """What is left of a token's k vᵀ at the end of its chunk: i_s e^{Σ_{r>s} ℓ_r}, 0 if a document begins after it."""
    exponents = [decay.exclusive_to_end(of.log_decay)] if of.log_decay is not None else []
    exponents += [of.log_input_gate] if of.log_input_gate is not None else []
    left = jnp.exp(sum(exponents)) if exponents else None
    if of.runs is None:
        return left
    return jnp.where(of.runs == of.runs[..., -1:], jnp.float32(1) if left is None else left, 0)


def _weighted(weights: Array, of: _Chunks) -> Float32[Array, "B NKV G n T T"]:
    """A_ts e^{E_ts} within a chunk, 0 where a document begins between s and t; s ≤ t."""
    if of.log_decay is not None or of.log_input_gate is not None:
        exponent = jnp.float32(0)
        if of.log_decay is not None:
            sums = jax.lax.cumsum(of.log_decay, axis=3)
            exponent = sums[..., :, None] - sums[..., None, :]
            # Rounding may leave it a little above 0. A minimum would halve the gradient where nothing decays.
            exponent = exponent - jax.lax.stop_gradient(jnp.maximum(exponent, 0))
        if of.log_input_gate is not None:
            exponent = exponent + of.log_input_gate[..., None, :]
        weights = weights * jnp.exp(exponent)[:, :, None]
    if of.runs is not None:
        same = of.runs[..., :, None] == of.runs[..., None, :]
        weights = jnp.where(same[:, :, None], weights, 0)
    return weights


def _from_before(of: _Chunks) -> tuple[Array, Array] | None:
    """What is left of the state before a chunk, at each of its tokens (B, NKV, n, T), and after it (B, NKV, n)."""
    if of.log_decay is None and of.runs is None:
        return None
    left = jnp.float32(1) if of.log_decay is None else jnp.exp(jax.lax.cumsum(of.log_decay, axis=3))
    if of.runs is not None:
        assert of.previous is not None
        left = jnp.where(of.runs == of.previous[..., :1], left, 0)
    return left, left[..., -1]


# The backward keeps nothing of the forward. Each step inside is checkpointed too, so that computing it again keeps a
# state a step and no weights.
@partial(jax.checkpoint, static_argnums=6)
def chunked(
    q: Queries,
    k: Keys,
    v: Values,
    spec: AttentionSpec,
    documents: Documents | None,
    initial: State,
    tuning: Tuning,
    first: Array | int = 0,
) -> tuple[Output, State]:
    """As :func:`linear_with_state`, from position ``first`` on; the state is not rotated back: its keys are R(s) k_s.

    documents: those of the spec's segment_ids, or None where it has none.
    """
    length, kv_heads = k.shape[2], k.shape[1]
    chunk = min(tuning.chunk, length)
    concurrent = min(tuning.concurrent, -(-length // chunk))
    scale = 1 / math.sqrt(q.shape[-1])
    # A state grows with the sequence: what float16 can't hold (65504) is not what the output can't.
    past = F32 if v.dtype == jnp.float16 else v.dtype

    def cut(x: Array, **mode: Any) -> Array:
        # (steps, B, heads, N, T, …), filled with zeros: a key of zeros adds nothing to any sum.
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

    rotated_q, rotated_k = prepare(q, k, spec, first)
    arrays = (cut(rotated_q), cut(rotated_k), cut(v), _Chunks.of(spec, documents, cut))
    state, out = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), initial, arrays)
    return jnp.moveaxis(out, 0, 2).reshape(*q.shape[:2], -1, v.shape[-1])[:, :, :length], state


def _states(state: State, own: Array, kept: Float32[Array, "B NKV n"] | None) -> tuple[Array, Array]:
    """The states before and after each chunk, from what each adds and how much it keeps; the chunks are axis 2."""
    if kept is None:
        after = jnp.cumsum(own, axis=2) + state[:, :, None]
    else:

        def then(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
            return a[0] * b[0], a[1] * b[0] + b[1]

        kept, sums = jax.lax.associative_scan(then, (kept[..., None, None], own), axis=2)
        after = sums + kept * state[:, :, None]
    return jnp.concatenate([state[:, :, None], after[:, :, :-1]], axis=2), after
