"""The product of activations and a matrix of parameters, with a gradient that each platform computes well."""

from __future__ import annotations

from typing import Any

import jax

from xattn.backend.mesh import context_devices


def projection(x: jax.Array, kernel: jax.Array, dimension_numbers: Any = None, precision: Any = None) -> jax.Array:
    """x (…, in) · kernel (in, out). What nn.Dense passes besides is for this product always the same."""
    # Rows and sequence as one axis can't stay split by the sequence: all of it would be gathered on each device.
    on_cpu = jax.default_backend() == "cpu" and context_devices() == 1
    return project_on_cpu(x, kernel) if on_cpu else x @ kernel


@jax.custom_vjp
def project_on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x · kernel. JAX's own gradient of the kernel is (gradientᵀ · x)ᵀ: for that XLA:CPU writes the gradient out
    transposed, together with the elementwise function that it comes from, at many times the cost of that alone."""
    return x @ kernel


def _project_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _project_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    tokens, gradients = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return gradient @ kernel.T, tokens.T @ gradients


project_on_cpu.defvjp(_project_forward, _project_backward)
