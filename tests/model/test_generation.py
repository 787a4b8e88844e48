"""Text, one token after the other, against the model's own parallel forward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.config import compose
from xattn.model.generation import generate
from xattn.model.transformer import LanguageModel, ModelHyperparameters

V = 11
HYPER = ModelHyperparameters(jnp.float32(100.0), jnp.float32(-1.5))
SMALL = ["backend.context_length=6", "model.num_layers=2", "model.num_heads=2", "model.embedding_dim=12"]


@partial(jax.jit, static_argnames="model")
def next_logits(model: LanguageModel, params: Any, text: jax.Array) -> jax.Array:
    return model.apply({"params": params}, text[None], HYPER)[0, -1]


def model_and_params(activation: str) -> tuple[LanguageModel, Any]:
    """Parameters large enough that the likeliest token is another one at each step."""
    config = compose([*SMALL, "model.mlp_dim=10", "model.layers=scanned", f"backend={activation}"])
    model = LanguageModel(config.model, config.backend, V)
    random = np.random.default_rng(3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 6), jnp.int32), HYPER)["params"]
    return model, jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize(
    ("activation", "prompt"),
    [("softmax", [3, 1, 4, 1]), ("sigmoid", [1, 2, 3, 4, 5, 6]), ("none", [9, 9, 9, 1, 2, 3, 4, 5, 6])],
)
def test_temperature_zero_is_the_likeliest_token_of_the_forward_pass(activation: str, prompt: list[int]) -> None:
    """Also past context_length, where the window slides; of a longer prompt the last context_length tokens count."""
    model, params = model_and_params(activation)
    tokens = generate(model, params, HYPER, jnp.asarray(prompt), num_tokens=12, temperature=0.0, key=jax.random.key(0))
    assert tokens.shape == (12,)
    assert tokens.dtype == jnp.int32
    text = list(prompt)
    for token in np.asarray(tokens).tolist():
        logits = np.asarray(next_logits(model, params, jnp.asarray(text[-6:], jnp.int32)))
        best, second = np.sort(logits)[[-1, -2]]
        assert best - second > 1e-4  # no tie that rounding could turn
        assert token == int(logits.argmax())
        text.append(token)
    assert len(set(text)) > 2


def test_a_key_draws_the_same_tokens_again() -> None:
    model, params = model_and_params("softmax")

    def drawn(seed: int, temperature: float) -> list[int]:
        return generate(
            model,
            params,
            HYPER,
            jnp.asarray([3], jnp.uint8),
            num_tokens=30,
            temperature=temperature,
            key=jax.random.key(seed),
        ).tolist()

    assert drawn(0, 2.0) == drawn(0, 2.0)
    assert drawn(0, 2.0) != drawn(1, 2.0)
    assert drawn(0, 1e-6) == drawn(1, 1e-6) == drawn(5, 0.0)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    model, params = model_and_params("softmax")
    prompt, temperature, draws = jnp.asarray([3, 1]), 3.0, 4000
    tokens = jax.vmap(
        lambda key: generate(model, params, HYPER, prompt, num_tokens=1, temperature=temperature, key=key)[0]
    )(jax.random.split(jax.random.key(0), draws))
    logits = next_logits(model, params, prompt)
    p = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    frequencies = np.bincount(np.asarray(tokens), minlength=V) / draws
    assert (np.abs(frequencies - p) <= 5 * np.sqrt(p * (1 - p) / draws) + 1e-3).all()
    assert p.max() < 0.9
