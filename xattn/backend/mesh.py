"""The axis of a device mesh that splits the sequence, as seen by an implementation during tracing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec as P

from xattn.backend.spec import AttentionSpec

CONTEXT = "context"
SEQUENCE_SPLIT = P(None, None, CONTEXT)
"""How arrays (B, NH or NKV, S, ·) are split."""


def context_devices() -> int:
    """Return how many devices the active mesh (``jax.set_mesh``) splits the sequence over. It is 1 without a mesh, and
    inside a function that already runs on one device of that axis."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[CONTEXT] if types.get(CONTEXT) == AxisType.Auto else 1


def devices() -> int:
    """Devices of the mesh that is set, along the axes that are XLA's to divide; 1 where none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return math.prod(mesh.shape[name] for name, kind in types if kind == AxisType.Auto)


def split_by_sequence(spec: AttentionSpec) -> Any:
    """Return how the spec's arrays are split: per-token arrays by sequence, the others not at all."""
    whole: Any = jax.tree.map(lambda _: P(), spec)
    of_tokens = {"segment_ids": P(None, CONTEXT), "log_decay": SEQUENCE_SPLIT, "log_input_gate": SEQUENCE_SPLIT}
    return replace(whole, **{name: place for name, place in of_tokens.items() if getattr(spec, name) is not None})


def on_each(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Turn a per-device function (index, *arguments) into a function of whole arrays (*arguments).

    XLA keeps partitioning the other axes. The index is passed as data, because not every compiler lets a device query
    its own index in a program that is split by hand along one axis and by XLA along the others.
    """
    split = jax.shard_map(
        lambda index, *arguments: function(index[0], *arguments),
        in_specs=(P(CONTEXT), *in_specs),
        out_specs=out_specs,
        axis_names={CONTEXT},
        check_vma=False,
    )
    return lambda *arguments: split(jax.numpy.arange(context_devices()), *arguments)
