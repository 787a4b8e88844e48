"""Attention tile by tile: the reference's numbers without its S×S arrays, forward and backward, on any platform.

The S×S weights are cut into square tiles. For a block of queries only the tiles that it may attend to are visited; what
lies above the diagonal or outside the window is not computed, rather than masked. The loops are XLA's own with bounds
that depend on the block, so the program is small, and the same for every S.

Shape letters: B batch, NH heads, NKV key/value heads, G = NH / NKV query heads a key/value head, S sequence, T tile,
DHQK query/key head width, DHV value head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from xattn.backend.spec import AttentionSpec, prepare, product

F32 = jnp.float32
LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclass(frozen=True)
class Tuning:
    """How the work is cut; the result depends on it by rounding only."""

    tile: int = 384
    """Most queries, and keys, of a tile. The extra memory is a few times B · NH · T² · 4 bytes, whatever S is."""


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, tuning: Tuning = Tuning()) -> jax.Array:
    """:func:`xattn.backend.reference.reference`, all of it, in O(S) memory.

    Softmax is accumulated over tiles with a running maximum (arXiv 1805.02867, 2112.05682); sigmoid and ``none`` are
    plain sums. The backward keeps q, k, v as given, the output, and for softmax the log of the row's sum in float32;
    the rest is computed again. Reverse mode only, and once: it is a custom_vjp.
    """
    return _forward(q, k, v, spec, tuning)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, tuning: Tuning
) -> tuple[jax.Array, tuple[Any, ...]]:
    """The output, and what the backward needs."""
    tile, padded = _cuts(q.shape[2], tuning)
    rotated_q, rotated_k = prepare(q, k, spec)
    rotated_q = _pad(_group(rotated_q, k.shape[1]), padded)
    rotated_k, padded_v, padded_spec = _pad(rotated_k, padded), _pad(v, padded), _pad_spec(spec, padded)
    rows = (*rotated_q.shape[:3], tile)

    def of_queries(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, lse = carry
        q_ = _cut(rotated_q, i, tile)

        def of_keys(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            sums, top, total = carry
            logits, keep = _logits(q_, _cut(rotated_k, j, tile), i, j, padded_spec)
            match spec.activation:
                case "softmax":
                    new_top = jnp.maximum(top, jnp.max(jnp.where(keep, logits, LOWEST), axis=-1, keepdims=True))
                    shrink, top = jnp.exp(top - new_top), new_top
                    weights = jnp.where(keep, jnp.exp(logits - top), 0)
                    sums, total = sums * shrink, total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
                case "sigmoid":
                    weights = jnp.where(keep, jax.nn.sigmoid(logits), 0)
                case "none":
                    weights = jnp.where(keep, logits, 0)
            return sums + product("bkgts,bksd->bkgtd", weights.astype(v.dtype), _cut(padded_v, j, tile)), top, total

        zeros = jnp.zeros((*rows, 1), F32)
        first, last = _tiles_of_keys(i, tile, padded, spec)
        start = (jnp.zeros((*rows, v.shape[-1]), F32), zeros + LOWEST, zeros)
        sums, top, total = jax.lax.fori_loop(first, last, of_keys, start)
        if spec.activation == "softmax":
            # A row that may attend to nothing has a total of 0. Its output is 0; the largest float as its log-sum-exp
            # makes its weights 0 in the backward too.
            empty = total == 0
            total = jnp.where(empty, 1, total)
            sums, lse = sums / total, _put(lse, jnp.where(empty, -LOWEST, top + jnp.log(total)), i)
        return _put(out, sums, i), lse

    start = (jnp.zeros((*rotated_q.shape[:-1], v.shape[-1]), v.dtype), jnp.zeros((*rotated_q.shape[:-1], 1), F32))
    out, lse = jax.lax.fori_loop(0, padded // tile, of_queries, start)
    out = out[..., : q.shape[2], :].reshape(*q.shape[:3], v.shape[-1])
    return out, (q, k, v, spec, out, lse if spec.activation == "softmax" else None)


def _backward(tuning: Tuning, residuals: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
    q, k, v, spec, out, lse = residuals
    tile, padded = _cuts(q.shape[2], tuning)
    (rotated_q, rotated_k), unprepare = jax.vjp(
        lambda q, k, theta: prepare(q, k, replace(spec, theta=theta)), q, k, spec.theta
    )
    rotated_q, g, out = (_pad(_group(x, k.shape[1]), padded) for x in (rotated_q, g, out))
    rotated_k, padded_v, padded_spec = _pad(rotated_k, padded), _pad(v, padded), _pad_spec(spec, padded)
    scale = 1 / math.sqrt(q.shape[-1])

    def of_queries(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_q, *rest = carry
        q_, g_ = _cut(rotated_q, i, tile), _cut(g, i, tile)
        if spec.activation == "softmax":
            lse_ = _cut(lse, i, tile)
            delta = jnp.sum(g_.astype(F32) * _cut(out, i, tile).astype(F32), axis=-1, keepdims=True)

        def of_keys(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_q_, d_k, d_v, d_bias = carry
            k_ = _cut(rotated_k, j, tile)
            logits, keep = _logits(q_, k_, i, j, padded_spec)
            d_weights = product("bkgtd,bksd->bkgts", g_, _cut(padded_v, j, tile))
            match spec.activation:
                case "softmax":
                    weights = jnp.where(keep, jnp.exp(logits - lse_), 0)
                    d_logits = weights * (d_weights - delta)
                case "sigmoid":
                    # Neither a row's sum to keep nor a delta to subtract: the derivative is the weight's own.
                    weights = jnp.where(keep, jax.nn.sigmoid(logits), 0)
                    d_logits = d_weights * weights * (1 - weights)
                    d_bias += jnp.sum(d_logits, axis=(0, 3, 4))
                case "none":
                    weights = jnp.where(keep, logits, 0)
                    d_logits = jnp.where(keep, d_weights, 0)
            weights, d_logits = weights.astype(v.dtype), d_logits.astype(q.dtype)
            d_q_ += product("bkgts,bksd->bkgtd", d_logits, k_) * scale
            d_k = _add(d_k, product("bkgts,bkgtd->bksd", d_logits, q_) * scale, j)
            d_v = _add(d_v, product("bkgts,bkgtd->bksd", weights, g_), j)
            return d_q_, d_k, d_v, d_bias

        first, last = _tiles_of_keys(i, tile, padded, spec)
        d_q_, *rest = jax.lax.fori_loop(first, last, of_keys, (jnp.zeros(q_.shape, F32), *rest))
        return _put(d_q, d_q_, i), *rest

    start = (
        jnp.zeros(rotated_q.shape, q.dtype),
        jnp.zeros(rotated_k.shape, F32),
        jnp.zeros(padded_v.shape, F32),
        jnp.zeros(rotated_q.shape[1:3], F32),
    )
    d_q, d_k, d_v, d_bias = jax.lax.fori_loop(0, padded // tile, of_queries, start)
    d_q, d_k, d_v = (x[..., : q.shape[2], :] for x in (d_q, d_k, d_v))
    d_q, d_k, d_theta = unprepare((d_q.reshape(q.shape), d_k.astype(k.dtype)))
    d_bias = None if spec.bias is None else d_bias.reshape(spec.bias.shape)
    return d_q, d_k, d_v.astype(v.dtype), replace(spec, theta=d_theta, bias=d_bias, mask=None, segment_ids=None)


blockwise.defvjp(_forward, _backward)


def _cuts(length: int, tuning: Tuning) -> tuple[int, int]:
    """(tile, padded length, a multiple of it): tiles of equal size, so that padding is at most 8 tokens a tile."""
    count = -(-length // tuning.tile)
    tile = -(-length // count)
    if count > 1:
        tile = min(-(-tile // 8) * 8, tuning.tile)
    return tile, tile * -(-length // tile)


def _tiles_of_keys(i: jax.Array, tile: int, padded: int, spec: AttentionSpec) -> tuple[Any, Any]:
    """The tiles, first to last (excluded), that hold every key which a query of block i may attend to."""
    causal = spec.mask is None or spec.window is not None
    first = 0 if spec.window is None else jnp.maximum(i * tile - spec.window + 1, 0) // tile
    return first, i + 1 if causal else padded // tile


def _logits(q: jax.Array, k: jax.Array, i: jax.Array, j: jax.Array, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """Logits (B, NKV, G, T, T) of query block i and key block j, sigmoid's bias included, and which may attend."""
    logits = product("bkgtd,bksd->bkgts", q, k) / math.sqrt(q.shape[-1])
    if spec.bias is not None:
        logits = logits + spec.bias.reshape(1, *q.shape[1:3], 1, 1)
    tile = q.shape[-2]
    t, s = i * tile + jnp.arange(tile)[:, None], j * tile + jnp.arange(tile)[None, :]
    keep = s <= t if spec.mask is None else jax.lax.dynamic_slice(spec.mask, (i * tile, j * tile), (tile, tile))
    if spec.window is not None:
        keep = keep & (s <= t) & (t - spec.window < s)
    keep = keep[None]
    if spec.segment_ids is not None:
        of_queries, of_keys = (jax.lax.dynamic_slice_in_dim(spec.segment_ids, n * tile, tile, axis=1) for n in (i, j))
        keep = keep & (of_queries[:, :, None] == of_keys[:, None, :])
    return logits, jnp.broadcast_to(keep[:, None, None], logits.shape)


