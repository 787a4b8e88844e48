"""The kernels' arithmetic on a CPU: the forms of σ and the accuracy that they leave, masks and bounds of loops."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend.hopper import tile
from xattn.backend.hopper.sizes import BLOCK, Form

FORMS = get_args(Form)
# The largest relative error of 2^y, and so about that of a small weight. ("hardware" is XLA:CPU's exp2 here; the chip's
# own is off by 2 units in the last place.)
ERROR = {"hardware": 8e-6, "polynomial3": 8e-5, "polynomial4": 4e-6, "split": 4e-5}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "split"])
def test_powers_of_two(form: Form) -> None:
    y = np.concatenate([np.linspace(-125.9, 125.9, 200_001), np.arange(-126, 127), [0.5, -0.5, 1.5]]).astype(np.float32)
    got = np.asarray(jax.jit(tile.exp2, static_argnums=1)(jnp.asarray(y), form), np.float64)
    # XLA:CPU flushes what is not normal to 0: 2^−126 times a factor below 1.
    error = np.abs(got / 2.0 ** y.astype(np.float64) - 1)[y > -125.5]
    assert np.max(error) < ERROR[form]


@pytest.mark.parametrize("form", FORMS)
def test_extremes_are_finite_and_not_a_number_stays_so(form: Form) -> None:
    x = jnp.array([jnp.inf, 1e30, 200.0, -200.0, -1e30, -jnp.inf, jnp.nan])
    weights, slope = jax.jit(lambda x: tile.sigmoid(x[None], 1.0, jnp.float32(0.0), form))(x)
    weights, slope = weights[0], slope[0]
    np.testing.assert_allclose(weights[:3], 1, rtol=1e-6)
    np.testing.assert_allclose(weights[3:6], 0, atol=1e-30)
    np.testing.assert_allclose(slope[:6], 0, atol=1e-30)
    assert np.isnan(weights[6])
    assert np.isnan(slope[6])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, 128, 32768])
def test_small_and_large_weights_and_their_slopes_are_right_relative_to_themselves(form: Form, n: int) -> None:
    products = np.linspace(-200, 200, 100_000).astype(np.float32)
    scale, bias = 0.125, np.float32(-np.log(n))
    run = jax.vmap(lambda tile_: tile.sigmoid(tile_, scale, jnp.asarray(bias), form))  # in tiles of one row
    weights, slope = (x.ravel() for x in run(jnp.asarray(products).reshape(-1, 1, 10)))
    x = products.astype(np.float64) * scale + float(bias)
    exact = 1 / (1 + np.exp(-x))
    # 3e-6: what the float32 argument is off by, up to 50 in units of ln 2.
    np.testing.assert_allclose(weights, exact, rtol=ERROR[form] + 3e-6)
    # split takes σ (1 − σ), which is off by what float32 is beside 1 where a weight is close to 1.
    allowed = (2 * ERROR[form] + 6e-6) * exact / (1 + np.exp(x)) + (2e-7 if form == "split" else 0) * (exact > 0.1)
    assert np.all(np.abs(slope - exact / (1 + np.exp(x))) <= allowed)


@pytest.mark.parametrize(("form", "dtype"), [(form, dtype) for form in FORMS for dtype in ("bfloat16", "float16")])
@pytest.mark.parametrize("n", [128, 32768])
def test_a_form_costs_less_than_a_fifth_of_the_error_that_the_dtype_costs(form: Form, dtype: str, n: int) -> None:
    """Some rows against n others: P V is the output, Pᵀ dO the gradient of v (the same sum, seen from the
    other side), dS K the gradient of q or k; the sum of dS is that of the bias."""
    width, rng = 64, np.random.default_rng(7)
    q, k, v, g = (jnp.asarray(rng.standard_normal((rows, width)), dtype).astype(jnp.float32) for rows in (8, n, n, 8))
    bias, scale = -np.log(n), width**-0.5

    @jax.jit
    def ours(products: jax.Array, d_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights, slope = tile.sigmoid(products, scale, jnp.float32(bias), form)
        return weights, d_weights * slope

    def rounded(x: Any) -> np.ndarray:
        return np.asarray(jnp.asarray(x).astype(dtype)).astype(np.float64)

    q64, k64, v64, g64 = (np.asarray(x, np.float64) for x in (q, k, v, g))
    exact = 1 / (1 + np.exp(-(q64 @ k64.T * scale + bias)))
    exact_d = (g64 @ v64.T) * exact * (1 - exact)
    mine, mine_d = ours(q @ k.T, g @ v.T)
    for ours_, exact_, other in ((mine, exact, v64), (mine_d, exact_d, k64)):
        want = exact_ @ other
        floor = np.linalg.norm(rounded(rounded(exact_) @ other) - want)
        assert np.linalg.norm(rounded(rounded(ours_) @ other) - want) <= 1.2 * floor
    assert abs(np.sum(np.asarray(mine_d, np.float64)) - exact_d.sum()) < 2e-4 * np.abs(exact_d).sum()


@pytest.mark.parametrize(("keys", "blocks", "causal"), [*itertools.product([64, 128], [1, 2, 5], [True, False])])
def test_tiles_of_keys_hold_all_that_a_block_attends_to_and_the_unmasked_hold_no_more(
    keys: int, blocks: int, causal: bool
) -> None:
    length = blocks * BLOCK
    t, s = np.arange(length)[:, None], np.arange(length)[None, :]
    keep = tile.may_attend(0, t, 0, s) if causal else np.ones((length, length), bool)
    np.testing.assert_array_equal(keep, np.tri(length, dtype=bool) | (not causal))
    for first in range(0, length, BLOCK):
        tiles = keep[first : first + BLOCK].reshape(BLOCK, -1, keys)
        whole, steps = tile.tiles_of_keys(first, BLOCK, keys, length, causal)
        assert np.all(tiles[:, :whole])
        assert not np.any(tiles[:, steps:])
        assert np.all(np.any(tiles[:, :steps], axis=(0, 2)))
        assert (whole, steps) == tuple(map(int, tile.tiles_of_keys(jnp.int32(first), BLOCK, keys, length, causal)))


@pytest.mark.parametrize(("rows", "blocks", "causal"), [*itertools.product([64, 128], [1, 2, 5], [True, False])])
def test_tiles_of_queries_likewise(rows: int, blocks: int, causal: bool) -> None:
    length = blocks * BLOCK
    keep = np.tri(length, dtype=bool) | (not causal)
    for first_key in range(0, length, BLOCK):
        tiles = keep[:, first_key : first_key + BLOCK].reshape(-1, rows, BLOCK)
        first, whole, end = tile.tiles_of_queries(first_key, BLOCK, rows, length, causal)
        assert not np.any(tiles[:first])
        assert np.all(tiles[whole:])
        assert np.all(np.any(tiles[first:whole], axis=(1, 2)))
        assert end == len(tiles)
        assert first <= whole <= end
        traced = tile.tiles_of_queries(jnp.int32(first_key), BLOCK, rows, length, causal)
        assert (first, whole, end) == tuple(map(int, traced))
