"""Loss on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xattn import registry
from xattn.data.batches import Batch
from xattn.model.hyperparameters import ModelHyperparameters
from xattn.model.transformer import LanguageModel

ScoreBatch = Callable[[Any, ModelHyperparameters, Batch], tuple[jax.Array, jax.Array]]


class HeldOutLoss(NamedTuple):
    """The loss on held-out text."""

    val_loss: float
    """Nats per token."""
    val_bpb: float | None
    """Bits per byte; None if tokens don't stand for bytes."""
    of_sequences: np.ndarray
    """Float32 (sequences, 2): Σ weights · loss of each in nats, and Σ weights, which counts its scored tokens."""

    def row(self) -> dict[str, float | None]:
        """Return the values for metrics.jsonl."""
        return {"val_loss": self.val_loss, "val_bpb": self.val_bpb}


@lru_cache(maxsize=8)  # otherwise each call would recompile
def score_batch(model: LanguageModel, out_shardings: Any = None) -> ScoreBatch:
    """Return a function from (params, hyperparameters, batch (B, S)) to Σ weights · loss in nats: total and (B,).

    ``out_shardings``: sharding of the results if parameters are on several devices; every host must be able to read it.
    """

    def score(params: Any, hyperparameters: ModelHyperparameters, batch: Batch) -> tuple[jax.Array, jax.Array]:
        losses: Any = model.apply(
            {"params": params},
            *(batch.inputs, hyperparameters, jnp.asarray(batch.targets)),
            segment_ids=batch.segment_ids,
            places=batch.places,
            method="losses",
        )
        weighted = losses * batch.weights
        return jnp.sum(weighted), jnp.sum(weighted, axis=1)

    return jax.jit(score, out_shardings=out_shardings)


registry.caches.append(score_batch.cache_clear)


def held_out_loss(
    score: ScoreBatch,
    params: Any,
    hyperparameters: ModelHyperparameters,
    held_out: Sequence[Batch],
    *,
    bytes_per_token: float | None,
) -> HeldOutLoss:
    """Return the mean over all scored tokens, waiting for the device only once. ``bytes_per_token`` is theirs."""
    found, tokens = [], []
    for batch in held_out:
        found.append(score(params, hyperparameters, batch))
        tokens.append(batch.weights.sum(axis=1))
    scores = jax.device_get(found)
    weights = sum(float(of_batch.sum()) for of_batch in tokens)
    nats = sum(float(total) for total, _ in scores)  # in float64, batch by batch
    per_token = nats / weights
    of_sequences = np.stack([np.concatenate([each for _, each in scores]), np.concatenate(tokens)], axis=1)
    is_padding = of_sequences[:, 1] == 0
    per_byte = None if bytes_per_token is None else per_token / math.log(2) / bytes_per_token
    return HeldOutLoss(per_token, per_byte, of_sequences[~is_padding])
