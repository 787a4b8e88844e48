"""Mosaic GPU kernels for Hopper (sm_90a): attention whose weights need no statistics of a row, sigmoid and ``none``.

**Never run on a GPU so far**: lowered for one, and run in JAX's GPU interpreter with the accumulating wgmma replaced by
a plain product (docs/kernels.md).

A block is three warpgroups. Each of two keeps 64 rows of its own: queries in the forward and for q's gradient, keys for
those of k and v. The third streams tiles of the other side through a ring in shared memory, by the copy engine (TMA).
A weight depends on its own logit alone, so nothing is rescaled and nothing is saved for the backward::

    forward       O  = Σ_tiles P V
    q's gradient  dQ = Σ_tiles dS K · scale,         dS = dO Vᵀ ∘ P'
    k's, v's      dK = Σ_tiles dSᵀ Q · scale,        dV = Σ_tiles Pᵀ dO

with P = σ(Q Kᵀ · scale + bias), P' = P ∘ (1 − P) and d bias = Σ dS, or P = Q Kᵀ · scale and P' = 1; P and P' are 0
where a query may not attend. Products take the inputs' dtype and accumulate in float32; P and dS are float32 until they
meet one.

Shape letters: B batch, NH heads, NKV key/value heads, S sequence (here a multiple of BLOCK), D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from xattn.backend.hopper import tile
from xattn.backend.hopper.tuning import BLOCK, COMPUTE, ROWS, Tuning

F32 = jnp.float32
WGMMA = plgpu.Layout.WGMMA

# setmaxnreg, as in JAX's own attention for this chip: 2 · 232 + 40 registers a thread of each, of 512.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What shapes a kernel besides its arrays."""

    sigmoid: bool
    """σ with a bias, else the identity (``none``)."""
    causal: bool
    """A query attends to the keys at or before it, else to all."""


