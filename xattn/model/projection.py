"""The product of activations and a parameter matrix, with a gradient that is fast on each platform."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from xattn.backend.mesh import context_devices


def projection(x: jax.Array, kernel: jax.Array, dimension_numbers: Any = None, precision: Any = None) -> jax.Array:
    """Return x (…, in) · kernel (in, out), in x's dtype.

    ``precision="bfloat16"`` rounds all factors to bfloat16, including those of the gradients, and sums in float32.
    ``default`` is the device's own for this dtype. nn.Dense passes ``dimension_numbers``, always the same ones here.
    """
    # project merges batch and sequence into one axis, which can't stay split by sequence: each device would gather it.
    on_cpu = jax.default_backend() == "cpu" and context_devices() == 1
    if on_cpu or (precision == "bfloat16" and x.dtype != jnp.bfloat16):
        return project(x, kernel, precision, on_cpu)
    return x @ kernel


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(x: jax.Array, kernel: jax.Array, precision: str, on_cpu: bool) -> jax.Array:
    """Compute :func:`projection` with a custom gradient. ``on_cpu`` selects the form that is fast in XLA:CPU."""
    return _forward(x, kernel, precision, on_cpu)[0]


def _forward(
    x: jax.Array, kernel: jax.Array, precision: str, on_cpu: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    factors = _factor(x, precision, on_cpu), _factor(kernel, precision, on_cpu)
    return _product(*factors, axis=0, on_cpu=on_cpu).astype(x.dtype), factors


def _backward(
    precision: str, on_cpu: bool, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    factor = _factor(gradient, precision, on_cpu)
    of_x = _product(factor, kernel, axis=1, on_cpu=on_cpu)
    if on_cpu:
        of_kernel = _of_kernel_on_cpu(x.reshape(-1, x.shape[-1]), factor.reshape(-1, factor.shape[-1]))
    else:
        leading = list(range(x.ndim - 1))
        of_kernel = jnp.tensordot(x, factor, (leading, leading), preferred_element_type=jnp.float32)
    return of_x.astype(gradient.dtype), of_kernel.astype(gradient.dtype)


project.defvjp(_forward, _backward)


def _of_kernel_on_cpu(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Return xᵀ · gradient: (T, in), (T, out) → (in, out), float32.

    JAX computes (gradientᵀ · x)ᵀ. For that, XLA:CPU fuses the gradient's elementwise function with writing it out
    transposed, at many times the cost of the function alone. This function transposes the narrower of the two arrays
    and, if that is the gradient, the result as well. The barrier keeps XLA from folding that into the product.
    """
    if x.shape[1] > gradient.shape[1]:
        return jax.lax.optimization_barrier(_of_kernel_on_cpu(gradient, x)).T
    transposed = _stored(x.T) if x.dtype == jnp.bfloat16 else x.T
    return _product(transposed, gradient, axis=0, on_cpu=True)


def _factor(array: jax.Array, precision: str, on_cpu: bool) -> jax.Array:
    if precision == "bfloat16" and not on_cpu and jax.default_backend() == "cpu":
        return jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)  # rounded but multiplied in float32
    array = array.astype(jnp.bfloat16) if precision == "bfloat16" else array
    return _stored(array) if on_cpu and array.dtype == jnp.bfloat16 else array


def _product(a: jax.Array, b: jax.Array, *, axis: int, on_cpu: bool) -> jax.Array:
    """Return a · b over a's last axis and b's axis ``axis``, in float32."""
    product = jax.lax.dot_general(a, b, (((a.ndim - 1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product) if on_cpu and a.dtype == jnp.bfloat16 else product


def _stored(array: jax.Array) -> jax.Array:
    """Return the same array, stored in memory in the order it is read. XLA:CPU has bfloat16 kernels only for such
    factors. It picks the kernel before it folds transpositions, even of results, into products; a product that then has
    no kernel fails at run time. It folds nothing through a barrier. Without the extra axis it would store a transposed
    array untransposed, as a layout."""
    return jax.lax.optimization_barrier(array[None])[0]
