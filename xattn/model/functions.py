"""Norms, SwiGLU's product and projections, with custom gradients.

JAX keeps what each single operation needs in the backward pass: a norm's scale broadcast to the whole activation, or
both σ(x) and x · σ(x). The norms and SwiGLU's product keep little besides their arguments, so XLA makes fewer passes
over memory. Projections have the precision that the config names, in their gradients too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from xattn.backend import xla_cpu
from xattn.backend.mesh import context_devices


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Return x / √(mean(x²) + epsilon) · scale over the last axis, in float32: (…, D), (D,) → (…, D) in x's dtype."""
    return _rms_forward(x, scale, epsilon)[0]


def _rms_forward(x: jax.Array, scale: jax.Array, epsilon: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    wide = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * factor * scale).astype(x.dtype), (x, scale, factor)


def _rms_backward(epsilon: float, saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale, factor = saved
    gradient = gradient.astype(jnp.float32)
    normed = x.astype(jnp.float32) * factor
    scaled = gradient * scale
    of_x = factor * (scaled - normed * jnp.mean(scaled * normed, axis=-1, keepdims=True))
    return of_x.astype(x.dtype), _over_tokens(gradient * normed)


rms_norm.defvjp(_rms_forward, _rms_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def layer_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Return (x − mean(x)) / √(var(x) + epsilon) · scale over the last axis; shapes and dtypes as :func:`rms_norm`."""
    return _layer_forward(x, scale, epsilon)[0]


def _layer_forward(x: jax.Array, scale: jax.Array, epsilon: float) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    factor = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    return (centred * factor * scale).astype(x.dtype), (x, scale, mean, factor)


def _layer_backward(epsilon: float, saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale, mean, factor = saved
    gradient = gradient.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * factor
    scaled = gradient * scale
    along, constant = (jnp.mean(part, axis=-1, keepdims=True) for part in (scaled * normed, scaled))
    return (factor * (scaled - constant - normed * along)).astype(x.dtype), _over_tokens(gradient * normed)


layer_norm.defvjp(_layer_forward, _layer_backward)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return gate · σ(gate) · up."""
    return _swiglu_forward(gate, up)[0]


def _swiglu_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    open_ = jax.nn.sigmoid(gate)
    return gate * open_ * up, (gate, up, open_)


def _swiglu_backward(saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up, open_ = saved
    of_gate = gradient * up * open_ * (1 + gate * (1 - open_))
    return of_gate, gradient * gate * open_


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _over_tokens(array: jax.Array) -> jax.Array:
    """Sum over all axes but the last."""
    return jnp.sum(array, axis=tuple(range(array.ndim - 1)))


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
    return _project_forward(x, kernel)[0]


def _project_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    factors = _rounded(x), _rounded(kernel)
    return jnp.tensordot(*factors, (-1, 0), preferred_element_type=jnp.float32).astype(x.dtype), factors


def _project_backward(factors: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, kernel), factor = factors, _rounded(gradient)
    leading = list(range(x.ndim - 1))
    of_x = jnp.tensordot(factor, kernel, (-1, 1), preferred_element_type=jnp.float32)
    of_kernel = jnp.tensordot(x, factor, (leading, leading), preferred_element_type=jnp.float32)
    return of_x.astype(gradient.dtype), of_kernel.astype(gradient.dtype)


project.defvjp(_project_forward, _project_backward)


def _rounded(array: jax.Array) -> jax.Array:
    return xla_cpu.rounded(array) if xla_cpu.is_used() else array.astype(jnp.bfloat16)
