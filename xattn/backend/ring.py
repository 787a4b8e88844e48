"""A sequence over several devices: keys and values go round the mesh's context axis, and none is ever gathered.

Each of n devices holds S/n queries, keys and values. It attends to its own keys, passes them to the next device,
attends to those that it received, and so on (Ring Attention, Liu et al., arXiv 2310.01889). Within a stretch of keys
this is :mod:`xattn.backend.blockwise`, and :mod:`xattn.backend.formula` joins the results. A stretch that comes after
its queries costs no product. In the backward the gradients of keys and values travel with them, and end up at home.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from xattn.backend import formula
from xattn.backend.blockwise import Gradients, Passes, Tuning, backward_tiles, blockwise, forward_tiles, prepared
from xattn.backend.formula import F32, LOWEST, Results
from xattn.backend.mesh import CONTEXT, SEQUENCE_SPLIT, context_devices, on_each
from xattn.backend.spec import AttentionSpec, Keys, Output, Queries, Values

_GROUPED = P(None, None, None, CONTEXT)


def ring(q: Queries, k: Keys, v: Values, spec: AttentionSpec, tuning: Tuning | None = None) -> Output:
    """:func:`xattn.backend.reference.reference` without a given mask, in O(S/n) memory a device.

    The mesh is the one that is set; S is a multiple of its context axis n. Where it has none, n = 1, this is
    :func:`xattn.backend.blockwise.blockwise`. A device sends (n − 1)/n of all K and V in the forward and again in the
    backward, and their gradients in float32; with a window, only as far as that reaches.
    """
    assert spec.mask is None
    tuning = tuning or Tuning()
    if context_devices() == 1:
        return blockwise(q, k, v, spec, tuning)
    assert q.shape[2] % context_devices() == 0
    return prepared(q, k, v, spec, Passes(_forward, _backward, tuning))


def _forward(q: Array, k: Array, v: Array, spec: AttentionSpec, tuning: Tuning) -> Results:
    """On all devices of the axis."""
    run = on_each(
        partial(_device_forward, tuning=tuning, devices=context_devices()),
        in_specs=(_GROUPED, SEQUENCE_SPLIT, SEQUENCE_SPLIT, _split(spec)),
        out_specs=_GROUPED,
    )
    return run(q, k, v, spec)


def _backward(
    q: Array, k: Array, v: Array, spec: AttentionSpec, results: Results, g: Array, tuning: Tuning
) -> Gradients:
    run = on_each(
        partial(_device_backward, tuning=tuning, devices=context_devices()),
        in_specs=(_GROUPED, SEQUENCE_SPLIT, SEQUENCE_SPLIT, _split(spec), _GROUPED, _GROUPED),
        out_specs=(_GROUPED, SEQUENCE_SPLIT, SEQUENCE_SPLIT, P()),
    )
    return run(q, k, v, spec, results, g)


def _device_forward(
    index: Array, q: Array, k: Array, v: Array, spec: AttentionSpec, *, tuning: Tuning, devices: int
) -> Results:
    """What device ``index`` does; all arrays are its own stretches."""
    length = q.shape[-2]

    def attend(turn: Any, keys: Any, results: Results) -> Results:
        k, v, segments = keys
        part = forward_tiles(q, k, v, segments, spec, _offset(index, turn, devices, length), tuning, F32)
        return formula.joined(results, part)

    def step(turn: Any, carry: Any) -> Any:
        keys, results = carry
        return _pass_on(keys, 1, devices), attend(turn, keys, results)

    lse = jnp.full((*q.shape[:-1], 1), LOWEST, F32) if spec.activation.is_normalised else None
    start = (k, v, spec.segment_ids), (jnp.zeros((*q.shape[:-1], v.shape[-1]), F32), lse)
    last = _stretches(devices, length, spec.window) - 1
    keys, results = jax.lax.fori_loop(0, last, step, start)
    out, lse = formula.with_sink(attend(last, keys, results), spec)
    return out.astype(v.dtype), lse


def _device_backward(
    index: Array,
    q: Array,
    k: Array,
    v: Array,
    spec: AttentionSpec,
    results: Results,
    g: Array,
    *,
    tuning: Tuning,
    devices: int,
) -> Gradients:
    length = q.shape[-2]

    def attend(turn: Any, keys: Any, gradients: Gradients) -> Gradients:
        k, v, segments = keys
        offset = _offset(index, turn, devices, length)
        part = backward_tiles(q, k, v, segments, spec, offset, results, g, tuning, F32)
        return jax.tree.map(jnp.add, gradients, part)

    def step(turn: Any, carry: Any) -> Any:
        keys, gradients = carry
        d_q, d_k, d_v, d_bias = attend(turn, keys, gradients)
        d_k, d_v = _pass_on((d_k, d_v), 1, devices)
        return _pass_on(keys, 1, devices), (d_q, d_k, d_v, d_bias)

    zeros = (*(jnp.zeros(x.shape, F32) for x in (q, k, v)), jnp.zeros(q.shape[1:3], F32))
    last = _stretches(devices, length, spec.window) - 1
    keys, gradients = jax.lax.fori_loop(0, last, step, ((k, v, spec.segment_ids), zeros))
    d_q, d_k, d_v, d_bias = attend(last, keys, gradients)
    d_k, d_v = _pass_on((d_k, d_v), -last, devices)
    return d_q, d_k, d_v, jax.lax.psum(d_bias, CONTEXT)


def _offset(index: Array, turn: Any, devices: int, length: int) -> Array:
    """Position of the device's queries less that of the keys that it holds after ``turn`` turns."""
    return (index - (index - turn) % devices) * length


def _stretches(devices: int, length: int, window: int | None) -> int:
    """How many stretches a device sees, its own included."""
    return devices if window is None else min(devices, 1 + -(-(window - 1) // length))


def _pass_on(tree: Any, distance: int, devices: int) -> Any:
    pairs = [(i, (i + distance) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, CONTEXT, pairs), tree)


def _split(spec: AttentionSpec) -> Any:
    """How the spec's arrays are split: segment_ids by the sequence."""
    whole: Any = jax.tree.map(lambda _: P(), spec)
    return whole if spec.segment_ids is None else replace(whole, segment_ids=P(None, CONTEXT))
