"""Layers of two kinds: how their parameters and caches are stacked, and the loop over periods.

``backend.every: k`` makes every k-th layer one of kind ``then``; a period is k layers. Parameters that both kinds have
are stacked over all layers in order, under ``layers``, as in a model with one kind. Parameters that only one kind has
are stacked over the layers of that kind, under ``backend_layers`` or ``then_layers``. Other per-layer data, such as
caches, is stacked by kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from xattn.model.attention import LayerCache
from xattn.model.config import BackendConfig

Caches = Mapping[str, LayerCache]
"""Kind of layer → its cache. The leading axis counts the layers of that kind."""


class PerLayer(NamedTuple):
    """What each layer has of its own."""

    params: Mapping[str, Any]
    """The entries of :func:`merged`."""
    caches: Caches | None
    keys: jax.Array | None
    """Dropout keys of all layers; None without dropout."""


RunLayer = Callable[[str, Any, Any, LayerCache | None, jax.Array | None], tuple[Any, Any]]
"""Runs a layer: (kind, parameters, stream, cache, dropout key) → (stream, other outputs of the layer).

The stream is what each layer passes to the next: a tree of arrays with constant shapes.
"""


def layers_of(backend: BackendConfig, num_layers: int) -> dict[str, list[int]]:
    """Return kind → its layers, counted from 0, for the kinds that the backend has."""
    return {kind: [i for i in range(num_layers) if backend.kind_of(i) == kind] for kind in backend.kinds}


def merged(of_kinds: Mapping[str, Any], num_layers: int, backend: BackendConfig) -> dict[str, Any]:
    """Stack the parameters, given those of models with one kind of layer each."""
    flat = {kind: flatten_dict(layers) for kind, layers in of_kinds.items()}
    first, second = flat.values()
    shared = {path: leaf for path, leaf in first.items() if path in second}
    found = {"layers": unflatten_dict(shared)}
    for kind, leaves in flat.items():
        rows = jnp.asarray(layers_of(backend, num_layers)[kind])
        if own := {path: leaf[rows] for path, leaf in leaves.items() if path not in shared}:
            found[f"{kind}_layers"] = unflatten_dict(own)
    return found


def run(
    layer: RunLayer, stream: Any, per_layer: PerLayer, num_layers: int, backend: BackendConfig, *, unrolled: bool
) -> tuple[Any, dict[str, Any]]:
    """Run all layers. Return the stream, and kind → other outputs of its layers, stacked."""
    params, caches, keys = per_layer
    assert backend.every is not None
    every = backend.every
    periods = num_layers // every
    # Name → (layers per period, arrays stacked over those layers).
    stacks: dict[str, tuple[int, Any]] = {"shared": (every, (params["layers"], keys))}
    for kind, count in (("backend", every - 1), ("then", 1)):
        stacks[kind] = (count, (params.get(f"{kind}_layers", {}), caches and caches[kind]))

    def in_turn(stream: Any, arrays: Mapping[str, Any], layers: range) -> tuple[Any, dict[str, Any]]:
        given: dict[str, list[Any]] = {}
        for i in layers:
            kind = backend.kind_of(i)
            shared, key = _row(arrays["shared"], i)
            own, cache = _row(arrays[kind], len(given.setdefault(kind, [])))
            both = unflatten_dict(flatten_dict(shared) | flatten_dict(own)) if own else shared
            stream, gives = layer(kind, both, stream, cache, key)
            given[kind].append(gives)
        return stream, {kind: jax.tree.map(lambda *rows: jnp.stack(rows), *rows) for kind, rows in given.items()}

    looped = {
        name: jax.tree.map(lambda leaf: leaf[: periods * n].reshape(periods, n, *leaf.shape[1:]), arrays)  # noqa: B023
        for name, (n, arrays) in stacks.items()
    }
    unroll = periods if unrolled else 1
    stream, found = jax.lax.scan(
        lambda stream, arrays: in_turn(stream, arrays, range(every)), stream, looped, unroll=unroll
    )
    found = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)
    if num_layers % every:  # layers after the last full period are all of kind ``backend``
        rest = {name: jax.tree.map(lambda leaf: leaf[periods * n :], arrays) for name, (n, arrays) in stacks.items()}  # noqa: B023
        stream, last = in_turn(stream, rest, range(num_layers % every))
        found["backend"] = jax.tree.map(lambda *parts: jnp.concatenate(parts), found["backend"], last["backend"])
    return stream, found


def _row(arrays: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], arrays)
