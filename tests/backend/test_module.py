"""The seed's module: no parameters, the configured choices, and a state where there is one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend import mLSTMBackendAttention, mLSTMBackendAttentionConfig
from xattn.testing import oracle
from xattn.testing.cases import BATCH, HEADS, LENGTH, THETA, WIDTH_QK, WIDTH_V, Case, Inputs, f64, inputs
from xattn.testing.contract import close

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


# ---- gates="sigmoid": a recurrence


def gated(rotary_fraction: float = 0.0) -> mLSTMBackendAttention:
    return mLSTMBackendAttention(
        mLSTMBackendAttentionConfig(
            activation_function="none", theta=THETA, gates="sigmoid", rotary_fraction=rotary_fraction
        )
    )


@partial(jax.jit, static_argnames=("rotary_fraction", "return_last_states"))
def apply_gated(*arrays: jax.Array, rotary_fraction: float = 0.0, **keywords: Any) -> Any:
    return gated(rotary_fraction).apply({}, *arrays, **keywords)


def gates(x: Inputs) -> tuple[jax.Array, jax.Array]:
    """Pre-activations of (i, f), some of them far from 0, one for each key/value head and token."""
    rng = np.random.default_rng(17)
    i, f = (3 * rng.standard_normal(x.k.shape[:3]) for _ in range(2))
    f[:, :, LENGTH // 2] = -300  # σ is 0 here: all is forgotten
    return jnp.asarray(i, jnp.float32), jnp.asarray(f, jnp.float32)


def recurrence(
    q: oracle.F64, k: oracle.F64, v: oracle.F64, i: oracle.F64, f: oracle.F64, c: oracle.F64
) -> tuple[oracle.F64, oracle.F64]:
    """C_t = σ(f_t) C_{t−1} + σ(i_t) k_t v_tᵀ / √DHQK and q_t · C_t, a step at a time: (out, the last C)."""
    group = q.shape[1] // k.shape[1]
    out = np.empty((*q.shape[:3], v.shape[-1]))
    for t in range(q.shape[2]):
        keep, write = (1 / (1 + np.exp(-np.maximum(gate[:, :, t, None, None], -700))) for gate in (f, i))
        c = keep * c + write * k[:, :, t, :, None] * v[:, :, t, None, :] / np.sqrt(k.shape[-1])
        for h in range(q.shape[1]):
            out[:, h, t] = np.einsum("bd,bde->be", q[:, h, t], c[:, h // group])
    return out, c


def wide(*arrays: jax.Array) -> tuple[oracle.F64, ...]:
    return tuple(f64(array) for array in arrays)


@pytest.mark.parametrize(("heads", "kv_heads"), [(HEADS, HEADS), (6, 2)])
def test_sigmoid_gates_are_those_of_an_mlstm(heads: int, kv_heads: int) -> None:
    x = inputs(Case(activation="none", heads=heads, kv_heads=kv_heads))
    initial = jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, kv_heads, WIDTH_QK, WIDTH_V)), jnp.float32)
    arrays = (x.q, x.k, x.v, *gates(x), initial)

    def run(*arrays: jax.Array) -> jax.Array:
        *given, c = arrays
        return apply_gated(*given, c_initial=c, return_last_states=True)

    out, (state, n, m) = run(*arrays)
    want, last = recurrence(*wide(*arrays))
    close("out", out, want, "float32")
    close("state", state, last, "float32")
    assert (n, m) == (None, None)
    # The gradients of all, i and f before their sigmoid among them, along one way each.
    rng = np.random.default_rng(2)
    push = [rng.standard_normal(want.shape), rng.standard_normal(last.shape)]

    def loss(*arrays: jax.Array) -> jax.Array:
        out, (state, _, _) = run(*arrays)
        return jnp.sum(out * push[0].astype("float32")) + jnp.sum(state * push[1].astype("float32"))

    found = jax.jit(jax.grad(loss, argnums=tuple(range(6))))(*arrays)
    for at, gradient in enumerate(found):
        way = rng.standard_normal(gradient.shape)
        steps = []
        for sign in (1, -1):
            moved = list(wide(*arrays))
            moved[at] = moved[at] + sign * 1e-6 * way
            steps.append(sum(np.sum(a * b) for a, b in zip(recurrence(*moved), push, strict=True)))
        terms = f64(gradient) * way
        assert abs((steps[0] - steps[1]) / 2e-6 - terms.sum()) <= 1e-5 * np.linalg.norm(terms), at


@pytest.mark.parametrize("rotary_fraction", [0.0, 0.5])
def test_with_gates_too_two_halves_equal_the_whole_at_any_cut(rotary_fraction: float) -> None:
    apply = partial(apply_gated, rotary_fraction=rotary_fraction)
    x = inputs(Case(activation="none"))
    arrays = (x.q, x.k, x.v, *gates(x))
    whole, (last, _, _) = apply(*arrays, return_last_states=True)
    for cut in (4, LENGTH // 2, LENGTH // 2 + 1):  # before, at and after the token that forgets all
        first, second = (tuple(a[:, :, part] for a in arrays) for part in (slice(cut), slice(cut, None)))
        head, (state, _, _) = apply(*first, return_last_states=True)
        tail, (end, _, _) = apply(*second, c_initial=state, return_last_states=True)
        close("out", jnp.concatenate([head, tail], axis=2), f64(whole), "float32")
        close("state", end, f64(last), "float32")
        if cut < LENGTH // 2:
            assert not np.allclose(tail, apply(*second)), "the state changed nothing"


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_under_the_others_the_gates_are_terms_of_the_logits(activation: str) -> None:
    x = inputs(Case(activation=activation, rotary_fraction=0.5))
    i, f = gates(x)
    config = mLSTMBackendAttentionConfig(
        activation_function=activation, theta=THETA, gates="sigmoid", rotary_fraction=0.5
    )
    out = mLSTMBackendAttention(config).apply({}, x.q, x.k, x.v, i, f)
    logs = {"log_decay": -np.logaddexp(0, -f64(f)), "log_input_gate": -np.logaddexp(0, -f64(i))}
    close("out", out, oracle.forward(replace(x.problem, **logs)), "float32")


def test_gates_have_the_rank_of_the_queries_with_or_without_an_axis_of_one() -> None:
    x = inputs(Case(activation="none"))
    i, f = gates(x)
    out = apply_gated(x.q, x.k, x.v, i, f)
    np.testing.assert_array_equal(apply_gated(x.q, x.k, x.v, i[..., None], f[..., None]), out)
    np.testing.assert_array_equal(apply_gated(x.q, x.k, x.v, i, f[..., None]), out)
    one = (x.q[:, 0], x.k[:, 0], x.v[:, 0])
    for gate in (lambda g: g[:, 0], lambda g: g[:, 0, :, None]):
        np.testing.assert_allclose(apply_gated(*one, gate(i), gate(f)), out[:, 0], rtol=1e-5, atol=1e-6)
    by_heads = jax.vmap(lambda *arrays: apply_gated(*arrays), in_axes=1, out_axes=1)(x.q, x.k, x.v, i, f)
    np.testing.assert_allclose(by_heads, out, rtol=1e-5, atol=1e-6)


def test_a_gate_that_is_missing_or_of_another_shape_is_an_error() -> None:
    x = inputs(Case(activation="none"))
    i, f = gates(x)
    for name, given in (("i", (None, f)), ("f", (i, None))):
        with pytest.raises(ValueError, match=rf"gate {name} of shape \(B, NH, S\) = \(2, 3, 13\).*got None"):
            gated().apply({}, x.q, x.k, x.v, *given)
    with pytest.raises(ValueError, match=r"gate f .*\(2, 3, 13\).*\(2, 3, 12\)"):
        gated().apply({}, x.q, x.k, x.v, i, f[..., 1:])
    with pytest.raises(ValueError, match=r"gate i .*\(B, S\) = \(2, 13\).*\(2, 3, 13\)"):
        gated().apply({}, x.q[:, 0], x.k[:, 0], x.v[:, 0], i, f[:, 0])
    wrong = mLSTMBackendAttention(mLSTMBackendAttentionConfig(gates="exponential"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown gates 'exponential'; choices: none, sigmoid"):
        wrong.apply({}, x.q, x.k, x.v, i, f)


def test_the_defaults_ignore_gates_and_rotate_all() -> None:
    config = mLSTMBackendAttentionConfig()
    assert (config.gates, config.rotary_fraction) == ("none", 1.0)
    x = inputs(Case(activation="none"))
    i, f = gates(x)
    plain = apply_none(x.q, x.k, x.v)
    np.testing.assert_array_equal(apply_none(x.q, x.k, x.v, i, f), plain)
    assert not np.allclose(apply_gated(x.q, x.k, x.v, i, f), plain)
