"""The mathematics of one tile of weights, in plain JAX without Pallas.

The kernels call these functions on arrays in registers; the tests call them on a CPU and compare with float64.

The sigmoid is written for the chip. With e = 2^y and y = −(logit · scale + bias) · log2(e), one fused multiply-add::

    σ = 1 / (1 + e) = rsqrt(1 + e)²        σ' = σ · (1 − σ) = e · σ²

So neither a small weight nor 1 − σ is a difference of large numbers (0.5 + 0.5 · tanh(x/2) loses weights near 1/n).
The special-function unit does two operations an element; one with a polynomial, or in a tile of small weights.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from xattn.backend.hopper.tuning import Form

Bound = int | Array

LOG2_E = math.log2(math.e)

# 2^f on [−0.5, 0.5], the highest power first, by iteratively reweighted least squares towards the smallest largest
# relative error: 7.5e-5 and 2.6e-6. A weight is rounded to bfloat16 (up to 2e-3) or float16 (2.4e-4) right after.
POLYNOMIALS: dict[str, tuple[float, ...]] = {
    "polynomial3": (0.05517166935950549, 0.24261113138275664, 0.6932609862029597, 0.9999280729973523),
    "polynomial4": (0.00957010194672151, 0.0559178615855367, 0.2402474483798678, 0.6931218145829678, 0.999999261439233),
}

# Largest log2 of a weight in a tile of small ones.
SMALL = -5.0
# 1.5 · 2^23: adding it to |y| < 2^22 rounds y to an integer, which then stands in the lowest bits of the sum.
MAGIC = 12582912.0


def exp2(y: Array, form: Form) -> Array:
    """2^y in float32, for y clipped to at most 126; NaN stays NaN.

    ``hardware`` is one operation of the special-function unit. The polynomials are none: y = n + f with n an integer
    and f in [−0.5, 0.5], 2^f by Horner's rule, times the float whose exponent bits are n + 127; y is at least −126.
    """
    y = jnp.minimum(y, 126.0)
    if form == "hardware":
        return jnp.exp2(y)
    y = jnp.maximum(y, -126.0)
    shifted = y + MAGIC
    # Not y − (shifted − MAGIC): XLA, up to jaxlib 0.10 at least, simplifies that to 0. (Mosaic does not.)
    f = (MAGIC - shifted) + y
    first, second, *others = POLYNOMIALS[form]
    power = f * first + second
    for coefficient in others:
        power = power * f + coefficient
    # Times 2^23, modulo 2^32: what MAGIC has in the upper bits falls out. (Mosaic multiplies where it can't shift.)
    exponent = jax.lax.bitcast_convert_type(shifted, jnp.int32) * (1 << 23) + (127 << 23)
    return power * jax.lax.bitcast_convert_type(exponent, jnp.float32)


def sigmoid(logits: Array, scale: float, bias: Array, form: Form) -> tuple[Array, Array]:
    """σ(logits · scale + bias) and its derivative by the sum, float32; logits are a tile, bias is a scalar."""
    if form == "split":
        return _split_sigmoid(logits, scale, bias)
    e = exp2(logits * (-scale * LOG2_E) + bias * -LOG2_E, form)
    # |e| is e. It tells the assembler that the sum is at least 1, and so not subnormal: three instructions fewer.
    root = jax.lax.rsqrt(jnp.abs(e) + 1.0)
    weights = root * root
    return weights, e * weights * weights


def _split_sigmoid(logits: Array, scale: float, bias: Array) -> tuple[Array, Array]:
    """e (1 − e (1 − e)), e = exp(logit · scale + bias), where all weights of the tile are small; else as ``hardware``.

    It is off by e³ ≤ 3.1e-5 of the weight. Under a bias of −log n with n ≥ 2048 and logits of unit variance nearly
    every tile is small."""
    # By rows first: Mosaic has no layout for the largest of a whole tile.
    largest = jnp.max(jnp.max(logits, axis=1)) * (scale * LOG2_E) + bias * LOG2_E

    def small(logits: Array) -> Array:
        e = jnp.exp2(logits * (scale * LOG2_E) + bias * LOG2_E)
        return e * (1.0 - e * (1.0 - e))

    def any_size(logits: Array) -> Array:
        return sigmoid(logits, scale, bias, "hardware")[0]

    weights = jax.lax.cond(largest < SMALL, small, any_size, logits)
    return weights, weights * (1.0 - weights)


def may_attend(first_query: Bound, queries: Array, first_key: Bound, keys: Array) -> Array:
    """Causal: the query at first_query + queries attends to keys at or before it. Both arrays count within a tile."""
    return queries + first_query >= keys + first_key


def tiles_of_keys(first_query: Bound, rows: int, keys: int, length: int, causal: bool) -> tuple[Bound, Bound]:
    """For a block of ``rows`` queries: how many tiles, from key 0 on, it attends to wholly, and how many at all.

    Those between need a mask. ``length`` is a multiple of ``keys``.
    """
    if not causal:
        return length // keys, length // keys
    return _div(first_query + 1, keys), _div(first_query + rows + keys - 1, keys)


def tiles_of_queries(first_key: Bound, keys: int, rows: int, length: int, causal: bool) -> tuple[Bound, Bound, Bound]:
    """For a block of ``keys`` keys: the first tile of queries that attends to any, the first that attends to all and so
    needs no mask, and the end. ``length`` is a multiple of ``rows``."""
    end = length // rows
    if not causal:
        return 0, 0, end
    whole = _div(first_key + keys - 1 + rows - 1, rows)
    return _div(first_key, rows), whole if isinstance(whole, int) else jnp.minimum(whole, end), end


def _div(x: Bound, y: int) -> Bound:
    """⌊x / y⌋ of numbers that are not negative, without the sign's handling that ``//`` compiles to."""
    return x // y if isinstance(x, int) else jax.lax.div(x, jnp.int32(y))