def forward(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, meaning: Meaning, tuning: Tuning) -> jax.Array:
    """out (B, NH, S, D) of q (B, NH, S, D), k and v (B, NKV, S, D), all rotated, of one dtype; bias (B, NH) float32."""
    batch, heads, length, width = q.shape
    group, keys = heads // k.shape[1], tuning.keys

    def body(q_ref: Any, k_ref: Any, v_ref: Any, bias_ref: Any, out_ref: Any, kept: Any, ring: Any, turn: Any) -> None:
        at = _Block.here(length, last_first=meaning.causal)
        whole, steps = tile.tiles_of_keys(at.first, BLOCK, keys, length, meaning.causal)
        take_turn = partial(_pass, turn) if tuning.take_turns else _nothing

        def source(step: Any) -> list[Any]:
            return [x.at[at.batch, lax.div(at.head, group), pl.ds(step * keys, keys)] for x in (k_ref, v_ref)]

        @pl.when(at.warpgroup < COMPUTE)
        def _compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            (q_smem,) = _load([q_ref.at[at.batch, at.head, at.rows]], kept, at.warpgroup)
            weigher = _Weigher.of(meaning, tuning, bias_ref, at.batch, at.head, width)

            def step(masked: bool, n: Any, out: jax.Array) -> jax.Array:
                (k_smem, v_smem), (k_ready, v_ready), (k_free, v_free) = _slot(ring, n)
                plgpu.barrier_wait(k_ready)
                logits = multiply(q_smem, k_smem.T, meanwhile=take_turn)
                plgpu.barrier_arrive(k_free)
                weights, _ = weigher.weights(logits)
                weights = _masked(weights, masked, at.my_first, n * keys).astype(q.dtype)
                take_turn()
                plgpu.barrier_wait(v_ready)
                out = multiply_add(out, weights, v_smem)
                plgpu.barrier_arrive(v_free)
                return out

            pl.when(at.warpgroup == 1)(take_turn)
            out = lax.fori_loop(0, whole, partial(step, False), _zeros(ROWS, width))
            out = lax.fori_loop(whole, steps, partial(step, True), out)
            pl.when(at.warpgroup == 0)(take_turn)
            _store([(out, q_smem, out_ref.at[at.batch, at.head, at.rows])])

        @pl.when(at.warpgroup == COMPUTE)
        def _memory() -> None:
            _stream(ring, steps, source)

    return _launch(
        body,
        grid=(heads, length // BLOCK, batch),
        out=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch=[_kept(q, 1), _ring(k, keys, tuning.stages), plgpu.Barrier(num_arrivals=COMPUTE)],
    )(q, k, v, bias)


def gradient_of_q(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, g: jax.Array, meaning: Meaning, tuning: Tuning
) -> tuple[jax.Array, jax.Array]:
    """dQ (B, NH, S, D) and Σ_s dS (B, NH, S) in float32, of the forward's arguments and the output's cotangent g."""
    batch, heads, length, width = q.shape
    group, keys = heads // k.shape[1], tuning.keys_dq

    def body(*refs: Any) -> None:
        q_ref, k_ref, v_ref, bias_ref, g_ref, d_q_ref, sums_ref, kept, ring, sums_smem = refs
        at = _Block.here(length, last_first=meaning.causal)
        whole, steps = tile.tiles_of_keys(at.first, BLOCK, keys, length, meaning.causal)
        mine = (at.batch, at.head, at.rows)

        def source(step: Any) -> list[Any]:
            return [x.at[at.batch, lax.div(at.head, group), pl.ds(step * keys, keys)] for x in (k_ref, v_ref)]

        @pl.when(at.warpgroup < COMPUTE)
        def _compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            q_smem, g_smem = _load([q_ref.at[mine], g_ref.at[mine]], kept, at.warpgroup)
            weigher = _Weigher.of(meaning, tuning, bias_ref, at.batch, at.head, width)

            def step(masked: bool, n: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                d_q, sums = carry
                (k_smem, v_smem), (k_ready, v_ready), (k_free, v_free) = _slot(ring, n)
                plgpu.barrier_wait(k_ready)
                # The derivative of none is 1: it needs no logits.
                slope = weigher.weights(multiply(q_smem, k_smem.T))[1] if meaning.sigmoid else 1.0
                plgpu.barrier_wait(v_ready)
                d_logits = multiply(g_smem, v_smem.T) * slope
                plgpu.barrier_arrive(v_free)
                d_logits = _masked(d_logits, masked, at.my_first, n * keys)
                if meaning.sigmoid:
                    sums = sums + jnp.sum(d_logits, axis=1)
                d_q = multiply_add(d_q, d_logits.astype(q.dtype), k_smem)
                plgpu.barrier_arrive(k_free)
                return d_q, sums

            carry = (_zeros(ROWS, width), plgpu.layout_cast(jnp.zeros((ROWS,), F32), WGMMA.reduce(1)))
            carry = lax.fori_loop(0, whole, partial(step, False), carry)
            d_q, sums = lax.fori_loop(whole, steps, partial(step, True), carry)
            d_q = d_q * (1 / math.sqrt(width))
            _store([(d_q, q_smem, d_q_ref.at[mine]), (sums, sums_smem.at[at.warpgroup], sums_ref.at[mine])])

        @pl.when(at.warpgroup == COMPUTE)
        def _memory() -> None:
            _stream(ring, steps, source)

    return _launch(
        body,
        grid=(heads, length // BLOCK, batch),
        out=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:3], F32)],
        scratch=[_kept(q, 2), _ring(k, keys, tuning.stages), plgpu.SMEM((COMPUTE, ROWS), F32)],
    )(q, k, v, bias, g)


