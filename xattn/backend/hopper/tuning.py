"""How the Hopper kernels cut their work and which form of sigmoid they take. Importing this module imports no jax.

None of these numbers has been measured yet: they are those of a forward prototype (64×128 tiles, two stages) and of
arithmetic. ``xattn bench kernels`` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["hardware", "polynomial3", "polynomial4", "split"]

WIDTHS = (64, 128)
"""Head widths that the kernels are written for."""

ROWS = 64
"""Rows of a tile that a compute warpgroup keeps: those of one wgmma instruction."""

COMPUTE = 2
"""Compute warpgroups of a block; one more moves memory."""

BLOCK = ROWS * COMPUTE
"""Rows that a block of warpgroups keeps. A sequence is padded to a multiple of it, and of no more."""

SHARED_MEMORY = 232_448
"""Bytes that a block may have at compute capability 9.0."""


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
    """Tiles of each streamed array that shared memory holds, at least 1; at most what :func:`refuse_what_does_not_fit`
    lets pass in each of the three kernels."""
    take_turns: bool = True
    """Whether the forward's compute warpgroups take turns: one multiplies while the other computes weights."""


def refuse_what_does_not_fit(*, kept: int, tile: int, stages: int, width: int) -> None:
    """A block keeps BLOCK rows of ``kept`` arrays and streams ``stages`` tiles, of ``tile`` rows, of each of two; a row
    has ``width`` numbers of two bytes: 2 · width · (kept · BLOCK + 2 · stages · tile) bytes, and 1 KiB for barriers and
    sums, must be at most SHARED_MEMORY.

    kept is 1 in the forward and 2 in both kernels of the backward.

    Raises:
        ValueError: they are more, or stages is less than 1.
    """
    needed = 2 * width * (kept * BLOCK + 2 * stages * tile) + 1024
    if stages < 1 or needed > SHARED_MEMORY:
        raise ValueError(
            f"stages = {stages} tiles of {tile} rows, head width {width}: a block needs {needed:,} bytes of shared "
            f"memory, and may have {SHARED_MEMORY:,}; stages ≥ 1"
        )
