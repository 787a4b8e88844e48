"""``none`` in linear time: attention without a normaliser is a sum of outer products, and may be summed chunk by chunk.

With rotated q and k, out_t = q_t · C_t and C_t = Σ_{s≤t} k_s v_sᵀ / √DHQK, exactly. Inside a chunk of T tokens the T×T
weights are formed as in the reference; what lies before the chunk arrives as one DHQK×DHV state. Time and memory are
linear in S: O(S · (T + DHQK) · DHV) and O(S · (DHQK + DHV)).

In einsum: b B, k NKV, g G, n chunks at once, t and s tokens of a chunk, d DHQK, e DHV.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from xattn.backend.formula import F32
from xattn.backend.mesh import CONTEXT, SEQUENCE_SPLIT, context_devices, on_each
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


def linear(q: Queries, k: Keys, v: Values, spec: AttentionSpec, tuning: Tuning | None = None) -> Output:
    """:func:`xattn.backend.reference.reference` for ``none``, causal, without window, segments or a given mask.

    Where the mesh that is set splits the sequence, each device computes its own stretch. What comes before it arrives
    as the other devices' states; no key or value travels. tuning: None is what suits the platform.
    """
    tuning, devices = tuning or Tuning.of_platform(), context_devices()
    if devices == 1 or q.shape[2] % devices:
        return linear_with_state(q, k, v, spec, None, tuning)[0]
    _check(spec)
    places = replace(spec, theta=P(), logit_scale=P())  # type: ignore[arg-type]
    states = on_each(_state_of_device, in_specs=(SEQUENCE_SPLIT, SEQUENCE_SPLIT, places), out_specs=P(CONTEXT))(
        k, v, spec
    )
    # Summed outside of what is split by hand, so that rows and heads stay split as they are.
    earlier = _earlier(devices)
    before = jnp.einsum("mn,nbkde->mbkde", earlier, states, precision=jax.lax.Precision.HIGHEST)
    run = on_each(
        lambda index, q, k, v, spec, before: chunked(q, k, v, spec, before[0], tuning, index * q.shape[2])[0],
        in_specs=(*[SEQUENCE_SPLIT] * 3, places, P(CONTEXT)),
        out_specs=SEQUENCE_SPLIT,
    )
    return run(q, k, v, spec, before)


def _earlier(devices: int) -> Array:
    """(m, n): 1 where device n comes before device m."""
    return jnp.tri(devices, k=-1, dtype=F32)


@jax.checkpoint
def _state_of_device(index: Array, k: Array, v: Array, spec: AttentionSpec) -> Array:
    """Σ_s R(s) k_s v_sᵀ / √DHQK over the device's own stretch, (1, B, NKV, DHQK, DHV)."""
    _, rotated_k = prepare(k, k, spec, index * k.shape[2])
    return product("bksd,bkse->bkde", rotated_k, v)[None] / math.sqrt(k.shape[-1])


def linear_with_state(
    q: Queries, k: Keys, v: Values, spec: AttentionSpec, initial: State | None, tuning: Tuning | None = None
) -> tuple[Output, State]:
    """As :func:`linear`, but continues from a state and returns the last; ``initial`` None is 0.

    A state is c = Σ_s R(s − S) k_s v_sᵀ / √DHQK over the S tokens seen: their keys are rotated back by S positions, so
    that the next call, whose positions begin at 0 again, continues exactly. Two halves equal the whole at any cut.
    The backward keeps only the arguments and recomputes everything else.
    """
    _check(spec)
    if initial is None:
        initial = jnp.zeros((*k.shape[:2], k.shape[-1], v.shape[-1]), F32)
    out, state = chunked(q, k, v, spec, initial.astype(F32), tuning or Tuning.of_platform())
    sin, cos = spec_tables(jnp.array([-q.shape[2]]), q.shape[-1], spec)
    return out, rotate(state.swapaxes(-1, -2), sin, cos).swapaxes(-1, -2)


def _check(spec: AttentionSpec) -> None:
    assert spec.activation.is_linear
    assert spec.mask is None
    assert spec.window is None
    assert spec.segment_ids is None


# The backward keeps nothing of the forward. Each step inside is checkpointed too, so that computing it again keeps a
# state a step and no weights.
@partial(jax.checkpoint, static_argnums=5)
def chunked(
    q: Queries, k: Keys, v: Values, spec: AttentionSpec, initial: State, tuning: Tuning, first: Array | int = 0
) -> tuple[Output, State]:
    """As :func:`linear_with_state`, from position ``first`` on and without rotating back: Σ_s R(s) k_s v_sᵀ / √DHQK."""
    length, kv_heads = k.shape[2], k.shape[1]
    chunk = min(tuning.chunk, length)
    concurrent = min(tuning.concurrent, -(-length // chunk))
    scale = 1 / math.sqrt(q.shape[-1])
    # A state grows with the sequence: what float16 can't hold (65504) is not what the output can't.
    past = F32 if v.dtype == jnp.float16 else v.dtype

    def cut(x: Array) -> Array:
        # (steps, B, heads, N, T, ·), filled with zeros: a key of zeros adds nothing to any sum.
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -length % (concurrent * chunk)), (0, 0)))
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, concurrent, chunk, x.shape[-1]), 2, 0)

    def step(state: Array, arrays: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v = arrays
        q = q.reshape(q.shape[0], kv_heads, -1, *q.shape[2:])
        causal = jnp.broadcast_to(jnp.tri(chunk, dtype=bool), (*q.shape[:-1], chunk))
        weights = jnp.where(causal, product("bkgntd,bknsd->bkgnts", q, k) * scale, 0)
        before, after = _states(state, product("bknsd,bknse->bknde", k, v) * scale)
        out = product("bkgnts,bknse->bkgnte", weights.astype(v.dtype), v)
        out += product("bkgntd,bknde->bkgnte", q.astype(past), before.astype(past))
        return after[:, :, -1], out.reshape(q.shape[0], -1, *out.shape[3:]).astype(v.dtype)

    rotated_q, rotated_k = prepare(q, k, spec, first)
    arrays = (cut(rotated_q), cut(rotated_k), cut(v))
    state, out = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), initial, arrays)
    return jnp.moveaxis(out, 0, 2).reshape(*q.shape[:2], -1, v.shape[-1])[:, :, :length], state


def _states(state: State, own: Array) -> tuple[Array, Array]:
    """The states before and after each chunk, from what each chunk adds; the chunks are axis 2."""
    after = jnp.cumsum(own, axis=2) + state[:, :, None]
    return jnp.concatenate([state[:, :, None], after[:, :, :-1]], axis=2), after
