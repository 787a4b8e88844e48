"""Attention tile by tile: the reference's results without its S×S arrays, forward and backward, on any platform.

The S×S weights are cut into square tiles. Each block of queries visits only the tiles it may attend to; tiles above the
diagonal or outside the window are never computed. The loops are XLA loops with bounds that depend on the block, so the
program does not grow with the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from xattn.backend import decay, formula
from xattn.backend.formula import F32, Results, Tokens
from xattn.backend.spec import AttentionSpec, Keys, Output, Queries, Values, prepare, product

Index = Array | int

TILE = 384
"""Most queries, and most keys, in a tile. It affects the result through rounding only. Extra memory is a few times
B · NH · T² · 4 bytes, independent of S."""


class KeySide(NamedTuple):
    """A stretch of keys, and everything that belongs to them."""

    k: Float[Array, "B NKV S DHQK"]
    """Rotated."""
    v: Float[Array, "B NKV S DHV"]
    segments: Int[Array, "B S"] | None
    log_decay: decay.LogDecay | None
    log_input_gate: Float32[Array, "B NKV S"] | None


class QuerySide(NamedTuple):
    """A stretch of queries, and all that their gradients need besides keys."""

    q: Float[Array, "B NKV G S DHQK"]
    """Rotated."""
    g: Float[Array, "B NKV G S DHV"]
    """Gradient of the output."""
    out: Float[Array, "B NKV G S DHV"]
    """The output over *all* keys. ``lse`` belongs to it, as in :data:`xattn.backend.formula.Results`."""
    lse: Float32[Array, "B NKV G S 1"] | None


class Distance(NamedTuple):
    """The distance from a stretch of keys to a stretch of queries."""

    tokens: Index
    """Position of the first query minus that of the first key. It must be 0 with a given mask."""
    log_decay: Float32[Array, "B NKV"] | None
    """Σ ℓ over the stretches between the two; None means 0."""


HERE = Distance(0, None)


class Gradients(NamedTuple):
    """Gradients of prepared queries, keys and values, and of a logit's terms. All are float32, except perhaps q's."""

    q: Float[Array, "B NKV G S DHQK"]
    k: Float32[Array, "B NKV S DHQK"]
    v: Float32[Array, "B NKV S DHV"]
    bias: Float32[Array, "NKV G"]
    rows: Any
    """Gradient of E_ts summed over s, (B, NKV, S, 1); None without decay."""
    columns: Any
    """Gradient of E_ts summed over t, (B, NKV, S, 1); None without decay and input gate."""


class Passes(NamedTuple):
    """Attention of rotated, grouped queries to rotated keys. Use module-level functions, so that it can be hashed."""

    forward: Callable[..., Results]
    """(q, k, v, spec, tile) → results, the output in v's dtype."""
    backward: Callable[..., Gradients]
    """(queries, k, v, spec, tile) → gradients."""
    tile: int


def blockwise(q: Queries, k: Keys, v: Values, spec: AttentionSpec, tile: int = TILE) -> Output:
    """Compute :func:`xattn.backend.reference.reference` for any call, in O(S) memory.

    A normalised activation accumulates over tiles with a running maximum (arXiv 1805.02867, 2112.05682); a pointwise
    one is a plain sum. The backward pass keeps q, k and v as given, the output, and for a normalised activation the log
    of each row's sum in float32. It recomputes the rest. As a custom_vjp it supports only first-order reverse mode.
    """
    return prepared(q, k, v, spec, Passes(_forward, _backward, tile))


def _forward(q: Array, k: Array, v: Array, spec: AttentionSpec, tile: int) -> Results:
    """Run on one device, or as XLA partitions it."""
    dtype = v.dtype if spec.sink is None else F32
    out, lse = formula.with_sink(forward_tiles(q, key_side(k, v, spec), spec, HERE, tile, dtype), spec)
    return out.astype(v.dtype), lse


