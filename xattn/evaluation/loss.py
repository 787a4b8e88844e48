"""Loss on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xattn.backend import activations
from xattn.data.batches import Windows
from xattn.model.hyperparameters import ModelHyperparameters
from xattn.model.transformer import LanguageModel

ScoreWindows = Callable[[Any, ModelHyperparameters, Windows], jax.Array]


class HeldOutLoss(NamedTuple):
    """val_loss: nats per token. val_bpb: bits per byte, None where tokens stand for no bytes."""

    val_loss: float
    val_bpb: float | None


@lru_cache(maxsize=8)  # or each call would compile anew
def score_windows(model: LanguageModel) -> ScoreWindows:
    """(params, hyperparameters, windows) → Σ weights · loss, in nats, a float32 scalar."""

    def score(params: Any, hyperparameters: ModelHyperparameters, windows: Windows) -> jax.Array:
        losses: Any = model.apply(
            {"params": params},
            *(windows.inputs, hyperparameters, jnp.asarray(windows.targets)),
            segment_ids=windows.segment_ids,
            method="losses",
        )
        return jnp.sum(losses * windows.weights)

    return jax.jit(score)


activations.caches.append(score_windows.cache_clear)


def held_out_loss(
    score: ScoreWindows,
    params: Any,
    hyperparameters: ModelHyperparameters,
    windows: Sequence[Windows],
    *,
    bytes_per_token: float | None,
) -> HeldOutLoss:
    """The mean over every scored token. Waits for the device once. bytes_per_token: of the scored tokens."""
    sums, weights = [], 0.0
    for each in windows:
        sums.append(score(params, hyperparameters, each))
        weights += float(each.weights.sum())
    nats = sum(float(s) for s in jax.device_get(sums))  # in float64, batch after batch
    per_token = nats / weights
    return HeldOutLoss(per_token, None if bytes_per_token is None else bits_per_byte(per_token, bytes_per_token))


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """nats per token / ln 2 / bytes per token."""
    return nats_per_token / math.log(2) / bytes_per_token
