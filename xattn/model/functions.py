"""Norms and SwiGLU's product, with custom gradients that keep fewer arrays than JAX would.

JAX keeps what each single operation needs in the backward pass: a norm's scale broadcast to the whole activation, or
both σ(x) and x · σ(x). These functions keep little besides their arguments, so XLA makes fewer passes over memory.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


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
