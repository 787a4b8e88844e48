"""Text from a model, one token after the other."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from xattn.model.transformer import LanguageModel, ModelHyperparameters


@partial(jax.jit, static_argnames=("model", "num_tokens"))
def generate(
    model: LanguageModel,
    params: dict,
    hyperparameters: ModelHyperparameters,
    prompt: jax.Array,
    *,
    num_tokens: int,
    temperature: jax.Array | float,
    key: jax.Array,
) -> jax.Array:
    """Continues a prompt: int (P,), P ≥ 1 → int32 (num_tokens,).

    Each token is drawn from softmax(logits / temperature), or is the likeliest where temperature is 0, given the last
    context_length tokens.
    """
    context_length = model.backend.context_length
    prompt = prompt.astype(jnp.int32)[-context_length:]
    known = prompt.shape[0]
    size = min(context_length, known + num_tokens)  # no larger than is ever filled
    window = jnp.zeros(size, jnp.int32).at[:known].set(prompt)

    def draw(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        window, length = carry
        # Padding stands to the right of the last known token, where causal attention never looks.
        logits: Any = model.apply({"params": params}, window[None], hyperparameters)
        next_logits = logits[0, length - 1].astype(jnp.float32)
        sampled = jax.random.categorical(key, next_logits / jnp.where(temperature > 0, temperature, 1.0))
        token = jnp.where(temperature > 0, sampled, next_logits.argmax()).astype(jnp.int32)
        full = length == size
        window = jnp.where(full, jnp.roll(window, -1), window)
        length = jnp.where(full, length, length + 1)
        return (window.at[length - 1].set(token), length), token

    _, tokens = jax.lax.scan(draw, (window, jnp.int32(known)), jax.random.split(key, num_tokens))
    return tokens
