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
from xattn.testing.cases import BATCH, LENGTH, THETA, Case, inputs
from xattn.testing.contract import close

ACTIVATIONS = ("softmax", "sigmoid", "none")
PARTIAL: dict[str, Any] = {"rotary_fraction": 0.5, "logit_scale": 0.7}


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

LOGS = jnp.full((2, 3, 5), -0.5)
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
    ((Q.astype(int), Q.astype(int), Q.astype(int)), {}, "got int32"),
    ((Q, Q, Q), {"qkv_dtype": "int8"}, "got int8"),
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
    ((Q, Q, Q), {"sink": 0.0, "activation_function": "sigmoid"}, "sink .* no meaning under .*'sigmoid'"),
    ((Q, Q, Q), {"sink": jnp.zeros(3), "activation_function": "none"}, "sink .* no meaning under .*'none'"),
    ((Q, Q, Q), {"sink": float("nan")}, "sink must be finite, got nan"),
    ((Q, Q, Q), {"sink": jnp.ones(2)}, r"sink .*\(3,\).*\(2,\)"),
    ((Q, Q, Q), {"log_decay": LOGS.at[1, 2, 3].set(0.5)}, r"log_decay must be at most 0.*got 0\.5"),
    ((Q, Q, Q), {"log_decay": LOGS.at[1, 2, 3].set(jnp.nan)}, "log_decay must be at most 0 and not NaN.*got nan"),
    ((Q, Q, Q), {"log_decay": LOGS[:, :1]}, r"log_decay .*\(2, 3, 5\).*\(2, 1, 5\)"),
    ((Q, Q, Q), {"log_decay": LOGS[:, 0]}, r"log_decay .*\(2, 3, 5\).*\(2, 5\)"),
    ((Q, Q[:, :1], Q[:, :1]), {"log_decay": LOGS}, r"log_decay .*\(2, 1, 5\).*\(2, 3, 5\)"),
    ((Q, Q, Q), {"log_decay": LOGS.astype(int)}, "log_decay must be floating.*got int32"),
    ((Q, Q, Q), {"log_input_gate": LOGS.at[0, 0, 0].set(-jnp.inf)}, "log_input_gate must be finite"),
    ((Q, Q, Q), {"log_input_gate": LOGS.at[0, 0, 0].set(jnp.nan)}, "log_input_gate must be finite"),
    ((Q, Q, Q), {"log_input_gate": LOGS[..., 1:]}, r"log_input_gate .*\(2, 3, 5\).*\(2, 3, 4\)"),
    *(((Q, Q, Q), {"rotary_fraction": x}, f"from 0 to 1, got {x}") for x in (-0.1, 1.5, float("nan"))),
    *(((Q, Q, Q), {"logit_scale": x}, f"logit_scale must be positive.*got {x}") for x in (0.0, -1.0, float("inf"))),
    ((Q, Q, Q), {"logit_scale": jnp.ones(2)}, r"logit_scale must be a scalar.*\(2,\)"),
    ((Q, Q, Q), {"activation_function": "none", "implementation": "linear", "window": 2}, "not support a window"),
]


@pytest.mark.parametrize(("arrays", "keywords", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_arguments_are_errors_that_name_them(arrays: tuple, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*arrays, **keywords)


def test_terms_are_those_of_the_page() -> None:
    x = inputs(Case(activation="softmax", mask="arbitrary", decay="mild", input_gate=True, sink="learned", **PARTIAL))
    terms = {name: x.terms[name] for name in ("log_decay", "log_input_gate", "sink")}
    out = attention(x.q, x.k, x.v, x.spec.mask, theta=THETA, **terms, **PARTIAL)
    close("out", out, oracle.forward(x.problem), "float32")


def test_the_defaults_of_the_terms_are_no_terms() -> None:
    x = inputs(Case(activation="softmax"))
    plain = attention(x.q, x.k, x.v)
    off = {"log_decay": None, "log_input_gate": None, "rotary_fraction": 1.0, "logit_scale": 1.0, "sink": None}
    np.testing.assert_array_equal(attention(x.q, x.k, x.v, **off), plain)
    zeros = jnp.zeros(x.k.shape[:3])
    for name in ("log_decay", "log_input_gate"):
        np.testing.assert_allclose(attention(x.q, x.k, x.v, **{name: zeros}), plain, rtol=1e-5, atol=1e-6)
    # A logit that takes all there is, and one that takes nothing.
    assert np.max(np.abs(attention(x.q, x.k, x.v, sink=50.0))) < 1e-15
    np.testing.assert_allclose(attention(x.q, x.k, x.v, sink=-50.0), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "linear"])
def test_a_decay_counts_as_no_less_than_minus_a_hundred_and_has_no_gradient_below(implementation: str) -> None:
    x = inputs(Case(activation="none", decay="resets"))

    def out(decay: jax.Array) -> jax.Array:
        return attention(x.q, x.k, x.v, activation_function="none", log_decay=decay, implementation=implementation)

    decay = x.terms["log_decay"]
    assert decay is not None
    below = np.asarray(decay) < -100
    assert np.any(below)
    np.testing.assert_array_equal(out(decay), out(jnp.maximum(decay, -100.0)))
    gradient = np.asarray(jax.grad(lambda decay: jnp.sum(out(decay) * x.g))(decay))
    assert not np.any(gradient[below])
    assert np.any(gradient[~below] != 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_with_a_decay_a_mask_is_causal_too(activation: str) -> None:
    x = inputs(Case(activation=activation, decay="mild"))
    everything = jnp.ones((LENGTH, LENGTH), bool)
    for name in ("reference", "blockwise"):
        out = attention(
            *(x.q, x.k, x.v, everything),
            activation_function=activation,
            theta=THETA,
            log_decay=x.terms["log_decay"],
            implementation=name,
        )
        close("out", out, oracle.forward(x.problem), "float32")


def test_one_head_of_three_axes_has_terms_of_two() -> None:
    x = inputs(Case(activation="softmax", decay="mild", input_gate=True, heads=1, kv_heads=1))
    terms = {name: x.terms[name] for name in ("log_decay", "log_input_gate")}
    whole = attention(x.q, x.k, x.v, **terms)
    one = attention(x.q[:, 0], x.k[:, 0], x.v[:, 0], **{name: term[:, 0] for name, term in terms.items()})
    np.testing.assert_array_equal(one, whole[:, 0])


def test_a_traced_decay_is_taken_as_it_is() -> None:
    """Its values are not known when the call is checked."""
    jax.jit(lambda decay: attention(Q, Q, Q, log_decay=decay))(LOGS)
    with pytest.raises(ValueError, match=r"\(2, 3, 5\).*\(2, 3, 4\)"):
        jax.jit(lambda decay: attention(Q, Q, Q, log_decay=decay))(LOGS[..., 1:])


def test_a_known_decay_is_judged_under_jit_too() -> None:
    """As the slopes of ALiBi are known there."""
    plain = attention(Q, Q, Q, log_decay=LOGS)
    np.testing.assert_allclose(jax.jit(lambda q: attention(q, q, q, log_decay=LOGS))(Q), plain, rtol=1e-5)
    positive = -LOGS
    with pytest.raises(ValueError, match=r"log_decay must be at most 0.*got 0\.5"):
        jax.jit(lambda q: attention(q, q, q, log_decay=positive))(Q)
