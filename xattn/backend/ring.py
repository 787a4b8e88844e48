"""One sequence over several devices: keys and values travel round the mesh's context axis and are never gathered.

Each of n devices holds S/n queries, keys and values. It attends to its own keys, passes them to the next device,
attends to the ones it received, and so on (Ring Attention, Liu et al., arXiv 2310.01889). Within a stretch of keys this
is :mod:`xattn.backend.blockwise`, and :mod:`xattn.backend.formula` combines the results. The decay across the stretches
in between is a sum of one number per stretch. A stretch after the queries costs no products. In the backward pass the
gradients of keys and values travel with them, and finally return to the device that owns them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32

from xattn.backend import formula
from xattn.backend.blockwise import (
    TILE,
    Distance,
    Gradients,
    KeySide,
    Passes,
    QuerySide,
    backward_tiles,
    blockwise,
    forward_tiles,
    key_side,
    prepared,
)
from xattn.backend.formula import F32, LOWEST, Results
from xattn.backend.mesh import CONTEXT, SEQUENCE_SPLIT, context_devices, on_each, split_by_sequence
from xattn.backend.spec import AttentionSpec, Keys, Output, Queries, Values

_GROUPED = P(None, None, None, CONTEXT)


@dataclass(frozen=True)
class _Place:
    """A device's place in the ring."""

    index: Array
    devices: int
    decays: Float32[Array, "B NKV devices"] | None
    """Σ ℓ over each device's stretch."""


def ring(q: Queries, k: Keys, v: Values, spec: AttentionSpec, tile: int = TILE) -> Output:
    """Compute :func:`xattn.backend.reference.reference` without a given mask, in O(S/n) memory per device.

    S must be a multiple of n, the size of the active mesh's context axis. If n is 1 or there is no such axis, this is
    :func:`xattn.backend.blockwise.blockwise`. A device sends (n − 1)/n of all K and V in the forward pass, and again in
    the backward pass with their gradients in float32. With a window, it sends them only as far as the window reaches.
    """
    assert spec.mask is None
    if context_devices() == 1:
        return blockwise(q, k, v, spec, tile)
    assert q.shape[2] % context_devices() == 0
    return prepared(q, k, v, spec, Passes(_forward, _backward, tile))


def _forward(q: Array, k: Array, v: Array, spec: AttentionSpec, tile: int) -> Results:
    """Run on all devices of the context axis."""
    devices = context_devices()
    run = on_each(
        lambda index, q, k, v, spec, decays: _device_forward(_Place(index, devices, decays), q, k, v, spec, tile),
        in_specs=(_GROUPED, SEQUENCE_SPLIT, SEQUENCE_SPLIT, split_by_sequence(spec), P()),
        out_specs=_GROUPED,
    )
    return run(q, k, v, spec, _decays(spec))


def _backward(queries: QuerySide, k: Array, v: Array, spec: AttentionSpec, tile: int) -> Gradients:
    devices = context_devices()
    of_tokens = Gradients(_GROUPED, SEQUENCE_SPLIT, SEQUENCE_SPLIT, P(), SEQUENCE_SPLIT, SEQUENCE_SPLIT)  # type: ignore[arg-type]
    run = on_each(
        lambda index, queries, k, v, spec, decays: _device_backward(
            _Place(index, devices, decays), queries, k, v, spec, tile
        ),
        in_specs=(_GROUPED, SEQUENCE_SPLIT, SEQUENCE_SPLIT, split_by_sequence(spec), P()),
        out_specs=of_tokens,
    )
    return run(queries, k, v, spec, _decays(spec))


def _decays(spec: AttentionSpec) -> Float32[Array, "B NKV devices"] | None:
    if spec.log_decay is None:
        return None
    return jnp.sum(spec.log_decay.reshape(*spec.log_decay.shape[:2], context_devices(), -1), axis=-1)


def _device_forward(place: _Place, q: Array, k: Array, v: Array, spec: AttentionSpec, tile: int) -> Results:
    """Run on the device of that place. The arrays are its own stretches."""

    def attend(turn: Any, keys: KeySide, results: Results) -> Results:
        distance = _distance(place, turn, q.shape[-2])
        return formula.joined(results, forward_tiles(q, keys, spec, distance, tile, F32))

    def step(turn: Any, carry: Any) -> Any:
        keys, results = carry
        return _pass_on(keys, 1, place.devices), attend(turn, keys, results)

    lse = jnp.full((*q.shape[:-1], 1), LOWEST, F32) if spec.activation.is_normalised else None
    start = key_side(k, v, spec), (jnp.zeros((*q.shape[:-1], v.shape[-1]), F32), lse)
    last = _stretches(place.devices, q.shape[-2], spec.window) - 1
    keys, results = jax.lax.fori_loop(0, last, step, start)
    out, lse = formula.with_sink(attend(last, keys, results), spec)
    return out.astype(v.dtype), lse


def _device_backward(
    place: _Place, queries: QuerySide, k: Array, v: Array, spec: AttentionSpec, tile: int
) -> Gradients:
    q, devices = queries.q, place.devices

    def attend(turn: Any, keys: KeySide, sums: Gradients) -> Gradients:
        found = backward_tiles(queries, keys, spec, _distance(place, turn, q.shape[-2]), tile, F32)
        return jax.tree.map(jnp.add, sums, found)

    def step(turn: Any, carry: Any) -> Any:
        keys, sums = carry
        return _pass_on(keys, 1, devices), _pass_on_with_keys(attend(turn, keys, sums), 1, devices)

    def zeros(width: int) -> Float32[Array, "B NKV S width"]:
        return jnp.zeros((*k.shape[:3], width), F32)

    start = Gradients(
        q=jnp.zeros(q.shape, F32),
        k=zeros(k.shape[-1]),
        v=zeros(v.shape[-1]),
        bias=jnp.zeros(q.shape[1:3], F32),
        rows=None if spec.log_decay is None else zeros(1),
        columns=zeros(1) if spec.has_terms else None,
    )
    last = _stretches(devices, q.shape[-2], spec.window) - 1
    keys, sums = jax.lax.fori_loop(0, last, step, (key_side(k, v, spec), start))
    found = _pass_on_with_keys(attend(last, keys, sums), -last, devices)
    return found._replace(bias=jax.lax.psum(found.bias, CONTEXT))


def _distance(place: _Place, turn: Any, length: int) -> Distance:
    """Return the distance from the keys that the device holds after ``turn`` turns to its queries."""
    holder = (place.index - turn) % place.devices
    tokens = (place.index - holder) * length
    if place.decays is None:
        return Distance(tokens, None)
    device = jnp.arange(place.devices)
    between = (holder < device) & (device < place.index)
    return Distance(tokens, jnp.sum(jnp.where(between, place.decays, 0), axis=-1))


def _pass_on_with_keys(gradients: Gradients, distance: int, devices: int) -> Gradients:
    """Pass on the gradients that belong to keys, so that they travel with the keys."""
    k, v, columns = _pass_on((gradients.k, gradients.v, gradients.columns), distance, devices)
    return gradients._replace(k=k, v=v, columns=columns)


def _stretches(devices: int, length: int, window: int | None) -> int:
    """Return how many stretches a device sees, including its own."""
    return devices if window is None else min(devices, 1 + -(-(window - 1) // length))


def _pass_on(tree: Any, distance: int, devices: int) -> Any:
    pairs = [(i, (i + distance) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, CONTEXT, pairs), tree)
