"""Mosaic GPU kernels for Hopper (sm_90a): attention with weights that need no row statistics, sigmoid and ``none``.

**Not yet run on a GPU**. They compile for one, and they run in JAX's GPU interpreter with the accumulating wgmma
replaced by a plain product (docs/kernels.md).

A weight depends on its own logit only, so nothing is rescaled and nothing is saved for the backward pass. Two
warpgroups keep queries (forward, dQ) or keys (dK and dV), and sum over tiles of the other side::

    forward       O  = Σ_tiles P V
    q's gradient  dQ = Σ_tiles dS K · scale,         dS = dO Vᵀ ∘ P'
    k's, v's      dK = Σ_tiles dSᵀ Q · scale,        dV = Σ_tiles Pᵀ dO

with P = σ(Q Kᵀ · scale + bias), P' = P ∘ (1 − P) and d bias = Σ dS, or P = Q Kᵀ · scale and P' = 1; P and P' are 0
where a query may not attend. Products take the inputs' dtype and accumulate in float32. P and dS stay float32 until
they enter a product. Here S is a multiple of BLOCK, and D is the common head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from xattn.backend.hopper import block, tile
from xattn.backend.hopper.block import F32, WGMMA, Block, multiply, multiply_add
from xattn.backend.hopper.sizes import BLOCK, COMPUTE, ROWS, Form, Tiles, refuse_what_does_not_fit

Pair = tuple[Array, Array]


class Arrays(NamedTuple):
    """What a call attends with. All have one dtype, except the bias."""

    q: Array
    """(B, NH, S, D), rotated."""
    k: Array
    """(B, NKV, S, D), rotated."""
    v: Array
    """Like k."""
    bias: Array
    """(B, NH), float32."""


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """Everything that determines a kernel besides its arrays."""

    sigmoid: bool
    """True for σ with a bias, False for the identity (``none``)."""
    causal: bool
    """Whether a query attends only to keys at or before it, rather than to all."""


def forward(arrays: Arrays, meaning: Meaning, tiles: Tiles) -> Array:
    """Return the output (B, NH, S, D)."""
    q, k = arrays.q, arrays.k
    batch, heads, length, width = q.shape
    group, keys = heads // k.shape[1], tiles.keys
    refuse_what_does_not_fit(kept=1, tile=keys, stages=tiles.stages, width=width)

    def attention_forward(*refs: Any) -> None:
        q_ref, k_ref, v_ref, bias_ref, out_ref, kept, ring, turn = refs
        at = Block.here(length, last_first=meaning.causal)
        whole, steps = tile.tiles_of_keys(at.first, BLOCK, keys, length, meaning.causal)

        def source(step: Any) -> list[Any]:
            return [x.at[at.batch, lax.div(at.head, group), pl.ds(step * keys, keys)] for x in (k_ref, v_ref)]

        def take_turn() -> None:
            if tiles.take_turns:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        @pl.when(at.warpgroup < COMPUTE)
        def _compute() -> None:
            plgpu.set_max_registers(block.COMPUTE_REGISTERS, action="increase")
            (q_tile,) = block.load([q_ref.at[at.my_rows]], kept, at.warpgroup)
            weigh = _weigher(meaning, tiles.form, bias_ref, at.batch, at.head, width)

            def step(masked: bool, n: Any, out: Array) -> Array:
                (k_tile, v_tile), (k_ready, v_ready), (k_free, v_free) = block.slot(ring, n)
                plgpu.barrier_wait(k_ready)
                products = multiply(q_tile, k_tile.T, meanwhile=take_turn)
                plgpu.barrier_arrive(k_free)
                weights = _causal(weigh(products)[0], masked, at.my_first, n * keys).astype(q.dtype)
                take_turn()
                plgpu.barrier_wait(v_ready)
                out = multiply_add(out, weights, v_tile)
                plgpu.barrier_arrive(v_free)
                return out

            # The second warpgroup runs half a step behind: one multiplies while the other computes weights.
            pl.when(at.warpgroup == 1)(take_turn)
            out = lax.fori_loop(0, whole, partial(step, False), block.zeros(ROWS, width))
            out = lax.fori_loop(whole, steps, partial(step, True), out)
            pl.when(at.warpgroup == 0)(take_turn)
            block.store([(out, q_tile, out_ref.at[at.my_rows])])

        pl.when(at.warpgroup == COMPUTE)(lambda: block.stream(ring, steps, source))

    return block.launch(
        attention_forward,
        grid=(heads, length // BLOCK, batch),
        out=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch=[block.kept_tiles(q, 1), block.ring_of(k, keys, tiles.stages), plgpu.Barrier(num_arrivals=COMPUTE)],
    )(*arrays)


def gradient_of_q(arrays: Arrays, g: Array, meaning: Meaning, tiles: Tiles) -> Pair:
    """Return dQ (B, NH, S, D) and Σ_s dS (B, NH, S) in float32 (0 under ``none``); g is the gradient of the output."""
    q, k = arrays.q, arrays.k
    batch, heads, length, width = q.shape
    group, keys = heads // k.shape[1], tiles.keys_dq
    refuse_what_does_not_fit(kept=2, tile=keys, stages=tiles.stages, width=width)

    def attention_gradient_of_q(*refs: Any) -> None:
        q_ref, k_ref, v_ref, bias_ref, g_ref, d_q_ref, sums_ref, kept, ring, sums_room = refs
        at = Block.here(length, last_first=meaning.causal)
        whole, steps = tile.tiles_of_keys(at.first, BLOCK, keys, length, meaning.causal)

        def source(step: Any) -> list[Any]:
            return [x.at[at.batch, lax.div(at.head, group), pl.ds(step * keys, keys)] for x in (k_ref, v_ref)]

        @pl.when(at.warpgroup < COMPUTE)
        def _compute() -> None:
            plgpu.set_max_registers(block.COMPUTE_REGISTERS, action="increase")
            q_tile, g_tile = block.load([q_ref.at[at.my_rows], g_ref.at[at.my_rows]], kept, at.warpgroup)
            weigh = _weigher(meaning, tiles.form_backward, bias_ref, at.batch, at.head, width)

            def step(masked: bool, n: Any, carry: Pair) -> Pair:
                d_q, sums = carry
                (k_tile, v_tile), (k_ready, v_ready), (k_free, v_free) = block.slot(ring, n)
                plgpu.barrier_wait(k_ready)
                # Under none the derivative is 1, which needs no logits.
                slope = weigh(multiply(q_tile, k_tile.T))[1] if meaning.sigmoid else 1.0
                plgpu.barrier_wait(v_ready)
                d_logits = multiply(g_tile, v_tile.T) * slope
                plgpu.barrier_arrive(v_free)
                d_logits = _causal(d_logits, masked, at.my_first, n * keys)
                if meaning.sigmoid:
                    sums = sums + jnp.sum(d_logits, axis=1)
                d_q = multiply_add(d_q, d_logits.astype(q.dtype), k_tile)
                plgpu.barrier_arrive(k_free)
                return d_q, sums

            carry = (block.zeros(ROWS, width), plgpu.layout_cast(jnp.zeros((ROWS,), F32), WGMMA.reduce(1)))
            carry = lax.fori_loop(0, whole, partial(step, False), carry)
            d_q, sums = lax.fori_loop(whole, steps, partial(step, True), carry)
            d_q = d_q * (1 / math.sqrt(width))
            room = sums_room.at[at.warpgroup]
            block.store([(d_q, q_tile, d_q_ref.at[at.my_rows]), (sums, room, sums_ref.at[at.my_rows])])

        pl.when(at.warpgroup == COMPUTE)(lambda: block.stream(ring, steps, source))

    return block.launch(
        attention_gradient_of_q,
        grid=(heads, length // BLOCK, batch),
        out=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:3], F32)],
        scratch=[block.kept_tiles(q, 2), block.ring_of(k, keys, tiles.stages), plgpu.SMEM((COMPUTE, ROWS), F32)],
    )(*arrays, g)


def gradients_of_k_and_v(arrays: Arrays, g: Array, meaning: Meaning, tiles: Tiles) -> Pair:
    """Return dK and dV (B, NKV, S, D). The kernel sums over the query heads of a key/value head, in float32."""
    q, k = arrays.q, arrays.k
    batch, heads, length, width = q.shape
    group, rows = heads // k.shape[1], tiles.queries_dkv
    refuse_what_does_not_fit(kept=2, tile=rows, stages=tiles.stages, width=width)

    def attention_gradients_of_k_and_v(*refs: Any) -> None:
        q_ref, k_ref, v_ref, bias_ref, g_ref, d_k_ref, d_v_ref, kept, ring = refs
        # The blocks of the first keys have the most work, and already come first.
        at = Block.here(length, last_first=False)
        first, whole, end = tile.tiles_of_queries(at.first, BLOCK, rows, length, meaning.causal)
        a_head = end - first

        def source(step: Any) -> list[Any]:
            head = at.head * group + lax.div(step, a_head)
            queries = pl.ds((first + lax.rem(step, a_head)) * rows, rows)
            return [x.at[at.batch, head, queries] for x in (q_ref, g_ref)]

        @pl.when(at.warpgroup < COMPUTE)
        def _compute() -> None:
            plgpu.set_max_registers(block.COMPUTE_REGISTERS, action="increase")
            k_tile, v_tile = block.load([k_ref.at[at.my_rows], v_ref.at[at.my_rows]], kept, at.warpgroup)

            def of_head(member: Any, carry: Pair) -> Pair:
                weigh = _weigher(meaning, tiles.form_backward, bias_ref, at.batch, at.head * group + member, width)

                # Tiles are (keys, queries) here, because both products sum over queries, which must be the columns.
                def step(masked: bool, n: Any, carry: Pair) -> Pair:
                    d_k, d_v = carry
                    (q_tile, g_tile), (q_ready, g_ready), (q_free, g_free) = block.slot(
                        ring, member * a_head + n - first
                    )
                    plgpu.barrier_wait(q_ready)
                    weights, slope = weigh(multiply(k_tile, q_tile.T))
                    weights = _causal(weights, masked, n * rows, at.my_first, transposed=True)
                    plgpu.barrier_wait(g_ready)
                    d_v = multiply_add(d_v, weights.astype(q.dtype), g_tile)
                    d_logits = multiply(v_tile, g_tile.T) * slope
                    plgpu.barrier_arrive(g_free)
                    d_logits = _causal(d_logits, masked, n * rows, at.my_first, transposed=True)
                    d_k = multiply_add(d_k, d_logits.astype(q.dtype), q_tile)
                    plgpu.barrier_arrive(q_free)
                    return d_k, d_v

                carry = lax.fori_loop(first, whole, partial(step, True), carry)
                return lax.fori_loop(whole, end, partial(step, False), carry)

            d_k, d_v = lax.fori_loop(0, group, of_head, (block.zeros(ROWS, width), block.zeros(ROWS, width)))
            d_k = d_k * (1 / math.sqrt(width))
            block.store([(d_k, k_tile, d_k_ref.at[at.my_rows]), (d_v, v_tile, d_v_ref.at[at.my_rows])])

        pl.when(at.warpgroup == COMPUTE)(lambda: block.stream(ring, group * a_head, source))

    return block.launch(
        attention_gradients_of_k_and_v,
        grid=(k.shape[1], length // BLOCK, batch),
        out=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(k.shape, k.dtype)],
        scratch=[block.kept_tiles(k, 2), block.ring_of(q, rows, tiles.stages)],
    )(*arrays, g)


def _weigher(meaning: Meaning, form: Form, bias_ref: Any, batch: Any, head: Any, width: int) -> Any:
    """Return a function from products of queries and keys to (weights, their derivative by logit), for one head."""
    scale = 1 / math.sqrt(width)
    if not meaning.sigmoid:
        return lambda products: (products * scale, 1.0)
    return partial(tile.sigmoid, scale=scale, bias=bias_ref[batch, head], form=form)


def _causal(x: Array, masked: bool, first_query: Any, first_key: Any, *, transposed: bool = False) -> Array:
    """Return x where a query may attend, else 0. x is (queries, keys), or (keys, queries) if ``transposed``."""
    if not masked:
        return x
    queries, keys = (
        plgpu.broadcasted_iota(jnp.int32, x.shape, axis, layout=WGMMA) for axis in ((1, 0) if transposed else (0, 1))
    )
    return jnp.where(tile.may_attend(first_query, queries, first_key, keys), x, 0.0)
