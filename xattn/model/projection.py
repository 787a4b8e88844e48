"""The product of activations and a parameter matrix, in the precision that the config names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from xattn.backend import xla_cpu
from xattn.backend.mesh import context_devices


def projection(x: jax.Array, kernel: jax.Array, dimension_numbers: Any = None, precision: Any = None) -> jax.Array:
    """Return x (…, in) · kernel (in, out), in x's dtype.

    ``precision="bfloat16"`` rounds all factors to bfloat16, including those of the gradients, and sums in float32.
    ``default`` is the device's own for this dtype. nn.Dense passes ``dimension_numbers``, always the same ones here.
    """
    if xla_cpu.is_used() and context_devices() == 1:
        return xla_cpu.project(x, kernel, precision)
    return project(x, kernel) if precision == "bfloat16" and x.dtype != jnp.bfloat16 else x @ kernel


@jax.custom_vjp
def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Compute :func:`projection` with ``precision="bfloat16"``."""
    return _forward(x, kernel)[0]


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    factors = _rounded(x), _rounded(kernel)
    return jnp.tensordot(*factors, (-1, 0), preferred_element_type=jnp.float32).astype(x.dtype), factors


def _backward(factors: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, kernel), factor = factors, _rounded(gradient)
    leading = list(range(x.ndim - 1))
    of_x = jnp.tensordot(factor, kernel, (-1, 1), preferred_element_type=jnp.float32)
    of_kernel = jnp.tensordot(x, factor, (leading, leading), preferred_element_type=jnp.float32)
    return of_x.astype(gradient.dtype), of_kernel.astype(gradient.dtype)


project.defvjp(_forward, _backward)


def _rounded(array: jax.Array) -> jax.Array:
    return xla_cpu.rounded(array) if xla_cpu.is_used() else array.astype(jnp.bfloat16)
