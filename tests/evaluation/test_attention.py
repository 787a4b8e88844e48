"""Attention statistics: every statistic against its formula in NumPy, and a picture that can be looked at."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.config import compose
from xattn.data.batches import Batch, Batching, HeldOutBatches
from xattn.evaluation import attention as subject
from xattn.evaluation.attention import attention_statistics, statistics_batch, statistics_row
from xattn.evaluation.attention_maps import draw
from xattn.model.transformer import LanguageModel, LayerHyperparameters

HYPER = LayerHyperparameters(jnp.float32(50.0), jnp.float32(-1.5))
WIDTH, LENGTH, HEADS = 6, 7, 3  # of a head; S; query heads, which share one key/value head
TOKENS = np.random.default_rng(0).integers(0, 11, (2, LENGTH))
BATCH = Batch(np.pad(TOKENS, ((0, 0), (0, 1))), np.ones((2, LENGTH), np.float32))
ACTIVATIONS = ("softmax", "sigmoid", "none")


def model_of(activation: str, *more: str) -> tuple[LanguageModel, Any]:
    sizes = ["model.num_layers=2", f"model.num_heads={HEADS}", "model.num_kv_heads=1", "model.mlp_dim=5"]
    keys = [f"backend.activation={activation}", f"backend.context_length={LENGTH}", "model.qk_norm=none", *more]
    config = compose([*sizes, f"model.embedding_dim={HEADS * WIDTH}", *keys])
    model = LanguageModel(config.model, config.backend, 11)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32), HYPER)["params"]
    random = np.random.default_rng(1)
    return model, jax.tree.map(lambda leaf: jnp.asarray(0.5 * random.standard_normal(leaf.shape), jnp.float32), shapes)


def by_formula(
    activation: str, params: Any, bias: float, rows: list[int], window: int, segments: Any = None
) -> dict[str, np.ndarray]:
    """The statistics of the first layer in float64, row by row and key by key: name → (NH,)."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    attention = jax.tree.map(lambda leaf: leaf[0], params["layers"]["attention"])
    layer = {name: attention[name]["kernel"] for name in ("query", "key", "value")}
    values: dict[str, list[np.ndarray]] = {}
    for row, tokens in enumerate(TOKENS):
        x = params["token_embedding"]["embedding"][tokens]
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["layers"]["attention_norm"]["scale"][0]
        q, k, v = (x @ layer[name] for name in ("query", "key", "value"))
        decay, gate = (_log_sigmoid(attention.get(name), x) for name in ("decay", "input_gate"))
        for t in rows:
            found: dict[str, list[float]] = {}
            for head in range(HEADS):
                keys = [s for s in range(t + 1) if t - window < s]
                keys = [s for s in keys if segments is None or segments[row][s] == segments[row][t]]
                a = np.array([_logit(q[t, head * WIDTH : (head + 1) * WIDTH], k[s], t - s) for s in keys])
                e = np.array([decay[s + 1 : t + 1].sum() + gate[s] for s in keys])
                sink = np.exp(attention["sink"][head]) if "sink" in attention else 0.0
                p = {
                    "softmax": np.exp(a + e) / (sink + np.exp(a + e).sum()),
                    "sigmoid": 1 / (1 + np.exp(-a - bias - e)),
                    "none": a * np.exp(e),
                }[activation]
                share = abs(p) / abs(p).sum()
                one: dict[str, float] = {"entropy": -(share * np.log(share)).sum(), "max_logit": a.max()}
                one |= {"effective_keys": math.exp(one["entropy"]), "weight_sum": abs(p).sum()}
                one |= {"first_token": share[0] if keys[0] == 0 else 0.0, "output_norm": np.linalg.norm(p @ v[keys])}
                for low, high in ((0, 1), (1, 4), (4, 16)):
                    one[f"distance_{low}"] = sum(x for x, s in zip(share, keys, strict=True) if low <= t - s < high)
                for name, value in one.items():
                    found.setdefault(name, []).append(value)
            for name, each in found.items():
                values.setdefault(name, []).append(np.array(each))
    return {name: np.max(x, 0) if name == "max_logit" else np.mean(x, 0) for name, x in values.items()}


def _log_sigmoid(gate: Any, x: np.ndarray) -> np.ndarray:
    """Of the pre-activations of the one key/value head, (S,)."""
    return np.zeros(LENGTH) if gate is None else -np.log1p(np.exp(-x @ gate["kernel"] - gate["bias"]))[:, 0]


