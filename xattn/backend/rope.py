"""Rotary position embedding of interleaved pairs (2i, 2i + 1), in float32 whatever the dtype of the features.

Source: Su et al., RoFormer, arXiv 2104.09864, section 3.4.
"""

from __future__ import annotations

import math
from numbers import Real

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from xattn.backend import xla_cpu

Theta = float | Float[Array, ""]


def precompute_freqs(
    feat_dim: int, max_length: int, theta: Theta = 10000.0
) -> tuple[Float32[Array, "{max_length} {feat_dim}//2"], Float32[Array, "{max_length} {feat_dim}//2"]]:
    """Return sine and cosine of position · theta^(−2i/feat_dim) for the positions 0 … max_length − 1.

    Args:
        feat_dim: head width DHQK; even.
        max_length: number of positions.
        theta: wavelength base, positive; a number or a traced scalar.

    Returns:
        ``(sin, cos)``; row 0 is exactly (0, 1). The relative error of an angle is up to 6e-8: 2.4e-4 at position 4096.

    Raises:
        ValueError: feat_dim is odd or not positive, max_length is negative, or theta is a number that is not
            positive and finite, or an array that is not a scalar.
    """
    if max_length < 0:
        raise ValueError(f"max_length must not be negative, got {max_length}")
    _check_width(feat_dim)
    return rotary_tables(jnp.arange(max_length), feat_dim, theta)


def apply_rotary_emb(
    xq: Float[Array, "*heads S DHQK"],
    xk: Float[Array, "*kv_heads S DHQK"],
    freqs_sin: Float[Array, "rows DHQK//2"] | None = None,
    freqs_cos: Float[Array, "rows DHQK//2"] | None = None,
    theta: Theta = 10000.0,
) -> tuple[Float[Array, "*heads S DHQK"], Float[Array, "*kv_heads S DHQK"]]:
    """Rotate the pair (2i, 2i + 1) of the features at position t by the angle t · theta^(−2i/DHQK).

    Args:
        xq, xk: queries and keys; their leading axes may differ (grouped heads).
        freqs_sin, freqs_cos: both or neither; the first S rows are used. None uses :func:`precompute_freqs`.
        theta: wavelength base, used only without tables.

    Returns:
        ``(xq, xk)`` rotated, in their own dtypes; the rotation itself runs in float32.

    Raises:
        ValueError: only one table is given, a table has the wrong shape, DHQK is odd, or xq and xk differ in S or DHQK.
    """
    if xq.shape[-2:] != xk.shape[-2:]:
        raise ValueError(f"xq and xk must agree in their last two axes (S, DHQK), got {xq.shape} and {xk.shape}")
    length, width = xq.shape[-2:]
    if freqs_sin is None and freqs_cos is None:
        freqs_sin, freqs_cos = precompute_freqs(width, length, theta)
    elif freqs_sin is None or freqs_cos is None:
        raise ValueError("freqs_sin and freqs_cos go together: give both or neither")
    _check_width(width)
    for name, table in (("freqs_sin", freqs_sin), ("freqs_cos", freqs_cos)):
        if table.ndim != 2 or table.shape[0] < length or table.shape[1] != width // 2:
            raise ValueError(f"{name} must have shape (at least {length}, {width // 2}), got {table.shape}")
    sin, cos = freqs_sin[:length], freqs_cos[:length]
    return rotate(xq, sin, cos), rotate(xk, sin, cos)


def rotary_tables(
    positions: Int[Array, "*shape"], feat_dim: int, theta: Theta
) -> tuple[Float32[Array, "*shape {feat_dim}//2"], Float32[Array, "*shape {feat_dim}//2"]]:
    """Compute :func:`precompute_freqs` at arbitrary positions. feat_dim may be 0, which rotates nothing."""
    if feat_dim == 0:
        empty = jnp.zeros((*positions.shape, 0), jnp.float32)
        return empty, empty
    _check_width(feat_dim)
    exponents = jnp.arange(0, feat_dim, 2, dtype=jnp.float32) / feat_dim
    # A power, not exp(−exponent · log theta): rounding that product would increase the error of the angle tenfold.
    angles = jnp.multiply.outer(positions.astype(jnp.float32), checked_scalar("theta", theta) ** -exponents)
    return xla_cpu.materialised(jnp.sin(angles)), xla_cpu.materialised(jnp.cos(angles))


def rotate(
    x: Float[Array, "*heads S DHQK"],
    sin: Float[Array, "#S pairs"],
    cos: Float[Array, "#S pairs"],
    scale: Float32[Array, ""] | None = None,
) -> Float[Array, "*heads S DHQK"]:
    """Rotate x and multiply it by ``scale``, in float32; return it in x's dtype. −sin rotates back.

    The tables cover the first pairs of x; the remaining channels are only scaled.
    """
    wide, turning = x.astype(jnp.float32), 2 * sin.shape[-1]
    pairs = wide[..., :turning].reshape(*x.shape[:-1], sin.shape[-1], 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    lead = tuple(range(x.ndim - sin.ndim))
    sin, cos = jnp.expand_dims(sin, lead), jnp.expand_dims(cos, lead)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(*x.shape[:-1], turning)
    whole = turned if turning == x.shape[-1] else jnp.concatenate([turned, wide[..., turning:]], axis=-1)
    return (whole if scale is None else whole * scale).astype(x.dtype)


def checked_scalar(name: str, value: float | Float[Array, ""]) -> Float32[Array, ""]:
    """Return a float32 scalar. Check a number's value, but only an array's shape, since it may be traced."""
    if isinstance(value, Real) and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    array = jnp.asarray(value, jnp.float32)
    if array.ndim:
        raise ValueError(f"{name} must be a scalar, got shape {array.shape}")
    return array


def _check_width(feat_dim: int) -> None:
    if feat_dim < 2 or feat_dim % 2:
        raise ValueError(f"the head width DHQK must be even and at least 2 for RoPE, got {feat_dim}")
