"""A short causal convolution of each channel along the sequence, which never crosses into another document.

Mamba (arXiv 2312.00752) and gated DeltaNet (arXiv 2412.06464), for example, place short convolutions before their
sequence mixing. There an activation follows them; here none does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Rows = Float[Array, "B W-1+S C"]
"""S tokens after the W − 1 tokens before them."""


class Recent(NamedTuple):
    """The last W − 1 tokens, which convolutions of width W still need. It holds zeros before the first token."""

    rows: Mapping[str, Float[Array, "*layers B W-1 C"]]
    """Name of a convolution → its inputs."""
    segment_ids: Int[Array, "*layers B W-1"] | None
    """None if all tokens are one document."""


def identity(key: jax.Array, shape: tuple[int, int]) -> Float[Array, "W C"]:
    """Return the initial taps, which give the token itself."""
    return jnp.zeros(shape).at[0].set(1)


def convolve(rows: Rows, taps: Float[Array, "W C"], runs: Sequence[Bool[Array, "B S"]] | None) -> Float[Array, "B S C"]:
    """Return Σ_j taps_j x_{t−j} for j = 0 … W − 1, computed in float32, in x's dtype.

    ``runs`` are from :func:`same_run`; taps that reach outside the token's run are ignored. None means a single run.
    """
    width, length = taps.shape[0], rows.shape[1] - taps.shape[0] + 1
    wide = rows.astype(jnp.float32)
    out = wide[:, width - 1 :] * taps[0]
    for j in range(1, width):
        earlier = wide[:, width - 1 - j : width - 1 - j + length]
        out += (earlier if runs is None else jnp.where(runs[j - 1][..., None], earlier, 0)) * taps[j]
    return out.astype(rows.dtype)


def same_run(segment_ids: Int[Array, "B W-1+S"], width: int) -> list[Bool[Array, "B S"]]:
    """Return, for j = 1 … W − 1, whether the tokens t − j … t all have the segment id of t."""
    length = segment_ids.shape[1] - width + 1
    of_all: list[jax.Array] = []
    for j in range(1, width):
        first = width - 1 - j
        same = segment_ids[:, first : first + length] == segment_ids[:, first + 1 : first + 1 + length]
        of_all.append(same & of_all[-1] if of_all else same)
    return of_all


def preceded(x: Array, before: Array | None, width: int) -> Array:
    """Prepend the W − 1 tokens ``before`` to x (B, S, …). None means that nothing precedes x, and prepends zeros."""
    if before is None:
        return jnp.pad(x, [(0, 0), (width - 1, 0), *[(0, 0)] * (x.ndim - 2)])
    return jnp.concatenate([before, x], axis=1)


def newest(rows: Array, width: int, seen: Array | int) -> Array:
    """Return the last W − 1 of the first W − 1 + ``seen`` of rows (B, W − 1 + S, …); later ones are padding."""
    return jax.lax.dynamic_slice_in_dim(rows, seen, width - 1, axis=1)
