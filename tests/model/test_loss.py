"""The loss of large vocabularies: in parts it is what it is at once, and all logits are never there in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.backend import xla_cpu
from xattn.model import loss
from xattn.model.functions import project, projection
from xattn.model.loss import next_token_losses, projected_losses


def bfloat16_on_xla_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return xla_cpu.project(x, kernel, "bfloat16")


def default_on_xla_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return xla_cpu.project(x, kernel, "default")


@pytest.mark.parametrize(
    ("dtype", "own"),
    [
        ("float32", default_on_xla_cpu),
        ("float32", bfloat16_on_xla_cpu),
        ("bfloat16", default_on_xla_cpu),
        ("float32", project),
    ],
)
@pytest.mark.parametrize("out", [3, 7], ids=["narrower", "wider"])
def test_the_projections_own_gradient_is_the_gradient_of_its_product(dtype: str, own: Any, out: int) -> None:
    x, kernel, cotangent = (
        jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(2, 3, 5), (5, out), (2, 3, out)])
    )
    ours, vjp = jax.vjp(own, x, kernel)
    expected, vjp_expected = jax.vjp(jnp.matmul, x, kernel)
    tolerance = 1e-6 if (dtype, own) == ("float32", default_on_xla_cpu) else 2e-2
    for got, wanted in zip([ours, *vjp(cotangent)], [expected, *vjp_expected(cotangent)], strict=True):
        assert got.dtype == wanted.dtype == dtype
        np.testing.assert_allclose(got.astype(np.float32), wanted.astype(np.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("own", [bfloat16_on_xla_cpu, project])
def test_in_bfloat16_the_factors_are_rounded_and_the_sums_are_not(own: Any) -> None:
    """1 + 2⁻¹⁰ is 1 in bfloat16, and a sum kept in it would not be 4097."""
    many, one = jnp.full((1, 4097), 1 + 2**-10), jnp.full((1, 1), 1 + 2**-10)

    def sums(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> list[float]:
        """The largest number of the product and of each gradient."""
        out, vjp = jax.vjp(own, x, kernel)
        return [float(array.max()) for array in (out, *vjp(cotangent))]

    assert sums(many, many.T, one) == [4097, 1, 1]
    assert sums(one, many, many) == [1, 4097, 1]
    assert sums(many.T, one, many.T) == [1, 1, 4097]
    assert float(projection(many, many.T, precision="default")[0, 0]) > 4100


# B 2, S 7, D 5, V 11; parts of 3, 3 and 1 positions, padded to 3.
SHAPES = {"float32": 2 * 11 * 3 * 4, "bfloat16": 2 * 11 * 3 * 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_parts_it_is_what_it_is_at_once(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 7, 5), dtype)
    embedding = jax.random.normal(jax.random.key(1), (11, 5))
    targets = jax.random.randint(jax.random.key(2), (2, 7), 0, 11)
    weights = jax.random.uniform(jax.random.key(3), (2, 7))

    def weighted(x: jax.Array, embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = projected_losses(x, embedding, targets)
        return (losses * weights).sum(), losses

    def both() -> list[jax.Array]:
        gradients, losses = jax.grad(weighted, argnums=(0, 1), has_aux=True)(x, embedding)
        return [losses, *gradients]

    at_once = both()
    assert at_once[0].dtype == jnp.float32
    expected = next_token_losses(x @ embedding.astype(dtype).T, targets)
    np.testing.assert_allclose(at_once[0], expected, rtol=1e-6)
    monkeypatch.setattr(loss, "MOST_LOGITS", SHAPES)
    assert str(jax.make_jaxpr(projected_losses)(x, embedding, targets)).count("scan[") == 1
    tolerance = {"float32": 1e-6, "bfloat16": 2e-2}[dtype]
    for ours, theirs in zip(both(), at_once, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=tolerance, atol=tolerance)


def test_the_logits_of_a_large_vocabulary_are_never_all_there() -> None:
    batch, length, width, vocab_size = 4, 512, 16, 32_000
    shapes = (
        jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab_size, width), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
    )
    gradient = jax.grad(lambda *arrays: projected_losses(*arrays).sum(), argnums=(0, 1))
    memory = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < batch * length * vocab_size * 4
