"""The public function: defaults, axes, dtypes, and errors that say what was given and what is allowed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend import attention
from xattn.testing import oracle
from xattn.testing.contract import BATCH, LENGTH, THETA, Case, close, inputs

ACTIVATIONS = ("softmax", "sigmoid", "none")


def test_importing_the_package_and_its_config_imports_no_jax() -> None:
    code = "import sys, xattn.backend, xattn.backend.dispatch; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_function_is_not_hidden_by_a_module() -> None:
    code = "import xattn.backend.module; from xattn.backend import attention; assert callable(attention), attention"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_defaults_are_causal_and_theta_ten_thousand(activation: str) -> None:
    x = inputs(Case(activation=activation))
    sin, cos = oracle.tables(LENGTH, x.q.shape[-1], 10000.0)
    out = attention(x.q, x.k, x.v, activation_function=activation)
    close("out", out, oracle.forward(replace(x.problem, sin=sin, cos=cos)), "float32")


def test_positional_arguments_are_the_seeds() -> None:
    x = inputs(Case(activation="none", pre_activation="swish", mask="arbitrary"))
    out = attention(x.q, x.k, x.v, x.spec.mask, None, "none", "swish", THETA)
    close("out", out, oracle.forward(x.problem), "float32")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_three_axes_are_one_head(activation: str) -> None:
    x = inputs(Case(activation=activation))
    segments = jnp.asarray(np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) // 4)
    whole = attention(x.q, x.k, x.v, activation_function=activation, segment_ids=segments)

    def one_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, activation_function=activation, segment_ids=segments)

    by_heads = jax.vmap(one_head, in_axes=1, out_axes=1)(x.q, x.k, x.v)
    assert one_head(x.q[:, 0], x.k[:, 0], x.v[:, 0]).shape == (BATCH, LENGTH, x.v.shape[-1])
    np.testing.assert_allclose(by_heads, whole, rtol=1e-5, atol=1e-6)


def test_qkv_dtype_casts_all_three() -> None:
    x = inputs(Case(activation="softmax", dtype="bfloat16"))
    mixed = attention(x.q.astype(jnp.float32), x.k, x.v, qkv_dtype="bfloat16")
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mixed, attention(x.q, x.k, x.v))
    assert attention(x.q, x.k, x.v, qkv_dtype=jnp.float32).dtype == jnp.float32


def test_silu_is_swish_and_swish_is_something() -> None:
    x = inputs(Case(activation="softmax"))
    swish = attention(x.q, x.k, x.v, qk_pre_activation_function="swish")
    np.testing.assert_array_equal(attention(x.q, x.k, x.v, qk_pre_activation_function="silu"), swish)
    assert not np.allclose(swish, attention(x.q, x.k, x.v))


def test_sigmoids_bias_is_the_context_lengths_unless_given() -> None:
    x = inputs(Case(activation="sigmoid"))

    def out(**keywords: Any) -> jax.Array:
        return attention(x.q, x.k, x.v, activation_function="sigmoid", **keywords)

    np.testing.assert_array_equal(out(), out(context_length=LENGTH))
    # n is the configured one, whatever the length of the call, and neither window nor segments change it.
    np.testing.assert_allclose(out(context_length=99), out(sigmoid_bias=-np.log(99)), rtol=1e-6)
    np.testing.assert_array_equal(out(window=2)[:, :, :2], out()[:, :, :2])
    assert not np.allclose(out(), out(context_length=99))
    per_head = out(sigmoid_bias=jnp.array([-1.0, -2.0, -3.0]))
    for h, bias in enumerate((-1.0, -2.0, -3.0)):
        np.testing.assert_allclose(per_head[:, h], out(sigmoid_bias=bias)[:, h], rtol=1e-5)
    gradient = jax.grad(lambda bias: jnp.sum(out(sigmoid_bias=bias)))(jnp.array([-1.0, -2.0, -3.0]))
    assert np.all(np.asarray(gradient) != 0)


Q = jnp.ones((2, 3, 5, 4))

BAD: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((Q, Q, Q), {"activation_function": "relu"}, "'relu'.*softmax, sigmoid, none"),
    ((Q, Q, Q), {"qk_pre_activation_function": "gelu"}, "'gelu'.*none, swish, silu"),
    ((Q, Q, Q), {"implementation": "magic"}, "'magic'.*auto.*reference"),
    ((Q[0, 0], Q[0, 0], Q[0, 0]), {}, r"\(5, 4\)"),
    ((Q, Q[0], Q), {}, r"\(3, 5, 4\)"),
    ((Q, Q[:1], Q), {}, r"\(1, 3, 5, 4\)"),
    ((Q, Q[:, :, :4], Q[:, :, :4]), {}, r"\(2, 3, 4, 4\)"),
    ((Q, Q[..., :2], Q), {}, r"\(2, 3, 5, 2\)"),
    ((Q, Q[:, :2], Q[:, :2]), {}, r"\(2, 2, 5, 4\)"),
    ((Q, Q, Q[:, :1]), {}, r"\(2, 1, 5, 4\)"),
    ((Q[..., :3], Q[..., :3], Q), {}, r"even.*\(2, 3, 5, 3\)"),
    ((Q[:, :, :0], Q[:, :, :0], Q[:, :, :0]), {}, r"empty.*\(2, 3, 0, 4\)"),
    ((Q, Q.astype(jnp.bfloat16), Q), {}, "float32, bfloat16 and float32"),
    ((Q.astype(int), Q.astype(int), Q.astype(int)), {}, "not in int32"),
    ((Q, Q, Q), {"qkv_dtype": "int8"}, "not in int8"),
    ((Q, Q, Q), {"attention_mask": jnp.ones((5, 5))}, "float32 of shape"),
    ((Q, Q, Q), {"attention_mask": jnp.ones((4, 5), bool)}, r"\(5, 5\).*\(4, 5\)"),
    ((Q, Q, Q), {"segment_ids": jnp.ones((2, 4), int)}, r"\(2, 5\).*\(2, 4\)"),
    ((Q, Q, Q), {"segment_ids": jnp.ones((2, 5))}, "float32"),
    ((Q, Q, Q), {"window": 0}, "window.*got 0"),
    ((Q, Q, Q), {"context_length": 0}, "context_length.*got 0"),
    ((Q, Q, Q), {"context_length": -1}, "context_length.*got -1"),
    ((Q, Q, Q), {"theta": 0.0}, r"theta.*got 0\.0"),
    ((Q, Q, Q), {"sigmoid_bias": 1.0}, "no meaning.*'softmax'"),
    ((Q, Q, Q), {"sigmoid_bias": float("nan"), "activation_function": "sigmoid"}, "got nan"),
    ((Q, Q, Q), {"sigmoid_bias": jnp.ones(2), "activation_function": "sigmoid"}, r"\(3,\).*\(2,\)"),
]


@pytest.mark.parametrize(("arrays", "keywords", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_arguments_are_errors_that_name_them(arrays: tuple, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*arrays, **keywords)