def gradients_of_k_and_v(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, g: jax.Array, meaning: Meaning, tuning: Tuning
) -> tuple[jax.Array, jax.Array]:
    """dK and dV (B, NKV, S, D): the sum over the query heads of a key/value head is taken inside, in float32."""
    batch, heads, length, width = q.shape
    group, rows = heads // k.shape[1], tuning.queries_dkv

    def body(*refs: Any) -> None:
        q_ref, k_ref, v_ref, bias_ref, g_ref, d_k_ref, d_v_ref, kept, ring = refs
        # The first keys have the most queries: they come first as they are.
        at = _Block.here(length, last_first=False)
        first, whole, end = tile.tiles_of_queries(at.first, BLOCK, rows, length, meaning.causal)
        a_head = end - first
        mine = (at.batch, at.head, at.rows)

        def source(step: Any) -> list[Any]:
            head = at.head * group + lax.div(step, a_head)
            tokens = pl.ds((first + lax.rem(step, a_head)) * rows, rows)
            return [x.at[at.batch, head, tokens] for x in (q_ref, g_ref)]

        @pl.when(at.warpgroup < COMPUTE)
        def _compute() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            k_smem, v_smem = _load([k_ref.at[mine], v_ref.at[mine]], kept, at.warpgroup)
            mask = partial(_masked, transposed=True)

            def of_head(member: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                weigher = _Weigher.of(meaning, tuning, bias_ref, at.batch, at.head * group + member, width)

                def step(masked: bool, n: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                    d_k, d_v = carry
                    (q_smem, g_smem), (q_ready, g_ready), (q_free, g_free) = _slot(ring, member * a_head + n - first)
                    plgpu.barrier_wait(q_ready)
                    logits = multiply(k_smem, q_smem.T)
                    weights, slope = weigher.weights(logits)
                    weights = mask(weights, masked, n * rows, at.my_first)
                    plgpu.barrier_wait(g_ready)
                    d_v = multiply_add(d_v, weights.astype(q.dtype), g_smem)
                    d_logits = mask(multiply(v_smem, g_smem.T) * slope, masked, n * rows, at.my_first)
                    plgpu.barrier_arrive(g_free)
                    d_k = multiply_add(d_k, d_logits.astype(q.dtype), q_smem)
                    plgpu.barrier_arrive(q_free)
                    return d_k, d_v

                carry = lax.fori_loop(first, whole, partial(step, True), carry)
                return lax.fori_loop(whole, end, partial(step, False), carry)

            zeros = _zeros(ROWS, width)
            d_k, d_v = lax.fori_loop(0, group, of_head, (zeros, zeros))
            d_k = d_k * (1 / math.sqrt(width))
            _store([(d_k, k_smem, d_k_ref.at[mine]), (d_v, v_smem, d_v_ref.at[mine])])

        @pl.when(at.warpgroup == COMPUTE)
        def _memory() -> None:
            _stream(ring, group * a_head, source)

    return _launch(
        body,
        grid=(k.shape[1], length // BLOCK, batch),
        out=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        scratch=[_kept(k, 2), _ring(q, rows, tuning.stages)],
    )(q, k, v, bias, g)


def multiply(a: Any, b: Any, meanwhile: Callable[[], None] | None = None) -> jax.Array:
    """a · b of two references to shared memory, in float32; ``meanwhile`` runs while the tensor core works."""

    def run(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        if meanwhile is not None:
            meanwhile()
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), F32))


def multiply_add(total: jax.Array, a: jax.Array, b: Any) -> jax.Array:
    """total + a · b, float32; a is in registers, b a reference to shared memory.

    The GPU interpreter can't do this one (jax 0.12): its tests put a plain product here.
    """
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(total))


@dataclass(frozen=True)
class _Block:
    """Where a warpgroup stands."""

    batch: Any
    head: Any
    warpgroup: Any
    first: Any
    """First row of the block."""

    @classmethod
    def here(cls, length: int, *, last_first: bool) -> _Block:
        """``last_first`` starts the blocks of the last rows first: under a causal mask they have the most to do."""
        index = lax.axis_index("rows")
        index = length // BLOCK - 1 - index if last_first else index
        return cls(lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("warpgroup"), index * BLOCK)

    @property
    def my_first(self) -> Any:
        """First of the rows that this compute warpgroup keeps."""
        return self.first + self.warpgroup * ROWS

    @property
    def rows(self) -> Any:
        return pl.ds(self.my_first, ROWS)


