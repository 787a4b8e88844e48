"""Attention tile by tile: the reference's numbers without its S×S arrays, forward and backward, on any platform.

The S×S weights are cut into square tiles. For a block of queries only the tiles that it may attend to are visited: what
lies above the diagonal or outside the window is never computed. The loops are XLA's own, with bounds that depend on the
block, so the program is as small for a long sequence as for a short one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from xattn.backend import formula
from xattn.backend.formula import F32, Results, Tokens
from xattn.backend.spec import AttentionSpec, Keys, Output, Queries, Values, prepare, product

Index = Array | int
Gradients = tuple[Array, Array, Array, Array]
"""(dq in q's dtype or float32, dk, dv, dbias (NKV, G), all float32)"""


@dataclass(frozen=True)
class Tuning:
    """How the work is cut; the result depends on it by rounding only."""

    tile: int = 384
    """Most queries, and keys, of a tile. The extra memory is a few times B · NH · T² · 4 bytes, whatever S is."""


class Passes(NamedTuple):
    """Attention of rotated queries, grouped, to rotated keys. Two module-level functions, so that it can be hashed."""

    forward: Callable[..., Results]
    """(q, k, v, spec, tuning) → results, the output in v's dtype."""
    backward: Callable[..., Gradients]
    """(q, k, v, spec, the forward's results, gradient of the output, tuning) → gradients."""
    tuning: Tuning


def blockwise(q: Queries, k: Keys, v: Values, spec: AttentionSpec, tuning: Tuning = Tuning()) -> Output:
    """:func:`xattn.backend.reference.reference`, all of it, in O(S) memory.

    A normalised activation is accumulated over tiles with a running maximum (arXiv 1805.02867, 2112.05682), a pointwise
    one is a plain sum. The backward keeps q, k, v as given, the output, and for a normalised activation the log of the
    row's sum in float32; it computes the rest again. Reverse mode only, and once: it is a custom_vjp.
    """
    return prepared(q, k, v, spec, Passes(_forward, _backward, tuning))


def _forward(q: Array, k: Array, v: Array, spec: AttentionSpec, tuning: Tuning) -> Results:
    """On one device, or as XLA splits it."""
    dtype = v.dtype if spec.sink is None else F32
    results = forward_tiles(q, k, v, spec.segment_ids, spec, 0, tuning, dtype)
    out, lse = formula.with_sink(results, spec)
    return out.astype(v.dtype), lse


def _backward(
    q: Array, k: Array, v: Array, spec: AttentionSpec, results: Results, g: Array, tuning: Tuning
) -> Gradients:
    return backward_tiles(q, k, v, spec.segment_ids, spec, 0, results, g, tuning, q.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def prepared(q: Queries, k: Keys, v: Values, spec: AttentionSpec, passes: Passes) -> Output:
    """Pre-activation and RoPE, then the passes. What is kept for the backward does not depend on which they are."""
    return _prepared_forward(q, k, v, spec, passes)[0]


def _prepared_forward(
    q: Array, k: Array, v: Array, spec: AttentionSpec, passes: Passes
) -> tuple[Array, tuple[Any, ...]]:
    """The output, and what the backward needs."""
    rotated_q, rotated_k = prepare(q, k, spec)
    out, lse = passes.forward(formula.grouped(rotated_q, k.shape[1]), rotated_k, v, spec, passes.tuning)
    out = out.reshape(*q.shape[:3], v.shape[-1])
    return out, (q, k, v, spec, out, lse)


def _prepared_backward(passes: Passes, residuals: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
    q, k, v, spec, out, lse = residuals
    (rotated_q, rotated_k), unprepare = jax.vjp(
        lambda q, k, theta, scale: prepare(q, k, replace(spec, theta=theta, logit_scale=scale)),
        *(q, k, spec.theta, spec.logit_scale),
    )
    rotated_q, g, out = (formula.grouped(x, k.shape[1]) for x in (rotated_q, g, out))
    d_q, d_k, d_v, d_bias = passes.backward(rotated_q, rotated_k, v, spec, (out, lse), g, passes.tuning)
    d_q, d_k, d_theta, d_scale = unprepare((d_q.reshape(q.shape).astype(q.dtype), d_k.astype(k.dtype)))
    bias = None if spec.bias is None else d_bias.reshape(spec.bias.shape)
    d_spec = replace(spec, theta=d_theta, logit_scale=d_scale, bias=bias, mask=None, segment_ids=None)
    return d_q, d_k, d_v.astype(v.dtype), d_spec


prepared.defvjp(_prepared_forward, _prepared_backward)


def forward_tiles(
    q: Float[Array, "B NKV G S DHQK"],
    k: Float[Array, "B NKV S DHQK"],
    v: Float[Array, "B NKV S DHV"],
    key_segments: Int[Array, "B S"] | None,
    spec: AttentionSpec,
    offset: Index,
    tuning: Tuning,
    dtype: Any,
) -> Results:
    """A stretch of queries and one of as many keys, both rotated; the activation's extra logit is left out.

    The queries' segments are the spec's. offset: the first query's position less the first key's; other than 0 only
    without a given mask. dtype: of the output, which is 0 in a row that may attend to none of these keys.
    """
    length = q.shape[-2]
    tile, padded = _cuts(length, tuning)
    q, k, v = (_pad(x, padded) for x in (q, k, v))
    key_segments, spec = _pad(key_segments, padded, -1), _pad_spec(spec, padded)

    def of_queries(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        q_ = _cut(q, i, tile)

        def of_keys(j: Array, sums: formula.Sums) -> formula.Sums:
            logits, keep = _logits(q_, _cut(k, j, tile), key_segments, i, j, spec, offset, length)
            return formula.add_columns(sums, logits, keep, _cut(v, j, tile), spec)

        first, last = _tiles_of_keys(i, tile, padded, spec, offset)
        nothing = formula.no_sums((*q.shape[:3], tile), v.shape[-1])
        out, lse = formula.finished(jax.lax.fori_loop(first, last, of_keys, nothing), spec)
        return _put(carry[0], out, i), carry[1] if lse is None else _put(carry[1], lse, i)

    start = (jnp.zeros((*q.shape[:-1], v.shape[-1]), dtype), jnp.zeros((*q.shape[:-1], 1), F32))
    out, lse = (x[..., :length, :] for x in jax.lax.fori_loop(0, padded // tile, of_queries, start))
    return out, lse if spec.activation.is_normalised else None


def backward_tiles(
    q: Float[Array, "B NKV G S DHQK"],
    k: Float[Array, "B NKV S DHQK"],
    v: Float[Array, "B NKV S DHV"],
    key_segments: Int[Array, "B S"] | None,
    spec: AttentionSpec,
    offset: Index,
    results: Results,
    g: Float[Array, "B NKV G S DHV"],
    tuning: Tuning,
    dtype: Any,
) -> Gradients:
    """The gradients that these queries and these keys give each other; arguments as in :func:`forward_tiles`.

    results: of the queries over *all* their keys. g: the gradient of that output. dtype: of q's gradient.
    """
    length = q.shape[-2]
    tile, padded = _cuts(length, tuning)
    q, k, v, g, out, lse = (_pad(x, padded) for x in (q, k, v, g, *results))
    key_segments, spec = _pad(key_segments, padded, -1), _pad_spec(spec, padded)
    scale = 1 / math.sqrt(q.shape[-1])

    def of_queries(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        d_q, *rest = carry
        q_, g_ = _cut(q, i, tile), _cut(g, i, tile)
        lse_ = delta = None
        if lse is not None:
            lse_ = _cut(lse, i, tile)
            delta = jnp.sum(g_.astype(F32) * _cut(out, i, tile).astype(F32), axis=-1, keepdims=True)

        def of_keys(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            d_q_, d_k, d_v, d_bias = carry
            k_ = _cut(k, j, tile)
            logits, keep = _logits(q_, k_, key_segments, i, j, spec, offset, length)
            weights, pull = formula.weights_again(logits, keep, lse_, spec)
            d_logits = pull(product("bkgtd,bksd->bkgts", g_, _cut(v, j, tile)), delta)
            if spec.bias is not None:
                d_bias += jnp.sum(d_logits, axis=(0, 3, 4))
            weights, d_logits = weights.astype(v.dtype), d_logits.astype(q.dtype)
            d_q_ += product("bkgts,bksd->bkgtd", d_logits, k_) * scale
            d_k = _add(d_k, product("bkgts,bkgtd->bksd", d_logits, q_) * scale, j)
            d_v = _add(d_v, product("bkgts,bkgtd->bksd", weights, g_), j)
            return d_q_, d_k, d_v, d_bias

        first, last = _tiles_of_keys(i, tile, padded, spec, offset)
        d_q_, *rest = jax.lax.fori_loop(first, last, of_keys, (jnp.zeros(q_.shape, F32), *rest))
        return _put(d_q, d_q_, i), *rest

    start = (jnp.zeros(q.shape, dtype), jnp.zeros(k.shape, F32), jnp.zeros(v.shape, F32), jnp.zeros(q.shape[1:3], F32))
    d_q, d_k, d_v, d_bias = jax.lax.fori_loop(0, padded // tile, of_queries, start)
    return d_q[..., :length, :], d_k[..., :length, :], d_v[..., :length, :], d_bias


def _cuts(length: int, tuning: Tuning) -> tuple[int, int]:
    """(tile, padded length, a multiple of it): tiles of equal size, so that padding is at most 8 tokens a tile."""
    count = -(-length // tuning.tile)
    tile = -(-length // count)
    if count > 1:
        tile = min(-(-tile // 8) * 8, tuning.tile)
    return tile, tile * -(-length // tile)


def _tiles_of_keys(i: Array, tile: int, padded: int, spec: AttentionSpec, offset: Index) -> tuple[Any, Any]:
    """The tiles, first to last (excluded), that hold every key which a query of block i may attend to; there may be
    none."""
    count = padded // tile
    causal = spec.mask is None or spec.window is not None
    last = jnp.clip((i * tile + offset + tile - 1) // tile + 1, 0, count) if causal else count
    first = 0 if spec.window is None else jnp.maximum(i * tile + offset - spec.window + 1, 0) // tile
    return first, last


def _logits(
    q: Array, k: Array, key_segments: Array | None, i: Array, j: Array, spec: AttentionSpec, offset: Index, length: int
) -> tuple[Float32[Array, "B NKV G T T"], Bool[Array, "#B T T"]]:
    """Logits of query block i and key block j, and which may attend."""
    tile = q.shape[-2]

    def tokens(block: Array, shift: Index, segments: Array | None) -> Tokens:
        if segments is not None:
            segments = jax.lax.dynamic_slice_in_dim(segments, block * tile, tile, axis=1)
        return Tokens(shift + block * tile + jnp.arange(tile), segments)

    rows, columns = tokens(i, offset, spec.segment_ids), tokens(j, 0, key_segments)
    if length % tile:  # padding comes after all queries of the same stretch, not after those of a later one
        columns = columns._replace(exist=columns.positions < length)
    mask = None if spec.mask is None else jax.lax.dynamic_slice(spec.mask, (i * tile, j * tile), (tile, tile))
    return formula.logits(formula.scores(q, k), spec), formula.may_attend(rows, columns, spec, mask)


def _pad(x: Any, padded: int, axis: int = -2) -> Any:
    """Zeros after the sequence, which is the given axis; None stays None."""
    if x is None:
        return None
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, padded - x.shape[axis])
    return jnp.pad(x, widths)


def _pad_spec(spec: AttentionSpec, padded: int) -> AttentionSpec:
    """A given mask is False in the padding."""
    mask = None if spec.mask is None else jnp.pad(spec.mask, (0, padded - spec.mask.shape[0]))
    return replace(spec, mask=mask, segment_ids=_pad(spec.segment_ids, padded, -1))


def _cut(x: Array, i: Array, tile: int) -> Array:
    """Block i of the sequence, the last axis but one."""
    return jax.lax.dynamic_slice_in_dim(x, i * tile, tile, axis=x.ndim - 2)


def _put(x: Array, block: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), i * block.shape[-2], axis=x.ndim - 2)


def _add(x: Array, block: Array, i: Array) -> Array:
    return _put(x, _cut(x, i, block.shape[-2]) + block, i)
