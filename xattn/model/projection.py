"""The product of activations and a matrix of parameters, with a gradient that each platform computes well."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from xattn.backend.mesh import context_devices


def projection(x: jax.Array, kernel: jax.Array, dimension_numbers: Any = None, precision: Any = None) -> jax.Array:
    """x (…, in) · kernel (in, out), in x's dtype.

    precision: ``bfloat16``: all factors, those of the gradients too, are rounded to it, and sums are float32;
    ``default``: as the device multiplies this dtype. dimension_numbers: those of nn.Dense are here always the same.
    """
    # Rows and sequence as one axis can't stay split by the sequence: all of it would be gathered on each device.
    on_cpu = jax.default_backend() == "cpu" and context_devices() == 1
    if on_cpu or (precision == "bfloat16" and x.dtype != jnp.bfloat16):
        return project(x, kernel, precision, on_cpu)
    return x @ kernel


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(x: jax.Array, kernel: jax.Array, precision: str, on_cpu: bool) -> jax.Array:
    """:func:`projection`, with a gradient of its own; on_cpu: in the form that XLA:CPU is fast at."""
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
    """xᵀ · gradient: (T, in), (T, out) → (in, out), float32.

    JAX's own is (gradientᵀ · x)ᵀ, for which XLA:CPU writes the gradient out transposed, together with the elementwise
    function that it comes from, at many times the cost of that alone. What is transposed here is the narrower of the
    two, and where that is the gradient the result as well; the barrier keeps XLA from making one product of both.
    """
    if x.shape[1] > gradient.shape[1]:
        return jax.lax.optimization_barrier(_of_kernel_on_cpu(gradient, x)).T
    transposed = _stored(x.T) if x.dtype == jnp.bfloat16 else x.T
    return _product(transposed, gradient, axis=0, on_cpu=True)


def _factor(array: jax.Array, precision: str, on_cpu: bool) -> jax.Array:
    if precision == "bfloat16" and not on_cpu and jax.default_backend() == "cpu":
        return jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)  # rounded, multiplied in float32
    array = array.astype(jnp.bfloat16) if precision == "bfloat16" else array
    return _stored(array) if on_cpu and array.dtype == jnp.bfloat16 else array


def _product(a: jax.Array, b: jax.Array, *, axis: int, on_cpu: bool) -> jax.Array:
    """a · b over a's last axis and b's axis ``axis``, float32."""
    product = jax.lax.dot_general(a, b, (((a.ndim - 1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product) if on_cpu and a.dtype == jnp.bfloat16 else product


def _stored(array: jax.Array) -> jax.Array:
    """The same, in memory as it is read. XLA:CPU has kernels for products of bfloat16 only where factors are; it looks
    for one before it folds transpositions, also that of a result, into products, and what then has none any more fails
    at run time. It folds nothing through a barrier; without one more axis there it would store what is transposed
    untransposed, and call that its layout."""
    return jax.lax.optimization_barrier(array[None])[0]
