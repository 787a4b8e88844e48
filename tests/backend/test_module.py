"""The seed's module: no parameters, the configured choices, and a state where there is one."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend import mLSTMBackendAttention, mLSTMBackendAttentionConfig
from xattn.testing import oracle
from xattn.testing.contract import BATCH, HEADS, LENGTH, THETA, WIDTH_QK, WIDTH_V, Case, close, inputs

NONE = mLSTMBackendAttention(mLSTMBackendAttentionConfig(activation_function="none", theta=THETA))


@partial(jax.jit, static_argnames="return_last_states")
def apply_none(*arrays: jax.Array, **keywords: Any) -> Any:
    return NONE.apply({}, *arrays, **keywords)


def test_the_module_is_the_function_without_parameters() -> None:
    x = inputs(Case(activation="sigmoid"))
    config = mLSTMBackendAttentionConfig(activation_function="sigmoid", theta=THETA)
    module = mLSTMBackendAttention(config)
    gates = jnp.full((BATCH, HEADS, LENGTH), 1e9)
    assert module.init(jax.random.key(0), x.q, x.k, x.v, gates, gates) == {}
    close("out", module.apply({}, x.q, x.k, x.v, gates, gates), oracle.forward(x.problem), "float32")
    assert module.can_vmap_over_heads is True
    assert mLSTMBackendAttention.config_class is mLSTMBackendAttentionConfig


def test_the_modules_context_length_is_sigmoids_n() -> None:
    case = Case(activation="sigmoid", context_length=64)
    x = inputs(case)
    config = mLSTMBackendAttentionConfig(activation_function="sigmoid", theta=THETA)
    assert config.context_length == -1
    config.assign_model_config_params(SimpleNamespace(context_length=64))
    assert config == mLSTMBackendAttentionConfig(64, "sigmoid", "none", THETA)
    close("out", mLSTMBackendAttention(config).apply({}, x.q, x.k, x.v), oracle.forward(x.problem), "float32")
    with pytest.raises(ValueError, match="got 0"):
        mLSTMBackendAttention(mLSTMBackendAttentionConfig(context_length=0)).apply({}, x.q, x.k, x.v)


@pytest.mark.parametrize("cut", [1, 5, LENGTH - 1])
def test_two_halves_equal_the_whole_at_any_cut(cut: int) -> None:
    x = inputs(Case(activation="none"))
    first, second = (tuple(a[:, :, part] for a in (x.q, x.k, x.v)) for part in (slice(cut), slice(cut, None)))
    head, (state, n, m) = apply_none(*first, return_last_states=True)
    tail, (last, _, _) = apply_none(*second, c_initial=state, return_last_states=True)
    assert state.shape == (BATCH, HEADS, WIDTH_QK, WIDTH_V)
    assert state.dtype == jnp.float32
    assert (n, m) == (None, None)
    close("out", jnp.concatenate([head, tail], axis=2), oracle.forward(x.problem), "float32")
    whole, (whole_last, _, _) = apply_none(x.q, x.k, x.v, return_last_states=True)
    np.testing.assert_allclose(last, whole_last, atol=1e-5)
    np.testing.assert_array_equal(whole, apply_none(x.q, x.k, x.v, c_initial=jnp.zeros_like(state)))
    assert not np.allclose(tail, apply_none(*second)), "the state changed nothing"


def test_the_state_is_the_sum_of_keys_rotated_back() -> None:
    x = inputs(Case(activation="none"))
    _, (state, _, _) = apply_none(x.q, x.k, x.v, return_last_states=True)
    want = np.zeros((BATCH, HEADS, WIDTH_QK, WIDTH_V))
    sin, cos = oracle.tables(LENGTH + 1, WIDTH_QK, THETA)
    for s in range(LENGTH):
        key = oracle._turn(x.problem.k[:, :, s], -sin[LENGTH - s], cos[LENGTH - s])
        want += key[..., :, None] * x.problem.v[:, :, s, None, :] / np.sqrt(WIDTH_QK)
    close("state", state, want, "float32")


def test_the_state_has_a_gradient() -> None:
    x = inputs(Case(activation="none"))
    state = jnp.ones((BATCH, HEADS, WIDTH_QK, WIDTH_V))

    def loss(state: jax.Array) -> jax.Array:
        out, (last, _, _) = NONE.apply({}, x.q, x.k, x.v, c_initial=state, return_last_states=True)
        return jnp.sum(out * x.g) + jnp.sum(last)

    # Both outputs are linear in the state.
    slope = jax.grad(loss)(state)
    np.testing.assert_allclose(jnp.sum(slope * state), loss(state) - loss(0 * state), rtol=1e-4)


def test_one_head_has_a_state_of_three_axes() -> None:
    x = inputs(Case(activation="none"))
    out, (state, _, _) = apply_none(x.q[:, 0], x.k[:, 0], x.v[:, 0], return_last_states=True)
    assert state.shape == (BATCH, WIDTH_QK, WIDTH_V)
    again = apply_none(x.q[:, 0], x.k[:, 0], x.v[:, 0], c_initial=0 * state)
    np.testing.assert_array_equal(again, out)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_states_that_cannot_be_honoured_are_errors(activation: Any) -> None:
    x = inputs(Case(activation=activation))
    module = mLSTMBackendAttention(mLSTMBackendAttentionConfig(activation_function=activation))
    with pytest.raises(ValueError, match=f"c_initial .*{activation}"):
        module.apply({}, x.q, x.k, x.v, c_initial=jnp.zeros((BATCH, HEADS, WIDTH_QK, WIDTH_V)))
    with pytest.raises(ValueError, match=f"return_last_states .*{activation}"):
        module.apply({}, x.q, x.k, x.v, return_last_states=True)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_there_is_no_n_and_no_m(activation: Any) -> None:
    x = inputs(Case(activation=activation))
    module = mLSTMBackendAttention(mLSTMBackendAttentionConfig(activation_function=activation))
    for name in ("n_initial", "m_initial"):
        with pytest.raises(ValueError, match=rf"{name}.*\(7,\)"):
            module.apply({}, x.q, x.k, x.v, **{name: jnp.zeros(7)})


def test_a_state_of_another_shape_is_an_error() -> None:
    x = inputs(Case(activation="none"))
    with pytest.raises(ValueError, match=r"\(2, 3, 10, 7\), got \(2, 3, 7, 10\)"):
        NONE.apply({}, x.q, x.k, x.v, c_initial=jnp.zeros((BATCH, HEADS, WIDTH_V, WIDTH_QK)))
