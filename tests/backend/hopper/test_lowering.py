"""Without a GPU: every configuration is lowered for CUDA, and the program holds the kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from xattn.backend import attention, dispatch
from xattn.backend.hopper.fused import fused
from xattn.backend.hopper.kernels import Meaning
from xattn.backend.hopper.sizes import Tiles

CALL = "stablehlo.custom_call @mosaic_gpu"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table believes that there is a Hopper GPU."""
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("cuda", "9.0", ""))


def kernels(function: Any, *arrays: Any) -> int:
    """How often the program of function, lowered for CUDA, calls a Mosaic kernel. Lowering needs no GPU."""
    text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    return text.count(CALL)


# Each value of every choice, not each of their products: activation, causal, dtype, D, heads, S, tiles.
CONFIGURATIONS = [
    (True, True, "bfloat16", 128, (4, 4), 256, Tiles()),
    (
        True,
        False,
        "float16",
        64,
        (4, 2),
        200,
        Tiles(form="polynomial4", form_backward="polynomial3", keys=64, take_turns=False),
    ),
    (True, True, "bfloat16", 64, (2, 1), 128, Tiles(form="split", form_backward="split")),
    (False, True, "float16", 128, (4, 1), 1, Tiles(keys_dq=64, queries_dkv=128, stages=1)),
    (False, False, "bfloat16", 64, (3, 3), 384, Tiles(form="polynomial3", stages=3)),
]


@pytest.mark.parametrize(("sigmoid", "causal", "dtype", "width", "heads", "length", "tiles"), CONFIGURATIONS, ids=str)
def test_forward_and_backward_are_three_kernels(
    sigmoid: bool, causal: bool, dtype: str, width: int, heads: tuple[int, int], length: int, tiles: Tiles
) -> None:
    q, k = (jax.ShapeDtypeStruct((2, n, length, width), dtype) for n in heads)
    bias = jax.ShapeDtypeStruct((2, heads[0]), "float32")

    def both(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> Any:
        out, vjp = jax.vjp(lambda *x: fused(*x, Meaning(sigmoid=sigmoid, causal=causal), tiles), q, k, v, bias)
        return out, vjp(out)

    assert kernels(both, q, k, k, bias) == 3
    out, gradients = jax.eval_shape(both, q, k, k, bias)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in (q, k, k, bias)]


@pytest.mark.parametrize(
    "tiles",
    [Tiles(stages=3), Tiles(keys_dq=64, queries_dkv=128, stages=3), Tiles(stages=4), Tiles(stages=0)],
    ids=str,
)
def test_what_shared_memory_cannot_hold_is_refused(tiles: Tiles) -> None:
    """At D 128: q's gradient, those of k and v, the forward; a GPU would only notice at the first call."""
    q = jax.ShapeDtypeStruct((1, 1, 128, 128), "bfloat16")

    def loss(q: jax.Array) -> jax.Array:
        return jnp.sum(fused(q, q, q, jnp.zeros((1, 1)), Meaning(sigmoid=True, causal=True), tiles), dtype="float32")

    with pytest.raises(ValueError, match=r"head width 128: a block needs [\d,]+ bytes .* may have 232,448; stages ≥ 1"):
        jax.eval_shape(jax.grad(loss), q)


def test_tiles_are_refused_by_the_kernel_that_they_do_not_fit_alone() -> None:
    """The bench sweeps the forward by itself: 224 KiB at D 128 and three stages."""
    q = jax.ShapeDtypeStruct((1, 1, 128, 128), "bfloat16")
    meaning = Meaning(sigmoid=True, causal=True)
    assert jax.eval_shape(lambda q: fused(q, q, q, jnp.zeros((1, 1)), meaning, Tiles(stages=3)), q).shape == q.shape


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
@pytest.mark.usefixtures("hopper")
def test_a_named_choice_takes_the_kernels_and_a_pack_of_runs_too(activation: str) -> None:
    """theta and the bias are traced, with gradients; under vmap they differ from run to run."""
    q = jnp.zeros((2, 4, 130, 64), jnp.bfloat16)

    def loss(q: jax.Array, theta: jax.Array, bias: jax.Array, implementation: str) -> jax.Array:
        given = {"sigmoid_bias": bias} if activation == "sigmoid" else {}
        out = attention(q, q, q, activation_function=activation, theta=theta, implementation=implementation, **given)
        return jnp.sum(out.astype(jnp.float32))

    one = (q, jnp.float32(100.0), jnp.zeros(4))
    two = tuple(jnp.stack([x, x]) for x in one)
    run = jax.value_and_grad(loss, argnums=(0, 1, 2))
    assert kernels(lambda *x: run(*x, "hopper"), *one) == 3
    assert kernels(jax.vmap(lambda *x: run(*x, "hopper")), *two) == 3
    # What has not been measured is not chosen by itself.
    assert kernels(lambda *x: run(*x, "auto"), *one) == 0