def _group(x: jax.Array, kv_heads: int) -> jax.Array:
    """(B, NH, S, ·) as (B, NKV, G, S, ·): query head h reads key/value head ⌊h · NKV / NH⌋."""
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def _pad(x: jax.Array, padded: int) -> jax.Array:
    """Zeros after the sequence, the last axis but one."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padded - x.shape[-2]), (0, 0)])


def _pad_spec(spec: AttentionSpec, padded: int) -> AttentionSpec:
    """No query attends to the padding: it comes after all of them, and a given mask is False there."""
    mask, segment_ids = spec.mask, spec.segment_ids
    if mask is not None:
        mask = jnp.pad(mask, (0, padded - mask.shape[0]))
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, [(0, 0), (0, padded - segment_ids.shape[1])])
    return replace(spec, mask=mask, segment_ids=segment_ids)


def _cut(x: jax.Array, i: jax.Array, tile: int) -> jax.Array:
    """Block i of the sequence, the last axis but one."""
    return jax.lax.dynamic_slice_in_dim(x, i * tile, tile, axis=x.ndim - 2)


def _put(x: jax.Array, block: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), i * block.shape[-2], axis=x.ndim - 2)


def _add(x: jax.Array, block: jax.Array, i: jax.Array) -> jax.Array:
    return _put(x, _cut(x, i, block.shape[-2]) + block, i)
