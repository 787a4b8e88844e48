"""Held-out loss: the mean over every scored token, whatever the padding and the batch."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xattn.config import compose
from xattn.data.batches import Batching, HeldOutBatches
from xattn.evaluation.loss import held_out_loss, score_batch
from xattn.model.transformer import LanguageModel, LayerHyperparameters

HYPER = LayerHyperparameters(jnp.float32(100.0), jnp.float32(-1.5))
TEXT = np.random.default_rng(0).integers(0, 11, 52)


def test_every_token_but_the_first_counts_once() -> None:
    """One sequence at a time in float64: 51 targets are seven sequences of 7 and one of 2, in padded batches of 3."""
    config = compose(["backend.context_length=7", "model.num_layers=1", "model.embedding_dim=8", "model.mlp_dim=6"])
    model = LanguageModel(config.model, config.backend, 11)
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 7), jnp.int32), HYPER)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), jnp.float32), shapes)
    held_out = HeldOutBatches([(TEXT, 1.0)], Batching(context_length=7, batch_size=3, sequences="all", seed=0))
    assert sum(each.weights.sum() for each in held_out) == 51

    forward = jax.jit(lambda tokens: model.apply({"params": params}, tokens, HYPER))
    nats = answers_nats = 0.0
    for start in range(0, 51, 7):
        sequence = np.zeros(8, np.int32)
        length = len(TEXT[start : start + 8])
        sequence[:length] = TEXT[start : start + 8]
        logits = np.asarray(forward(sequence[None, :-1])[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= sum(log_p[t, sequence[t + 1]] for t in range(length - 1))
        answers_nats -= sum(log_p[t, (sequence[t + 1] + 3) % 11] for t in range(length - 1))

    score = score_batch(model)
    loss = held_out_loss(score, params, HYPER, held_out, bytes_per_token=2.0)
    assert loss.val_loss == pytest.approx(nats / 51, rel=1e-5)
    assert loss.val_bpb == pytest.approx(nats / 51 / math.log(2) / 2, rel=1e-5)
    asked = [each._replace(answers=(each.targets + 3) % 11) for each in held_out]  # not for the next token
    loss = held_out_loss(score, params, HYPER, asked, bytes_per_token=None)
    assert loss.row() == {"val_loss": pytest.approx(answers_nats / 51, rel=1e-5), "val_bpb": None}
    assert loss.of_sequences.shape == (8, 2)  # without the row that fills the last batch
    np.testing.assert_array_equal(loss.of_sequences[:, 1], [*[7] * 7, 2])
    assert loss.of_sequences[:, 0].sum() == pytest.approx(answers_nats, rel=1e-5)
