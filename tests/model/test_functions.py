"""The functions that bring their own gradient have the value and the gradient of their formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.model.functions import layer_norm, rms_norm, swiglu

EPSILON = 0.125  # large enough to be seen


def plain_rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON) * scale


def plain_layer_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return plain_rms_norm(x - x.mean(axis=-1, keepdims=True), scale)


def plain_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return gate / (1 + jnp.exp(-gate)) * up


CASES = [
    (partial(rms_norm, epsilon=EPSILON), plain_rms_norm, (7,)),
    (partial(layer_norm, epsilon=EPSILON), plain_layer_norm, (7,)),
    (swiglu, plain_swiglu, (2, 3, 5, 7)),
]


@pytest.mark.parametrize(("ours", "plain", "shape"), CASES, ids=["rms_norm", "layer_norm", "swiglu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradient(
    ours: Callable[..., jax.Array], plain: Callable[..., jax.Array], shape: tuple[int, ...], dtype: str
) -> None:
    x = 2 * jax.random.normal(jax.random.key(0), (2, 3, 5, 7)).astype(dtype) + jnp.asarray(0.5, dtype)
    # A norm's scale is a parameter and stays float32; SwiGLU's second argument is an activation.
    second = jax.random.normal(jax.random.key(1), shape).astype(dtype if len(shape) > 1 else "float32")
    cotangent = jax.random.normal(jax.random.key(2), x.shape).astype(dtype)
    out, vjp = jax.vjp(ours, x, second)
    assert out.dtype == x.dtype
    found = [out, *vjp(cotangent)]
    assert [f.dtype for f in found[1:]] == [x.dtype, second.dtype]
    wide = [leaf.astype(jnp.float32) for leaf in (x, second, cotangent)]
    expected_out, expected_vjp = jax.vjp(plain, *wide[:2])
    tolerance = {"float32": 2e-5, "bfloat16": 0.05}[dtype]
    for ours_, theirs in zip(found, [expected_out, *expected_vjp(wide[2])], strict=True):
        np.testing.assert_allclose(ours_.astype(np.float32), theirs, rtol=tolerance, atol=tolerance)
