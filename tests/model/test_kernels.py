"""A training step that was told to take the Hopper kernels holds them: lowered for CUDA, which needs no GPU."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from xattn.backend import dispatch
from xattn.config import compose
from xattn.model.loss import next_token_losses
from xattn.model.transformer import LanguageModel, LayerHyperparameters

SMALL = [
    *("backend.context_length=128", "model.dtype=bfloat16", "model.num_heads=2", "model.embedding_dim=128"),
    "model.layers=scanned",
]


@pytest.mark.parametrize(("implementation", "kernels"), [("hopper", 3), ("auto", 0)])
def test_a_training_step_holds_the_kernels(implementation: str, kernels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("cuda", "9.0", ""))
    config = compose(["backend=sigmoid", f"backend.implementation={implementation}", *SMALL])
    model = LanguageModel(config.model, config.backend, 256)
    tokens = jnp.zeros((2, 129), jnp.int32)
    numbers = LayerHyperparameters(jnp.float32(1e4), jnp.float32(-math.log(128)))

    def step(params: Any, numbers: LayerHyperparameters, tokens: jax.Array) -> Any:
        def loss_of(params: Any) -> jax.Array:
            logits: Any = model.apply({"params": params}, tokens[:, :-1], numbers)
            return jnp.mean(next_token_losses(logits, tokens[:, 1:]))

        loss, gradient = jax.value_and_grad(loss_of)(params)
        return loss, jax.tree.map(lambda x, d: x - 0.1 * d, params, gradient)

    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote bfloat16 to float32 implicitly
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens[:, :-1], numbers)["params"])
        text = jax.jit(step).trace(params, numbers, tokens).lower(lowering_platforms=("cuda",)).as_text()
    # The layers are one body of a scan: forward, q's gradient, k's and v's.
    assert text.count("stablehlo.custom_call @mosaic_gpu") == kernels
