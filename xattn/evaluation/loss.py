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
from xattn.data.batches import Windows
from xattn.model.hyperparameters import ModelHyperparameters
from xattn.model.transformer import LanguageModel

ScoreWindows = Callable[[Any, ModelHyperparameters, Windows], tuple[jax.Array, jax.Array]]


class HeldOutLoss(NamedTuple):
    """val_loss: nats per token. val_bpb: bits per byte, None where tokens stand for no bytes. of_windows: float32
    (windows, 2), for each window Σ weights · loss in nats, and Σ weights, its scored tokens."""

    val_loss: float
    val_bpb: float | None
    of_windows: np.ndarray

    def row(self) -> dict[str, float | None]:
        """For metrics.jsonl."""
        return {"val_loss": self.val_loss, "val_bpb": self.val_bpb}


@lru_cache(maxsize=8)  # or each call would compile anew
def score_windows(model: LanguageModel, out_shardings: Any = None) -> ScoreWindows:
    """(params, hyperparameters, windows of shape (B, S)) → Σ weights · loss in nats, a float32 scalar, and the same sum
    of each window, float32 (B,).

    out_shardings: where the results lie, of parameters on several devices: a sharding that every host can read.
    """

    def score(params: Any, hyperparameters: ModelHyperparameters, windows: Windows) -> tuple[jax.Array, jax.Array]:
        losses: Any = model.apply(
            {"params": params},
            *(windows.inputs, hyperparameters, jnp.asarray(windows.targets)),
            segment_ids=windows.segment_ids,
            places=windows.places,
            method="losses",
        )
        weighted = losses * windows.weights
        return jnp.sum(weighted), jnp.sum(weighted, axis=1)

    return jax.jit(score, out_shardings=out_shardings)


registry.caches.append(score_windows.cache_clear)


def held_out_loss(
    score: ScoreWindows,
    params: Any,
    hyperparameters: ModelHyperparameters,
    windows: Sequence[Windows],
    *,
    bytes_per_token: float | None,
) -> HeldOutLoss:
    """The mean over every scored token. Waits for the device once. bytes_per_token: of the scored tokens."""
    found, tokens = [], []
    for each in windows:
        found.append(score(params, hyperparameters, each))
        tokens.append(each.weights.sum(axis=1))
    batches = jax.device_get(found)
    weights = sum(float(of_batch.sum()) for of_batch in tokens)
    nats = sum(float(total) for total, _ in batches)  # in float64, batch after batch
    per_token = nats / weights
    of_windows = np.stack([np.concatenate([each for _, each in batches]), np.concatenate(tokens)], axis=1)
    is_padding = of_windows[:, 1] == 0
    per_byte = None if bytes_per_token is None else bits_per_byte(per_token, bytes_per_token)
    return HeldOutLoss(per_token, per_byte, of_windows[~is_padding])


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """nats per token / ln 2 / bytes per token."""
    return nats_per_token / math.log(2) / bytes_per_token