def _logit(q: np.ndarray, k: np.ndarray, distance: int) -> float:
    """Rotation makes a logit depend on the distance alone: pairs as complex numbers."""
    q, k = (x[0::2] + 1j * x[1::2] for x in (q, k))
    angles = distance * 50.0 ** (-2 * np.arange(WIDTH // 2) / WIDTH)
    return float((q * np.exp(1j * angles) * k.conj()).sum().real) / math.sqrt(WIDTH)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_statistic_is_its_formula(activation: str) -> None:
    model, params = model_of(activation)
    found = attention_statistics(model)(params, HYPER, BATCH)
    expected = by_formula(activation, params, -1.5, list(range(LENGTH)), LENGTH)
    assert set(found.statistics) == set(expected)
    for name, values in found.statistics.items():
        assert values.shape == (2, HEADS)
        np.testing.assert_allclose(values[0], expected[name], rtol=2e-4, atol=1e-5, err_msg=name)
        if name != "weight_sum":  # of softmax it is 1 in every layer
            assert np.abs(values[0] - values[1]).max() > 1e-3, name
    np.testing.assert_allclose(found.maps.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_statistics_know_the_layers_terms_and_documents(activation: str) -> None:
    """max_logit is the score alone; a sink takes weight, and no share; what follows the heads is not in output_norm."""
    sink = ["backend.sink=learned"] if activation == "softmax" else []
    after = ["model.exclusive=true", "model.output_norm=rmsnorm", "model.output_gate=head"]
    model, params = model_of(activation, "backend.decay=input", "backend.input_gate=sigmoid", *sink, *after)
    segments = np.asarray([[0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]], np.int32)
    found = attention_statistics(model)(params, HYPER, BATCH._replace(segment_ids=segments))
    expected = by_formula(activation, params, -1.5, list(range(LENGTH)), LENGTH, segments)
    for name, values in found.statistics.items():
        np.testing.assert_allclose(values[0], expected[name], rtol=2e-4, atol=1e-5, err_msg=name)
    if sink:
        assert (found.statistics["weight_sum"] < 0.95).all()


def test_of_a_long_sequence_some_rows_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a learned bias and a window are those of the model."""
    model, params = model_of("sigmoid", "backend.sigmoid_bias=learned", "backend.window=3")
    params["layers"]["attention"]["sigmoid_bias"] = jnp.full((2, HEADS), 0.25)
    monkeypatch.setattr(subject, "_LOGITS", 3 * HEADS * LENGTH)
    found = attention_statistics(model)(params, HYPER, BATCH)
    expected = by_formula("sigmoid", params, 0.25, [0, 3, 6], 3)
    for name, values in found.statistics.items():
        np.testing.assert_allclose(values[0], expected[name], rtol=2e-4, atol=1e-5, err_msg=name)
    assert found.maps.shape == (2, HEADS, 3, LENGTH)


def test_rows_are_named_by_layer_and_head_and_sequences_that_only_pad_are_passed_over() -> None:
    model, params = model_of("none")
    batching = Batching(context_length=LENGTH, batch_size=3, sequences="all", seed=0)
    held_out = HeldOutBatches([(TOKENS.ravel()[:10], 1.0)], batching)
    chosen = statistics_batch(held_out)
    assert chosen.tokens.shape == (2, LENGTH + 1)
    found = attention_statistics(model)(params, HYPER, chosen)
    row = statistics_row(found)
    assert row["attention/1/2/entropy"] == pytest.approx(float(found.statistics["entropy"][1, 2]))
    assert len(row) == 2 * HEADS * len(found.statistics)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("packed_at", [None, 5])
def test_the_same_sequences_are_looked_at_whatever_a_batch_holds(batch_size: int, packed_at: int | None) -> None:
    ids = np.random.default_rng(2).integers(0, 11, 6 * LENGTH + 1)
    batching = Batching(context_length=LENGTH, batch_size=6, sequences="all", seed=0)
    (whole,) = HeldOutBatches([(ids, 1.0)], batching, packed_at)
    chosen = statistics_batch(HeldOutBatches([(ids, 1.0)], replace(batching, batch_size=batch_size), packed_at))
    assert (chosen.segment_ids is None) == (packed_at is None)
    jax.tree.map(np.testing.assert_array_equal, chosen, whole.rows(slice(4)))


def test_the_maps_are_drawn(tmp_path: Path) -> None:
    model, params = model_of("softmax")
    found = attention_statistics(model)(params, HYPER, BATCH)
    draw(found, tmp_path / "maps.png", step=3)
    first = (tmp_path / "maps.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    draw(found._replace(maps=found.maps[:, ::-1]), tmp_path / "maps.png", step=3)
    assert (tmp_path / "maps.png").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["maps.png"]
