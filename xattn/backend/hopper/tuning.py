"""How the Hopper kernels cut their work and which form of sigmoid they take. Importing this module imports no jax.

None of these numbers has been measured yet: they are those of a forward prototype (64×128 tiles, two stages) and of
arithmetic. ``xattn bench kernels`` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["hardware", "polynomial3", "polynomial4", "split"]

# Head widths that the kernels are written for.
ACTIVATIONS = ("sigmoid", "none")
WIDTHS = (64, 128)
# Rows of a tile that a compute warpgroup keeps: those of one wgmma instruction.
ROWS = 64
# Compute warpgroups of a block; one more moves memory.
COMPUTE = 2
# Rows that a block of warpgroups keeps. A sequence is padded to a multiple of it, and of no more.
BLOCK = ROWS * COMPUTE
# Bytes that a block may have at compute capability 9.0.
SHARED_MEMORY = 232_448


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Numbers that change the time and the rounding, not the meaning."""

    form: Form = "hardware"
    """How the forward computes sigmoid (xattn/backend/hopper/tile.py)."""
    form_backward: Form = "hardware"
    """How the two kernels of the backward compute it again."""
    keys: int = 128
    """Keys of a tile in the forward; 64 or 128, as the two below."""
    keys_dq: int = 128
    """Keys of a tile in the kernel of q's gradient."""
    queries_dkv: int = 64
    """Queries of a tile in the kernel of k's and v's gradients."""
    stages: int = 2
    """Tiles of each streamed array that shared memory holds; see :func:`refuse_what_does_not_fit`."""
    take_turns: bool = True
    """Whether the forward's compute warpgroups take turns: one multiplies while the other computes weights."""


def refuse_what_does_not_fit(*, kept: int, tile: int, stages: int, width: int) -> None:
    """A ValueError if a block needs more than SHARED_MEMORY bytes, or stages is less than 1.

    A block keeps BLOCK rows of ``kept`` arrays (1 in the forward, 2 in the backward's kernels) and streams ``stages``
    tiles of ``tile`` rows of each of two. A row has ``width`` numbers of two bytes; barriers and sums take 1 KiB.
    """
    needed = 2 * width * (kept * BLOCK + 2 * stages * tile) + 1024
    if stages < 1 or needed > SHARED_MEMORY:
        raise ValueError(
            f"stages = {stages} tiles of {tile} rows, head width {width}: a block needs {needed:,} bytes of shared "
            f"memory, and may have {SHARED_MEMORY:,}; stages ≥ 1"
        )
