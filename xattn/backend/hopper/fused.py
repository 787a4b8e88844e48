"""The Hopper kernels as one differentiable function of arrays of any length."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from xattn.backend.hopper.kernels import Arrays, Meaning, forward, gradient_of_q, gradients_of_k_and_v
from xattn.backend.hopper.sizes import BLOCK, Tiles
from xattn.backend.spec import Keys, Output, Queries, Values


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def fused(q: Queries, k: Keys, v: Values, bias: Float32[Array, "B NH"], meaning: Meaning, tiles: Tiles) -> Output:
    """Attend with rotated queries and keys; the weights are σ(logits + bias) or the logits themselves.

    The dtype is bfloat16 or float16, and DHQK = DHV is 64 or 128. Under ``none`` the bias has no effect and a zero
    gradient. The backward pass keeps only the four arrays. Only first-order reverse mode is supported.
    """
    return _forward(q, k, v, bias, meaning, tiles)[0]


def _forward(q: Array, k: Array, v: Array, bias: Array, meaning: Meaning, tiles: Tiles) -> tuple[Array, Arrays]:
    arrays = Arrays(q, k, v, bias)
    return forward(_padded(arrays), meaning, tiles)[:, :, : q.shape[2]], arrays


def _backward(meaning: Meaning, tiles: Tiles, kept: Arrays, g: Array) -> tuple[Array, ...]:
    length = kept.q.shape[2]
    arrays, g = _padded(kept), _pad(g)
    d_q, sums = gradient_of_q(arrays, g, meaning, tiles)
    d_k, d_v = gradients_of_k_and_v(arrays, g, meaning, tiles)
    d_bias = jnp.sum(sums, axis=-1) if meaning.sigmoid else jnp.zeros_like(kept.bias)
    return d_q[:, :, :length], d_k[:, :, :length], d_v[:, :, :length], d_bias


fused.defvjp(_forward, _backward)


def _padded(arrays: Arrays) -> Arrays:
    return Arrays(_pad(arrays.q), _pad(arrays.k), _pad(arrays.v), arrays.bias)


def _pad(x: Array) -> Array:
    """Pad with zeros to a multiple of BLOCK. Padding adds nothing to any sum: keys have v = 0 and queries g = 0."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % BLOCK), (0, 0)))
