"""The parts of the Hopper kernels: grid positions, tiles in shared memory, products, and the ring of streamed tiles.

A block has three warpgroups. Two of them keep ROWS rows each. The third runs ahead of them: it uses the copy engine
(TMA) to stream tiles of the other side through a ring in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from xattn.backend.hopper.sizes import BLOCK, COMPUTE, ROWS

F32 = jnp.float32
WGMMA = plgpu.Layout.WGMMA

# setmaxnreg, as in JAX's own attention for this chip: 2 · 232 + 40 registers of the 512 for one thread of each.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40


def launch(body: Callable[..., None], *, grid: tuple[int, int, int], out: Any, scratch: list[Any]) -> Any:
    """Return the kernel as a function of arrays. Its grid is (heads, blocks of rows, batch)."""
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=grid,
        grid_names=("heads", "rows", "batch"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        # ex2.approx and rsqrt.approx: their error is about 2 units in the last place of float32.
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


@dataclass(frozen=True)
class Block:
    """The position of a warpgroup in the grid."""

    batch: Any
    head: Any
    warpgroup: Any
    first: Any
    """First row of the block."""

    @classmethod
    def here(cls, length: int, *, last_first: bool) -> Block:
        """Return this warpgroup's position. ``last_first`` starts with the last rows, the most work under a mask."""
        index = lax.axis_index("rows")
        index = length // BLOCK - 1 - index if last_first else index
        return cls(lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("warpgroup"), index * BLOCK)

    @property
    def my_first(self) -> Any:
        """The first row that this compute warpgroup keeps."""
        return self.first + self.warpgroup * ROWS

    @property
    def my_rows(self) -> tuple[Any, ...]:
        """The index of its rows in an array (B, heads, S, …)."""
        return self.batch, self.head, pl.ds(self.my_first, ROWS)


def multiply(a: Any, b: Any, meanwhile: Callable[[], None] | None = None) -> Array:
    """Return a · b of two shared-memory references, in float32; ``meanwhile`` runs while the tensor core works."""

    def run(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, a, b)
        if meanwhile is not None:
            meanwhile()
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), F32))


def multiply_add(total: Array, a: Array, b: Any) -> Array:
    """Return total + a · b in float32, with a in registers and b a reference to shared memory.

    JAX's GPU interpreter can't run it (jax 0.12), so tests replace it by a plain product.
    """
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(total))


def zeros(rows: int, width: int) -> Array:
    """Return zeros in a warpgroup's registers, laid out as an accumulator."""
    return plgpu.layout_cast(jnp.zeros((rows, width), F32), WGMMA)


def _tiles(like: Array, count: int, rows: int) -> Any:
    """Allocate ``count`` tiles (rows, D) in the layout shared by wgmma and TMA: rows of 128 bytes, swizzled."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((count, rows, like.shape[-1]), like.dtype, transforms=transforms)


def kept_tiles(like: Array, arrays: int) -> Any:
    """Allocate the tiles that the compute warpgroups keep, ``arrays`` for each, with their barriers."""
    return tuple((_tiles(like, COMPUTE, ROWS), plgpu.Barrier(num_barriers=COMPUTE)) for _ in range(arrays))


def load(sources: list[Any], kept: Any, warpgroup: Any) -> list[Any]:
    """Copy this warpgroup's own tiles to shared memory, and return them when they have arrived."""
    for source, (tiles, ready) in zip(sources, kept, strict=True):
        plgpu.copy_gmem_to_smem(source, tiles.at[warpgroup], ready.at[warpgroup])
    for _, ready in kept:
        plgpu.barrier_wait(ready.at[warpgroup])
    return [tiles.at[warpgroup] for tiles, _ in kept]


def store(results: list[tuple[Array, Any, Any]]) -> None:
    """Store each (array, room in shared memory, destination), rounded to the room's dtype."""
    for array, room, _ in results:
        room[...] = array.astype(room.dtype)
    plgpu.commit_smem()
    for _, room, destination in results:
        plgpu.copy_smem_to_gmem(room, destination, commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0)


def ring_of(like: Array, rows: int, stages: int) -> Any:
    """Allocate ``stages`` tiles of each of two arrays. Each tile has two barriers, for ready and for free again."""
    return (
        (_tiles(like, stages, rows),) * 2,
        (plgpu.Barrier(num_barriers=stages),) * 2,
        (plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),) * 2,
    )


def slot(ring: Any, step: Any) -> Any:
    """Return the ring's (tiles, ready, free) at a step, two of each."""
    return tuple(tuple(x.at[lax.rem(step, _stages(ring))] for x in part) for part in ring)


def _stages(ring: Any) -> Any:
    return jnp.int32(ring[0][0].shape[0])


def stream(ring: Any, steps: Any, source: Callable[[Any], list[Any]]) -> None:
    """Copy every step's tiles into the ring, each as soon as its slot is free. The memory warpgroup runs this."""
    plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

    def fill(step: Any, _: None, wait: bool) -> None:
        for reference, tiles, ready, free in zip(source(step), *slot(ring, step), strict=True):
            if wait:
                plgpu.barrier_wait(free)
            plgpu.copy_gmem_to_smem(reference, tiles, ready)

    at_once = jnp.minimum(_stages(ring), steps)
    lax.fori_loop(0, at_once, partial(fill, wait=False), None)
    lax.fori_loop(at_once, steps, partial(fill, wait=True), None)
