"""The mathematics of one tile of weights, in plain JAX without Pallas.

The kernels call these functions on arrays in registers; the tests call them on a CPU and compare with float64.

Sigmoid is written for the chip. With e = 2^y and y = −(logit · scale + bias) · log2(e), one fused multiply-add::

    σ = 1 / (1 + e) = rsqrt(1 + e)²        σ' = σ · (1 − σ) = e · σ²

Neither a small weight nor 1 − σ is then a difference of large numbers (0.5 + 0.5 · tanh(x/2) loses weights near 1/n).
The special-function unit does two operations per element, or one with a polynomial or in a tile of small weights.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from xattn.backend.hopper.sizes import Form

Bound = int | Array

LOG2_E = math.log2(math.e)

# 2^f on [−0.5, 0.5], highest power first. Iteratively reweighted least squares minimised the largest relative error,
# to 7.5e-5 and 2.6e-6. Weights are rounded to bfloat16 (error up to 2e-3) or float16 (2.4e-4) right afterwards.
POLYNOMIALS: dict[str, tuple[float, ...]] = {
    "polynomial3": (0.05517166935950549, 0.24261113138275664, 0.6932609862029597, 0.9999280729973523),
    "polynomial4": (0.00957010194672151, 0.0559178615855367, 0.2402474483798678, 0.6931218145829678, 0.999999261439233),
}

# Largest log2 of e = exp(logit · scale + bias) in a tile that counts as small.
SMALL = -5.0
# 1.5 · 2^23: adding it to |y| < 2^22 rounds y to an integer, which ends up in the lowest bits of the sum.
MAGIC = 12582912.0


def exp2(y: Array, form: Form) -> Array:
    """Return 2^y in float32, with y clipped to at most 126; NaN stays NaN.

    ``hardware`` takes one operation of the special-function unit; a polynomial takes none. It splits y ≥ −126 into an
    integer n and f in [−0.5, 0.5], computes 2^f by Horner's rule, and multiplies by the float of exponent bits n + 127.
    """
    y = jnp.minimum(y, 126.0)
    if form == "hardware":
        return jnp.exp2(y)
    y = jnp.maximum(y, -126.0)
    shifted = y + MAGIC
    # Not y − (shifted − MAGIC): XLA simplifies that to 0, at least up to jaxlib 0.10. (Mosaic does not.)
    f = (MAGIC - shifted) + y
    first, second, *others = POLYNOMIALS[form]
    power = f * first + second
    for coefficient in others:
        power = power * f + coefficient
    # Times 2^23, modulo 2^32: MAGIC's upper bits overflow and vanish. (A product, since Mosaic can't shift here.)
    exponent = jax.lax.bitcast_convert_type(shifted, jnp.int32) * (1 << 23) + (127 << 23)
    return power * jax.lax.bitcast_convert_type(exponent, jnp.float32)


def sigmoid(logits: Array, scale: float, bias: Array, form: Form) -> tuple[Array, Array]:
    """Return σ(x) and σ'(x) of x = logits · scale + bias in float32. Logits are a tile, and bias is a scalar."""
    if form == "split":
        return _split_sigmoid(logits, scale, bias)
    e = exp2(logits * (-scale * LOG2_E) + bias * -LOG2_E, form)
    # |e| equals e. It shows the assembler that the sum is at least 1, so not subnormal: three instructions fewer.
    root = jax.lax.rsqrt(jnp.abs(e) + 1.0)
    weights = root * root
    return weights, e * weights * weights


def _split_sigmoid(logits: Array, scale: float, bias: Array) -> tuple[Array, Array]:
    """Compute e (1 − e (1 − e)), with e = exp(logit · scale + bias), in a tile of small weights; else use ``hardware``.

    The relative error is e³ ≤ 3.1e-5. Nearly every tile is small for a bias of −log n with n ≥ 2048 and logits of unit
    variance."""
    # By rows first: Mosaic has no layout for the maximum of a whole tile.
    largest = jnp.max(jnp.max(logits, axis=1)) * (scale * LOG2_E) + bias * LOG2_E

    def small(logits: Array) -> Array:
        e = jnp.exp2(logits * (scale * LOG2_E) + bias * LOG2_E)
        return e * (1.0 - e * (1.0 - e))

    def any_size(logits: Array) -> Array:
        return sigmoid(logits, scale, bias, "hardware")[0]

    weights = jax.lax.cond(largest < SMALL, small, any_size, logits)
    return weights, weights * (1.0 - weights)


def may_attend(first_query: Bound, queries: Array, first_key: Bound, keys: Array) -> Array:
    """Return the causal mask: a query attends to keys at or before it. Both arrays hold indices within a tile."""
    return queries + first_query >= keys + first_key


def tiles_of_keys(first_query: Bound, rows: int, keys: int, length: int, causal: bool) -> tuple[Bound, Bound]:
    """Return how many leading tiles of keys a block of ``rows`` queries attends to entirely, and to how many at all.

    Tiles between the two counts need a mask. ``length`` is a multiple of ``keys``.
    """
    if not causal:
        return length // keys, length // keys
    return _div(first_query + 1, keys), _div(first_query + rows + keys - 1, keys)


def tiles_of_queries(first_key: Bound, keys: int, rows: int, length: int, causal: bool) -> tuple[Bound, Bound, Bound]:
    """Return three indices of query tiles for a block of ``keys`` keys: the first that attends to any of them, the
    first that attends to all and so needs no mask, and the end. ``length`` is a multiple of ``rows``."""
    end = length // rows
    if not causal:
        return 0, 0, end
    whole = _div(first_key + keys - 1 + rows - 1, rows)
    return _div(first_key, rows), whole if isinstance(whole, int) else jnp.minimum(whole, end), end


def _div(x: Bound, y: int) -> Bound:
    """Return ⌊x / y⌋ of non-negative numbers, without the sign handling that ``//`` compiles to."""
    return x // y if isinstance(x, int) else jax.lax.div(x, jnp.int32(y))
