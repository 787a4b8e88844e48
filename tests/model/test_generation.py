"""Text, one token after the other, against the model's own parallel forward pass."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.config import compose
from xattn.model import generation
from xattn.model.generation import CHUNK, Sampling, TrainedModel, draw, generate, stream
from xattn.model.transformer import LanguageModel, LayerHyperparameters, init_params

V = 11
HYPER = LayerHyperparameters(jnp.float32(100.0), jnp.float32(-1.5))
SMALL = ["backend.context_length=6", "model.num_layers=2", "model.num_heads=2", "model.embedding_dim=12"]
GREEDY = Sampling(temperature=0.0)
KEY = jax.random.key(0)


@partial(jax.jit, static_argnames="model")
def forward(model: LanguageModel, params: Any, text: jax.Array) -> jax.Array:
    return model.apply({"params": params}, text[None], HYPER)[0]


draw_many = jax.jit(jax.vmap(draw, (0, None, None)))


@cache
def model_and_params(*overrides: str) -> tuple[LanguageModel, Any]:
    """Parameters large enough that the likeliest token is another one at each step."""
    config = compose([*SMALL, "model.mlp_dim=10", "model.layers=scanned", *overrides])
    model = LanguageModel(config.model, config.backend, V)
    random = np.random.default_rng(3)
    shapes: Any = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return model, jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(
    ("overrides", "prompt"),
    [
        (["backend=softmax"], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 1, 2]),
        (["backend=sigmoid", "backend.sigmoid_bias=learned", "model.num_kv_heads=1"], [1]),
        (
            [
                *("backend=none", "backend.implementation=reference", "backend.every=2"),
                *("backend.then={activation: softmax}", "model.num_layers=3"),
            ],
            [5, 0, 5],
        ),
        (
            [
                *("backend=sigmoid", "backend.sigmoid_bias=learned", "backend.window=5", "backend.every=2"),
                *("backend.then={activation: none, window: null}", "model.num_layers=3"),
            ],
            [1, 2, 3, 4, 5, 6, 7, 8, 9],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
def test_temperature_zero_is_the_likeliest_token_of_the_forward_pass(
    overrides: list[str], prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step, far past context_length: the cache is doubled again and again, and nothing is forgotten but what a
    window leaves out."""
    model, params = model_and_params(*overrides)
    trained = TrainedModel(model, params, HYPER)
    monkeypatch.setattr(generation, "ROOM", 1)
    pieces = stream(trained, np.asarray(prompt), num_tokens=24, sampling=GREEDY, key=KEY)
    tokens = np.concatenate(list(pieces))
    assert tokens.shape == (24,)
    assert tokens.dtype == np.int32
    logits = np.asarray(forward(model, params, np.asarray([*prompt, *tokens], np.int32)))[len(prompt) - 1 : -1]
    best, second = np.sort(logits, axis=-1)[:, [-1, -2]].T
    assert (best - second > 1e-4).all()  # no tie that rounding could turn
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert len(set(tokens.tolist())) > 2


def test_what_is_forgotten_changes_the_text() -> None:
    """The test above would see it: the model looks back past context_length."""
    model, params = model_and_params("backend=softmax")
    text = np.random.default_rng(0).integers(0, V, 13 + 24, np.int32)
    whole, cut = (np.asarray(forward(model, params, part))[-1] for part in (text, text[-6:]))
    assert np.abs(whole - cut).max() > 0.1


def test_a_key_draws_the_same_tokens_again() -> None:
    trained = TrainedModel(*model_and_params("backend=softmax"), HYPER)

    def drawn(seed: int, temperature: float, number: int = 30) -> list[int]:
        sampling = Sampling(temperature)
        prompt, key = np.asarray([3], np.uint8), jax.random.key(seed)
        return generate(trained, prompt, num_tokens=number, sampling=sampling, key=key).tolist()

    assert drawn(0, 2.0) == drawn(0, 2.0)
    assert drawn(0, 2.0) != drawn(1, 2.0)
    assert drawn(0, 2.0, CHUNK - 3) == drawn(0, 2.0)[: CHUNK - 3]
    assert drawn(0, 1e-6) == drawn(1, 1e-6) == drawn(5, 0.0)
    assert drawn(0, 2.0, 0) == []
    with pytest.raises(ValueError, match="at least one token"):
        generate(trained, np.zeros(0, np.int32), num_tokens=1, sampling=GREEDY, key=KEY)


def test_each_place_has_randomness_of_its_own() -> None:
    """Of a model that finds all tokens equally likely, whose text is nothing but what was drawn."""
    model, params = model_and_params("backend=softmax")
    nothing = TrainedModel(model, jax.tree.map(np.zeros_like, params), HYPER)
    tokens = generate(nothing, [3], num_tokens=3 * CHUNK, sampling=Sampling(1.0), key=KEY)
    assert len(set(tokens.tolist())) > V // 2
    assert len({chunk.tobytes() for chunk in tokens.reshape(3, CHUNK)}) == 3


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (None, None, [0, 1, 2, 3, 4]),
        (2, 1.0, [1, 3]),
        (5, 0.6, [1, 3]),
        (5, 0.5, [1]),
        (1, 0.99, [1]),
        (3, 0.85, [1, 3]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(top_k: int | None, top_p: float | None, kept: list[int]) -> None:
    """Among those that k and p keep; p is of what k has kept: of 0.5, 0.3, 0.1 in 0.9 the first two are 0.89."""
    p = np.array([0.1, 0.5, 0.06, 0.3, 0.04])
    temperature, draws = 3.0, 4000
    logits = (temperature * np.log(p)).astype(np.float32)
    tokens = draw_many(jax.random.split(KEY, draws), logits, Sampling(temperature, top_k, top_p))
    expected = np.where(np.isin(np.arange(5), kept), p, 0)
    expected /= expected.sum()
    frequencies = np.bincount(np.asarray(tokens), minlength=5) / draws
    assert (np.abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_sampling_reaches_the_tokens() -> None:
    """top_k = 1 and a tiny top_p leave only the likeliest, at any temperature."""
    trained = TrainedModel(*model_and_params("backend=softmax"), HYPER)

    def drawn(sampling: Sampling) -> list[int]:
        tokens = generate(trained, np.asarray([3]), num_tokens=20, sampling=sampling, key=jax.random.key(1))
        return tokens.tolist()

    greedy = drawn(GREEDY)
    assert drawn(Sampling(3.0, top_k=1)) == drawn(Sampling(3.0, top_p=1e-6)) == greedy
    assert drawn(Sampling(3.0, top_k=V, top_p=1.0)) == drawn(Sampling(3.0)) != greedy
