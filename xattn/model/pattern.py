"""Layers of two kinds: how their parameters and caches are stacked, and the loop over periods of them.

``backend.every: k`` makes every k-th layer one of the kind ``then``; k layers are a period. Parameters that both kinds
have are stacked over all layers in their order, under ``layers``, as in a model of one kind; those that only one kind
has are stacked over its own layers, under ``backend_layers`` or ``then_layers``. What else a layer has, its cache for
one, is stacked for each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from xattn.model.attention import LayerCache
from xattn.model.config import BackendConfig

Caches = Mapping[str, LayerCache]
"""Kind of layer → its cache with one more axis in front, the layers of that kind."""

RunLayer = Callable[[str, Any, Any, LayerCache | None, jax.Array | None], tuple[Any, Any]]
"""(kind, parameters, stream, cache, dropout key) of a layer → (the stream, what else the layer gives).

The stream is what goes from layer to layer, a tree of arrays that keep their shapes.
"""


def layers_of(backend: BackendConfig, num_layers: int) -> dict[str, list[int]]:
    """Kind → its layers, counted from 0, of those kinds that the backend has."""
    return {kind: [i for i in range(num_layers) if backend.kind_of(i) == kind] for kind in backend.kinds}


def merged(of_kinds: Mapping[str, Any], num_layers: int, backend: BackendConfig) -> dict[str, Any]:
    """The stacked parameters, from those of models whose layers all are of one kind."""
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
    layer: RunLayer,
    stream: Any,
    params: Mapping[str, Any],
    caches: Caches | None,
    keys: jax.Array | None,
    num_layers: int,
    backend: BackendConfig,
    *,
    unrolled: bool,
) -> tuple[Any, dict[str, Any]]:
    """The stream after all layers, and kind → what its layers give, stacked.

    params: with the entries of :func:`merged`. keys: of all layers, or None without dropout.
    """
    assert backend.every is not None
    every = backend.every
    periods = num_layers // every
    # Each with the layers that it has in a period, and the arrays stacked over them.
    stacks: dict[str, tuple[int, Any]] = {"shared": (every, (params["layers"], keys))}
    for kind, count in (("backend", every - 1), ("then", 1)):
        stacks[kind] = (count, (params.get(f"{kind}_layers", {}), caches and caches[kind]))

    def in_turn(stream: Any, arrays: Mapping[str, Any], layers: range) -> tuple[Any, dict[str, Any]]:
        given: dict[str, list[Any]] = {}
        for i in layers:
            kind = backend.kind_of(i)
            shared, key = _row(arrays["shared"], i)
            own, cache = _row(arrays[kind], len(given.setdefault(kind, [])))
            stream, gives = layer(kind, _both(shared, own), stream, cache, key)
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
    if num_layers % every:  # after the last full period, all of them of the kind ``backend``
        rest = {name: jax.tree.map(lambda leaf: leaf[periods * n :], arrays) for name, (n, arrays) in stacks.items()}  # noqa: B023
        stream, last = in_turn(stream, rest, range(num_layers % every))
        found["backend"] = jax.tree.map(lambda *parts: jnp.concatenate(parts), found["backend"], last["backend"])
    return stream, found


def _row(arrays: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], arrays)


def _both(shared: Any, own: Any) -> Any:
    return unflatten_dict(flatten_dict(shared) | flatten_dict(own)) if own else shared