def _backward(queries: QuerySide, k: Array, v: Array, spec: AttentionSpec, tile: int) -> Gradients:
    return backward_tiles(queries, key_side(k, v, spec), spec, HERE, tile, queries.q.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def prepared(q: Queries, k: Keys, v: Values, spec: AttentionSpec, passes: Passes) -> Output:
    """Apply pre-activation and RoPE, then the passes. The residuals don't depend on which passes are used."""
    return _prepared_forward(q, k, v, spec, passes)[0]


def _prepared_forward(
    q: Array, k: Array, v: Array, spec: AttentionSpec, passes: Passes
) -> tuple[Array, tuple[Any, ...]]:
    """Return the output and the residuals of the backward pass."""
    rotated_q, rotated_k = prepare(q, k, spec)
    out, lse = passes.forward(formula.grouped(rotated_q, k.shape[1]), rotated_k, v, spec, passes.tile)
    out = out.reshape(*q.shape[:3], v.shape[-1])
    return out, (q, k, v, spec, out, lse)


def _prepared_backward(passes: Passes, residuals: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
    q, k, v, spec, out, lse = residuals
    (rotated_q, rotated_k), unprepare = jax.vjp(
        lambda q, k, theta, scale: prepare(q, k, replace(spec, theta=theta, logit_scale=scale)),
        *(q, k, spec.theta, spec.logit_scale),
    )
    rotated_q, g, out = (formula.grouped(x, k.shape[1]) for x in (rotated_q, g, out))
    found = passes.backward(QuerySide(rotated_q, g, out, lse), rotated_k, v, spec, passes.tile)
    d_q, d_k, d_theta, d_scale = unprepare((found.q.reshape(q.shape).astype(q.dtype), found.k.astype(k.dtype)))
    d_spec = replace(
        spec,
        theta=d_theta,
        logit_scale=d_scale,
        bias=None if spec.bias is None else found.bias.reshape(spec.bias.shape),
        sink=None if spec.sink is None else formula.gradient_of_sink(lse, _delta(g, out), spec),
        log_decay=None if spec.log_decay is None else decay.gradient(found.rows[..., 0], found.columns[..., 0]),
        log_input_gate=None if spec.log_input_gate is None else found.columns[..., 0],
        mask=None,
        segment_ids=None,
    )
    return d_q, d_k, found.v.astype(v.dtype), d_spec


prepared.defvjp(_prepared_forward, _prepared_backward)


def _delta(g: Array, out: Array) -> Float32[Array, "B NKV G S 1"]:
    """Return δ_t = Σ_d out_td g_td, which the gradient of a normalised activation needs."""
    return jnp.sum(g.astype(F32) * out.astype(F32), axis=-1, keepdims=True)


def key_side(k: Array, v: Array, spec: AttentionSpec) -> KeySide:
    """Return the keys and values with the spec's arrays that belong to them."""
    return KeySide(k, v, spec.segment_ids, spec.log_decay, spec.log_input_gate)


def forward_tiles(
    q: Float[Array, "B NKV G S DHQK"], keys: KeySide, spec: AttentionSpec, distance: Distance, tile: int, dtype: Any
) -> Results:
    """Attend from a stretch of queries to an equally long stretch of keys, both rotated, without the sink.

    The spec's arrays belong to the queries. ``dtype`` is that of the output. Rows that may attend to no key here are 0.
    """
    length, width = q.shape[-2], keys.v.shape[-1]
    tile, padded = _cuts(length, tile)
    q, keys, spec = _pad(q, padded), _pad_keys(keys, padded), _pad_spec(spec, padded)
    meet = _meeting(keys, spec, distance, tile, length)

    def of_queries(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        q_ = _cut(q, i, tile)

        def of_keys(j: Array, sums: formula.Sums) -> formula.Sums:
            keep, terms = meet(i, j)
            logits = formula.logits(formula.scores(q_, _cut(keys.k, j, tile)), spec, terms)
            return formula.add_columns(sums, logits, keep, _cut(keys.v, j, tile), spec)

        first, last = _tiles_of_keys(i, tile, padded, spec, distance.tokens)
        nothing = formula.no_sums((*q.shape[:3], tile), width)
        out, lse = formula.finished(jax.lax.fori_loop(first, last, of_keys, nothing), spec)
        return _put(carry[0], out, i), carry[1] if lse is None else _put(carry[1], lse, i)

    start = (jnp.zeros((*q.shape[:-1], width), dtype), jnp.zeros((*q.shape[:-1], 1), F32))
    out, lse = (x[..., :length, :] for x in jax.lax.fori_loop(0, padded // tile, of_queries, start))
    return out, lse if spec.activation.is_normalised else None


def backward_tiles(
    queries: QuerySide, keys: KeySide, spec: AttentionSpec, distance: Distance, tile: int, dtype: Any
) -> Gradients:
    """Return the gradients from these queries and these keys; arguments as in :func:`forward_tiles`.

    ``dtype`` is that of q's gradient.
    """
    length = queries.q.shape[-2]
    tile, padded = _cuts(length, tile)
    q, g, out, lse = (_pad(x, padded) for x in queries)
    keys, spec = _pad_keys(keys, padded), _pad_spec(spec, padded)
    meet = _meeting(keys, spec, distance, tile, length)
    scale = 1 / math.sqrt(q.shape[-1])

    def of_queries(i: Array, carry: Gradients) -> Gradients:
        q_, g_ = _cut(q, i, tile), _cut(g, i, tile)
        lse_ = delta = None
        if lse is not None:
            lse_, delta = _cut(lse, i, tile), _delta(g_, _cut(out, i, tile))

        def of_keys(j: Array, sums: Gradients) -> Gradients:
            k_, v_ = _cut(keys.k, j, tile), _cut(keys.v, j, tile)
            keep, terms = meet(i, j)
            logits = formula.logits(formula.scores(q_, k_), spec, terms)
            weights, pull = formula.weights_again(logits, keep, lse_, spec)
            d_logits = pull(product("bkgtd,bksd->bkgts", g_, v_), delta)
            d_scores, d_terms = formula.gradients_of_logits(d_logits, logits, spec, terms)
            weights, d_scores = weights.astype(v_.dtype), d_scores.astype(q.dtype)
            return Gradients(
                q=sums.q + product("bkgts,bksd->bkgtd", d_scores, k_) * scale,
                k=_add(sums.k, product("bkgts,bkgtd->bksd", d_scores, q_) * scale, j),
                v=_add(sums.v, product("bkgts,bkgtd->bksd", weights, g_), j),
                bias=sums.bias if spec.bias is None else sums.bias + jnp.sum(d_logits, axis=(0, 3, 4)),
                rows=None if sums.rows is None else sums.rows + d_terms.sum((2, 4))[..., None],
                columns=None if sums.columns is None else _add(sums.columns, d_terms.sum((2, 3))[..., None], j),
            )

        first, last = _tiles_of_keys(i, tile, padded, spec, distance.tokens)
        own = carry._replace(q=jnp.zeros(q_.shape, F32), rows=zeros(tile) if carry.rows is not None else None)
        sums = jax.lax.fori_loop(first, last, of_keys, own)
        rows = None if sums.rows is None else _put(carry.rows, sums.rows, i)
        return sums._replace(q=_put(carry.q, sums.q, i), rows=rows)

    def zeros(tokens: int) -> Float32[Array, "B NKV T 1"]:
        return jnp.zeros((*q.shape[:2], tokens, 1), F32)

    start = Gradients(
        q=jnp.zeros(q.shape, dtype),
        k=jnp.zeros(keys.k.shape, F32),
        v=jnp.zeros(keys.v.shape, F32),
        bias=jnp.zeros(q.shape[1:3], F32),
        rows=zeros(padded) if spec.log_decay is not None else None,
        columns=zeros(padded) if spec.has_terms else None,
    )
    found = jax.lax.fori_loop(0, padded // tile, of_queries, start)
    of_tokens = {name: x[..., :length, :] for name, x in found._asdict().items() if name != "bias" and x is not None}
    return found._replace(**of_tokens)


def _cuts(length: int, most: int) -> tuple[int, int]:
    """Return (tile, padded length). Tiles have equal size, so that padding is at most 8 tokens per tile."""
    count = -(-length // most)
    tile = -(-length // count)
    if count > 1:
        tile = min(-(-tile // 8) * 8, most)
    return tile, tile * -(-length // tile)


def _tiles_of_keys(i: Array, tile: int, padded: int, spec: AttentionSpec, offset: Index) -> tuple[Any, Any]:
    """Return the half-open range of key tiles that query block i may attend to; it may be empty."""
    count = padded // tile
    last = jnp.clip((i * tile + offset + tile - 1) // tile + 1, 0, count) if spec.is_causal else count
    first = 0 if spec.window is None else jnp.maximum(i * tile + offset - spec.window + 1, 0) // tile
    return first, last


def _meeting(
    keys: KeySide, spec: AttentionSpec, distance: Distance, tile: int, length: int
) -> Callable[[Array, Array], tuple[formula.Keep, formula.Terms | None]]:
    """Return a function (query block i, key block j) → (keep, E_ts). Arrays are padded; ``length`` is unpadded."""
    across = None
    if spec.log_decay is not None:
        assert keys.log_decay is not None
        are_one = distance.tokens == 0
        across = decay.stretches(spec.log_decay, keys.log_decay, tile, are_one, distance.log_decay)

    def tokens(block: Array, shift: Index, segments: Array | None) -> Tokens:
        if segments is not None:
            segments = jax.lax.dynamic_slice_in_dim(segments, block * tile, tile, axis=1)
        return Tokens(shift + block * tile + jnp.arange(tile), segments)

    def meet(i: Array, j: Array) -> tuple[formula.Keep, formula.Terms | None]:
        rows, columns = tokens(i, distance.tokens, spec.segment_ids), tokens(j, 0, keys.segments)
        if length % tile:  # causality hides padding from queries of the same stretch, but not of a later one
            columns = columns._replace(exist=columns.positions < length)
        mask = None if spec.mask is None else jax.lax.dynamic_slice(spec.mask, (i * tile, j * tile), (tile, tile))
        terms = None if across is None else across.tile(i, j)
        if keys.log_input_gate is not None:
            gate = jax.lax.dynamic_slice_in_dim(keys.log_input_gate, j * tile, tile, axis=2)[:, :, None]
            terms = gate if terms is None else terms + gate
        return formula.may_attend(rows, columns, spec, mask), terms

    return meet


def _pad(x: Any, padded: int, axis: int = -2) -> Any:
    """Pad the sequence, on the given axis, with zeros at its end; None stays None."""
    if x is None:
        return None
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, padded - x.shape[axis])
    return jnp.pad(x, widths)


def _pad_spec(spec: AttentionSpec, padded: int) -> AttentionSpec:
    """Pad the spec's arrays. In the padding a given mask is False and nothing decays."""
    mask = None if spec.mask is None else jnp.pad(spec.mask, (0, padded - spec.mask.shape[0]))
    of_tokens = {name: _pad(getattr(spec, name), padded, -1) for name in ("segment_ids", "log_decay", "log_input_gate")}
    return replace(spec, mask=mask, **of_tokens)


def _pad_keys(keys: KeySide, padded: int) -> KeySide:
    k, v, *of_tokens = keys
    return KeySide(_pad(k, padded), _pad(v, padded), *(_pad(x, padded, -1) for x in of_tokens))


def _cut(x: Array, i: Array, tile: int) -> Array:
    """Return block i of the sequence, which is the last axis but one."""
    return jax.lax.dynamic_slice_in_dim(x, i * tile, tile, axis=x.ndim - 2)


def _put(x: Array, block: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), i * block.shape[-2], axis=x.ndim - 2)


def _add(x: Array, block: Array, i: Array) -> Array:
    return _put(x, _cut(x, i, block.shape[-2]) + block, i)
