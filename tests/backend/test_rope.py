"""Rotary embedding: its tables, its group property, its dtypes, its errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend import apply_rotary_emb, precompute_freqs
from xattn.testing import oracle

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 11, 6)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).standard_normal((2, 1, 11, 6)), jnp.float32)


def test_tables_are_the_formula_in_float32() -> None:
    sin, cos = precompute_freqs(6, 300, 77.0)
    want_sin, want_cos = oracle.tables(300, 6, 77.0)
    assert sin.shape == cos.shape == (300, 3)
    assert sin.dtype == cos.dtype == jnp.float32
    np.testing.assert_allclose(sin, want_sin, atol=300 * 1.2e-7)
    np.testing.assert_allclose(cos, want_cos, atol=300 * 1.2e-7)
    np.testing.assert_array_equal(sin[0], 0)
    np.testing.assert_array_equal(cos[0], 1)


def test_theta_may_be_traced_and_has_a_gradient() -> None:
    traced = jax.jit(lambda theta: precompute_freqs(6, 9, theta))(100.0)
    for got, want in zip(traced, precompute_freqs(6, 9, 100.0), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    slope = jax.grad(lambda theta: jnp.sum(precompute_freqs(6, 9, theta)[0]))(100.0)
    numeric = (oracle.tables(9, 6, 100.1)[0].sum() - oracle.tables(9, 6, 99.9)[0].sum()) / 0.2
    np.testing.assert_allclose(slope, numeric, rtol=1e-4)


def test_rotation_turns_interleaved_pairs() -> None:
    got, _ = apply_rotary_emb(X, Y, theta=50.0)
    sin, cos = oracle.tables(11, 6, 50.0)
    want = oracle._turn(np.asarray(X, np.float64), sin, cos)
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_array_equal(got[:, :, 0], X[:, :, 0])
    assert not np.allclose(got[:, :, 1:], X[:, :, 1:])


def test_products_depend_on_the_distance_alone() -> None:
    """The reason for RoPE: ⟨R(t) q, R(s) k⟩ is a function of t − s."""
    q, k = (jnp.broadcast_to(x[:1, :1, :1], (1, 1, 11, 6)) for x in (X, Y))
    rotated_q, rotated_k = apply_rotary_emb(q, k)
    products = np.asarray(jnp.einsum("bhtd,bhsd->ts", rotated_q, rotated_k))
    for distance in range(-10, 11):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert abs(products[0, 0] - products[0, 1]) > 1e-3


def test_given_tables_are_used_and_may_be_longer() -> None:
    sin, cos = precompute_freqs(6, 20, 50.0)
    for got, want in zip(apply_rotary_emb(X, Y, sin, cos), apply_rotary_emb(X, Y, theta=50.0), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_bfloat16_is_rotated_in_float32() -> None:
    got, _ = apply_rotary_emb(X.astype(jnp.bfloat16), Y.astype(jnp.bfloat16))
    want, _ = apply_rotary_emb(X.astype(jnp.bfloat16).astype(jnp.float32), Y)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((5, 4, 10.0), "got 5"),
        ((0, 4, 10.0), "got 0"),
        ((6, -1, 10.0), "got -1"),
        ((6, 4, 0.0), r"got 0\.0"),
        ((6, 4, -3), "got -3"),
        ((6, 4, float("inf")), "got inf"),
        ((6, 4, float("nan")), "got nan"),
        ((6, 4, np.ones(2)), r"\(2,\)"),
    ],
)
def test_bad_tables_are_errors_that_name_what_was_given(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        precompute_freqs(*arguments)


def test_bad_applications_are_errors() -> None:
    sin, cos = precompute_freqs(6, 20)
    with pytest.raises(ValueError, match="go together"):
        apply_rotary_emb(X, Y, sin)
    with pytest.raises(ValueError, match=r"freqs_sin .*\(5, 3\)"):
        apply_rotary_emb(X, Y, sin[:5], cos)
    with pytest.raises(ValueError, match=r"freqs_cos .*\(20, 2\)"):
        apply_rotary_emb(X, Y, sin, cos[:, :2])
    with pytest.raises(ValueError, match="got 5"):
        apply_rotary_emb(X[..., :5], Y[..., :5])
    with pytest.raises(ValueError, match=r"\(2, 1, 10, 6\)"):
        apply_rotary_emb(X, Y[:, :, :10])
