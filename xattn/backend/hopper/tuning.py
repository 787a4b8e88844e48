"""How the Hopper kernels cut their work and which form of 2^x they take. Importing this module imports no jax.

None of these numbers has been measured yet: they are those of a forward prototype (64×128 tiles, two stages) and of
arithmetic. ``xattn bench kernels`` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Exponential = Literal["hardware", "polynomial3", "polynomial4"]

ROWS = 64
"""Rows of a tile that a compute warpgroup keeps: those of one wgmma instruction."""

COMPUTE = 2
"""Compute warpgroups of a block; one more moves memory."""

BLOCK = ROWS * COMPUTE
"""Rows that a block of warpgroups keeps. A sequence is padded to a multiple of it, and of no more."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Numbers that change the time and the rounding, not the meaning."""

    exponential: Exponential = "polynomial3"
    """Form of 2^x (xattn/backend/hopper/tile.py)."""
    keys: Literal[64, 128] = 128
    """Keys of a tile in the forward."""
    keys_dq: Literal[64, 128] = 128
    """Keys of a tile in the kernel of q's gradient."""
    queries_dkv: Literal[64, 128] = 64
    """Queries of a tile in the kernel of k's and v's gradients."""
    stages: int = 2
    """Tiles of each streamed array that shared memory holds, at least 1."""
    take_turns: bool = True
    """Whether the forward's compute warpgroups take turns: one multiplies while the other computes weights."""

    @classmethod
    def of(cls, dtype: str) -> Tuning:
        """The numbers for bfloat16 or float16; the finer one takes the finer polynomial."""
        return cls(exponential="polynomial4" if dtype == "float16" else "polynomial3")
