"""``none`` in linear time: attention without a normaliser is a sum of outer products, and may be summed chunk by chunk.

With rotated q and k, out_t = q_t · C_t and C_t = Σ_{s≤t} k_s v_sᵀ / √DHQK, exactly. Inside a chunk of T tokens the T×T
weights are formed as in the reference; what lies before the chunk arrives as one DHQK×DHV state. Time and memory are
linear in S: O(S · (T + DHQK) · DHV) and O(S · (DHQK + DHV)).

Shape letters: B batch, NH heads, NKV key/value heads, G = NH / NKV, S sequence, N chunks at once, T tokens a chunk,
DHQK query/key head width, DHV value head width. In einsum: b, k, g, n, t or s, d, e.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from xattn.backend.mesh import CONTEXT, SEQUENCE_SPLIT, context_devices, on_each
from xattn.backend.rope import rotary_tables, rotate
from xattn.backend.spec import AttentionSpec, prepare, product

F32 = jnp.float32


@dataclass(frozen=True)
class Tuning:
    """How the work is cut; the result depends on it by rounding only."""

    chunk: int = 64
    """Tokens a chunk, T."""
    concurrent: int = 1
    """Chunks at once, N. The steps of the loop over the sequence are S / (T · N)."""

    @classmethod
    def of_platform(cls) -> Tuning:
        """One chunk at once stays in a CPU's cache; many fill an accelerator."""
        return cls(concurrent=1 if jax.default_backend() == "cpu" else 32)


def linear(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, tuning: Tuning | None = None) -> jax.Array:
    """:func:`xattn.backend.reference.reference` for ``none``, causal, without window, segments or a given mask.

    Where the mesh that is set splits the sequence, each device computes its stretch; what stands before it arrives as
    the other devices' states, and no key or value travels.
    """
    devices = context_devices()
    if devices == 1 or q.shape[2] % devices:
        return linear_with_state(q, k, v, spec, None, tuning)[0]
    _check(spec)
    places = replace(spec, theta=P())  # type: ignore[arg-type]
    states = on_each(_state_of_device, in_specs=(SEQUENCE_SPLIT, SEQUENCE_SPLIT, places), out_specs=P(CONTEXT))(
        k, v, spec
    )
    # Summed outside of what is split by hand, so that rows and heads stay split as they are.
    earlier = _earlier(devices)
    before = jnp.einsum("mn,nbkde->mbkde", earlier, states, precision=jax.lax.Precision.HIGHEST)
    run = on_each(
        partial(_output_of_device, tuning=tuning or Tuning.of_platform()),
        in_specs=(*[SEQUENCE_SPLIT] * 3, places, P(CONTEXT)),
        out_specs=SEQUENCE_SPLIT,
    )
    return run(q, k, v, spec, before)


def _earlier(devices: int) -> jax.Array:
    """1 where device n stands before device m: (m, n)."""
    return jnp.tri(devices, k=-1, dtype=F32)


@jax.checkpoint
def _state_of_device(index: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Σ_s R(s) k_s v_sᵀ / √DHQK over the device's own stretch, (1, B, NKV, DHQK, DHV)."""
    _, rotated_k = prepare(k, k, spec, index * k.shape[2])
    return product("bksd,bkse->bkde", rotated_k, v)[None] / math.sqrt(k.shape[-1])


def _output_of_device(
    index: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: AttentionSpec,
    before: jax.Array,
    *,
    tuning: Tuning,
) -> jax.Array:
    """Of the device's own stretch, after the state ``before`` (1, B, NKV, DHQK, DHV)."""
    return chunked(q, k, v, spec, before[0], tuning, index * q.shape[2])[0]


def linear_with_state(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: AttentionSpec,
    initial: jax.Array | None,
    tuning: Tuning | None = None,
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
        tuning: how the work is cut; None is what suits the platform.

    Returns:
        out (B, NH, S, DHV) in v's dtype, and the state (B, NKV, DHQK, DHV), float32. For the backward only the
        arguments are kept; everything else is recomputed.
    """
    _check(spec)
    if initial is None:
        initial = jnp.zeros((*k.shape[:2], k.shape[-1], v.shape[-1]), F32)
    out, state = chunked(q, k, v, spec, initial.astype(F32), tuning or Tuning.of_platform())
    sin, cos = rotary_tables(jnp.array([-q.shape[2]]), q.shape[-1], spec.theta)
    return out, rotate(state.swapaxes(-1, -2), sin, cos).swapaxes(-1, -2)


def _check(spec: AttentionSpec) -> None:
    assert spec.activation.is_linear
    assert spec.mask is None
    assert spec.window is None
    assert spec.segment_ids is None


# Nothing of the forward is kept for the backward: inside, each step is checkpointed too, so that computing it again
# keeps a state a step and no weights.
@partial(jax.checkpoint, static_argnums=5)
def chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: AttentionSpec,
    initial: jax.Array,
    tuning: Tuning,
    first: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """As :func:`linear_with_state`, but the states have their keys where they are: Σ_s R(s) k_s v_sᵀ / √DHQK.

    first: the position of the first token.
    """
    length, kv_heads = k.shape[2], k.shape[1]
    chunk = min(tuning.chunk, length)
    concurrent = min(tuning.concurrent, -(-length // chunk))
    scale = 1 / math.sqrt(q.shape[-1])
    # A state grows with the sequence: what float16 can't hold (65504) is not what the output can't.
    past = F32 if v.dtype == jnp.float16 else v.dtype

    def cut(x: jax.Array) -> jax.Array:
        # (steps, B, heads, N, T, ·), filled with zeros: a key of zeros adds nothing to any sum.
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -length % (concurrent * chunk)), (0, 0)))
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, concurrent, chunk, x.shape[-1]), 2, 0)

    def step(state: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
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


def _states(state: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The states before and after each chunk, (B, NKV, N, DHQK, DHV), from what each chunk adds."""
    after = jnp.cumsum(own, axis=2) + state[:, :, None]
    return jnp.concatenate([state[:, :, None], after[:, :, :-1]], axis=2), after
