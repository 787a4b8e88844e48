"""How the Hopper kernels cut their work into tiles, and how they compute a tile. Importing it does not import jax.

None of these numbers has been chosen by measurement yet. They come from a forward prototype (64×128 tiles, two stages)
and from arithmetic. ``xattn bench kernels`` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["hardware", "polynomial3", "polynomial4", "split"]

# Activations and head widths that the kernels are written for.
ACTIVATIONS = ("sigmoid", "none")
WIDTHS = (64, 128)
# Rows of the tile that a compute warpgroup keeps: the rows of one wgmma instruction.
ROWS = 64
# Compute warpgroups per block; one more warpgroup copies memory.
COMPUTE = 2
# Rows that a block keeps. Sequences are padded to a multiple of it, so tiles must divide it.
BLOCK = ROWS * COMPUTE
# Bytes of shared memory per block at compute capability 9.0.
SHARED_MEMORY = 232_448


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The sizes of tiles, and how a tile is computed. They affect speed and rounding, but not the meaning."""

    form: Form = "hardware"
    """How the forward pass computes sigmoid (xattn/backend/hopper/tile.py)."""
    form_backward: Form = "hardware"
    """How the two kernels of the backward pass recompute it."""
    keys: int = 128
    """Keys per tile in the forward pass. Like the next two, it is 64 or 128."""
    keys_dq: int = 128
    """Keys per tile in the kernel for q's gradient."""
    queries_dkv: int = 64
    """Queries per tile in the kernel for the gradients of k and v."""
    stages: int = 2
    """How many tiles of each streamed array shared memory holds; see :func:`refuse_what_does_not_fit`."""
    take_turns: bool = True
    """Whether the compute warpgroups of the forward pass alternate: one multiplies while the other computes weights."""


def refuse_what_does_not_fit(*, kept: int, tile: int, stages: int, width: int) -> None:
    """Raise ValueError if a block needs more than SHARED_MEMORY bytes, or ``stages`` is less than 1.

    A block keeps BLOCK rows of ``kept`` arrays (1 forward, 2 backward). It streams two other arrays, with ``stages``
    tiles of ``tile`` rows each. A row has ``width`` numbers of two bytes. Barriers and sums take 1 KiB.
    """
    needed = 2 * width * (kept * BLOCK + 2 * stages * tile) + 1024
    if stages < 1 or needed > SHARED_MEMORY:
        raise ValueError(
            f"stages = {stages} tiles of {tile} rows, head width {width}: a block needs {needed:,} bytes of shared "
            f"memory, and may have {SHARED_MEMORY:,}; stages ≥ 1"
        )