@dataclass(frozen=True)
class _Weigher:
    """From products of queries and keys to weights, for one head."""

    meaning: Meaning
    tuning: Tuning
    scale: float
    bias: Any

    @classmethod
    def of(cls, meaning: Meaning, tuning: Tuning, bias_ref: Any, batch: Any, head: Any, width: int) -> _Weigher:
        return cls(meaning, tuning, 1 / math.sqrt(width), bias_ref[batch, head] if meaning.sigmoid else None)

    def weights(self, products: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """The weights and their derivative by the logits."""
        if self.meaning.sigmoid:
            return tile.sigmoid(products, self.scale, self.bias, self.tuning.exponential)
        return products * self.scale, 1.0


def _masked(x: jax.Array, masked: bool, first_query: Any, first_key: Any, *, transposed: bool = False) -> jax.Array:
    """x where a query may attend, else 0. It is (queries, keys), or the other way round where ``transposed``."""
    if not masked:
        return x
    queries, keys = (
        plgpu.broadcasted_iota(jnp.int32, x.shape, axis, layout=WGMMA) for axis in ((1, 0) if transposed else (0, 1))
    )
    return jnp.where(tile.may_attend(first_query, queries, first_key, keys), x, 0.0)


def _launch(body: Callable[..., None], *, grid: tuple[int, int, int], out: Any, scratch: list[Any]) -> Any:
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=grid,
        grid_names=("heads", "rows", "batch"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        # ex2.approx and rsqrt.approx: 2 units in the last place of float32.
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _smem(like: jax.Array, count: int, rows: int) -> Any:
    """``count`` tiles (rows, D) in the layout that wgmma and the copy engine share: rows of 128 bytes, swizzled."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((count, rows, like.shape[-1]), like.dtype, transforms=transforms)


def _kept(like: jax.Array, arrays: int) -> Any:
    """Room and barriers for what the compute warpgroups keep: ``arrays`` tiles each."""
    return tuple((_smem(like, COMPUTE, ROWS), plgpu.Barrier(num_barriers=COMPUTE)) for _ in range(arrays))


def _load(sources: list[Any], kept: Any, warpgroup: Any) -> list[Any]:
    """Copies this warpgroup's own tiles in and returns them once they are there."""
    for source, (smem, ready) in zip(sources, kept, strict=True):
        plgpu.copy_gmem_to_smem(source, smem.at[warpgroup], ready.at[warpgroup])
    for _, ready in kept:
        plgpu.barrier_wait(ready.at[warpgroup])
    return [smem.at[warpgroup] for smem, _ in kept]


def _store(results: list[tuple[jax.Array, Any, Any]]) -> None:
    """Each of (array, room in shared memory, destination), rounded to the room's dtype."""
    for array, smem, _ in results:
        smem[...] = array.astype(smem.dtype)
    plgpu.commit_smem()
    for _, smem, destination in results:
        plgpu.copy_smem_to_gmem(smem, destination, commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)


def _ring(like: jax.Array, rows: int, stages: int) -> Any:
    """Two arrays' tiles, ``stages`` of each, with a barrier a tile that it is ready and one that it is free again."""
    return (
        (_smem(like, stages, rows),) * 2,
        (plgpu.Barrier(num_barriers=stages),) * 2,
        (plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),) * 2,
    )


def _slot(ring: Any, step: Any) -> Any:
    """The ring at a step: (tiles, ready, free), two of each."""
    return tuple(tuple(x.at[lax.rem(step, _stages(ring))] for x in part) for part in ring)


def _stages(ring: Any) -> Any:
    return jnp.int32(ring[0][0].shape[0])


def _stream(ring: Any, steps: Any, source: Callable[[Any], list[Any]]) -> None:
    """The memory warpgroup: every step's tiles into the ring, each as soon as its slot is free."""
    plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

    def fill(step: Any, _: None, wait: bool) -> None:
        for reference, smem, ready, free in zip(source(step), *_slot(ring, step), strict=True):
            if wait:
                plgpu.barrier_wait(free)
            plgpu.copy_gmem_to_smem(reference, smem, ready)

    at_once = jnp.minimum(_stages(ring), steps)
    lax.fori_loop(0, at_once, partial(fill, wait=False), None)
    lax.fori_loop(at_once, steps, partial(fill, wait=True), None)


def _pass(turn: Any) -> None:
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _nothing() -> None:
    pass


def _zeros(rows: int, width: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((rows, width), F32), WGMMA)
