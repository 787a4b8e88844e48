"""The attention study: what each head attends to, in numbers that are comparable across the three activations.

It is a separate program that reads the parameters. The training program does not depend on whether a study runs.

Under ``softmax`` the weights of a row sum to 1. Under ``sigmoid`` the sum is anything from 0 to the number of keys, and
under ``none`` it is arbitrary, with weights of both signs. Shares are therefore based on magnitudes:
p_ts = |P_ts| / Σ_s' |P_ts'|, which under softmax is P itself. Σ_s |P_ts| is reported separately.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xattn.backend.reference import attended
from xattn.backend.spec import AttentionSpec, product
from xattn.data.batches import Batch
from xattn.model.attention import OF_TOKENS, Inputs, of_terms
from xattn.model.config import BackendConfig
from xattn.model.hyperparameters import (
    LayerHyperparameters,
    ModelHyperparameters,
    layer_hyperparameters,
    layer_spec,
)
from xattn.model.pattern import layers_of
from xattn.model.transformer import LanguageModel, attention_inputs

SEQUENCES = 4  # the first held-out sequences that score
MAP_SIDE = 64  # at most
# Most logits in memory at a time, for one sequence in one layer. If NH · S² is larger, fewer rows are studied.
_LOGITS = 2**23


class AttentionStatistics(NamedTuple):
    """The study of every layer and head."""

    statistics: Mapping[str, jax.Array]
    """Name → (L, NH); see :func:`attention_statistics`."""
    maps: jax.Array
    """(L, NH, T, T'), T, T' ≤ 64, of the first sequence: shares of evenly spaced rows, summed over T' key ranges."""


AttentionStatisticsOf = Callable[[Any, ModelHyperparameters, Batch], AttentionStatistics]


def attention_statistics(model: LanguageModel, out_shardings: Any = None) -> AttentionStatisticsOf:
    """Return a function (params, hyperparameters, batch) → the study of every layer and head, in float32.

    A, P and out are as in :func:`xattn.backend.api.attention`. The shares p are of the weight on keys; a sink has none.
    Statistics cover evenly spaced rows t of all sequences (all rows if NH · S² ≤ 2²³):

    - ``entropy``: mean over t of −Σ_s p_ts ln p_ts, in nats. ``effective_keys``: mean of its exponential, which is the
      number of keys, 1 to t + 1, with the same entropy if a row were spread evenly over them.
    - ``max_logit``: the largest score A_ts that may be attended to, with the logit scale, before bias, decay and input
      gate. Under ``none`` without a decay or an input gate it is the largest weight.
    - ``weight_sum``: mean of Σ_s |P_ts|. Under softmax it is 1, or with a sink 1 minus the sink's weight.
    - ``first_token``: mean of p_t0, the share of the sequence's first token.
    - ``distance_<d>``: mean of Σ p_ts over d ≤ t − s < d', for d = 0, 1, 4, 16, …; d' is the next of these.
    - ``output_norm``: mean of ‖out_t‖₂, before the terms on a head's output and the output projection.

    ``out_shardings``: sharding of the results if parameters are on several devices; every host must be able to read it.
    """

    def study(params: Any, hyperparameters: ModelHyperparameters, batch: Batch) -> AttentionStatistics:
        segment_ids: Any = batch.segment_ids
        inputs = attention_inputs(model, params, jnp.asarray(batch.inputs), hyperparameters, segment_ids)
        found = {
            kind: jax.lax.map(
                partial(
                    _of_layer, segment_ids, model.backend.kinds[kind], layer_hyperparameters(hyperparameters, kind)
                ),
                of_layers,
            )
            for kind, of_layers in inputs.items()
        }
        if len(found) == 1:
            return found["backend"]
        layers = layers_of(model.backend, model.config.num_layers)
        order = np.argsort([layer for kind in found for layer in layers[kind]])  # found is grouped by kind
        return jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *found.values())

    return jax.jit(study, out_shardings=out_shardings)


def statistics_batch(held_out: Sequence[Batch]) -> Batch:
    """Return the sequences that every study of a run looks at: the first four held-out ones that score, or fewer."""
    found: list[Batch] = []
    for batch in held_out:
        missing = SEQUENCES - sum(len(each.tokens) for each in found)
        if not missing:
            break
        found.append(batch.rows(np.flatnonzero(batch.weights.any(-1))[:missing]))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def statistics_row(study: AttentionStatistics) -> dict[str, float]:
    """Return ``attention/<layer>/<head>/<statistic>`` → value, as in metrics.jsonl."""
    found = {name: np.asarray(values) for name, values in jax.device_get(study.statistics).items()}
    layers, heads = next(iter(found.values())).shape
    return {
        f"attention/{layer}/{head}/{name}": float(values[layer, head])
        for layer in range(layers)
        for head in range(heads)
        for name, values in found.items()
    }


def _of_layer(
    segment_ids: Any, kind: BackendConfig, hyperparameters: LayerHyperparameters, inputs: Inputs
) -> AttentionStatistics:
    """Study one layer over all sequences, which are the first axis of the per-token arrays."""

    def of_sequence(of_tokens: Any) -> AttentionStatistics:
        of_tokens, segment_ids = jax.tree.map(lambda x: x[None], of_tokens)
        one = inputs._replace(**of_tokens)
        spec = layer_spec(
            kind,
            num_heads=one.q.shape[1],
            num_kv_heads=one.k.shape[1],
            length=one.q.shape[2],
            segment_ids=segment_ids,
            **(hyperparameters._asdict() | of_terms(one)),
        )
        return _of_sequence(one.q, one.k, one.v, spec)

    each = jax.lax.map(of_sequence, ({name: getattr(inputs, name) for name in OF_TOKENS}, segment_ids))
    over = {name: jnp.max if name.startswith("max") else jnp.mean for name in each.statistics}
    return AttentionStatistics({name: over[name](x, axis=0) for name, x in each.statistics.items()}, each.maps[0])


def _of_sequence(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> AttentionStatistics:
    """Study one sequence in one layer: q (1, NH, S, DHQK), k and v with their own heads → statistics (NH,)."""
    num_heads, length = q.shape[1:3]
    rows = jnp.asarray(_spread(length, _LOGITS // (num_heads * length)))
    asked = attended(q, k, spec, rows)
    scores, weights = asked.scores, asked.weights
    out = product("bhts,bhsd->bhtd", weights.astype(v.dtype), jnp.repeat(v, num_heads // v.shape[1], axis=1))
    sums = jnp.sum(jnp.abs(weights), axis=-1)
    shares = jnp.abs(weights) / jnp.where(sums > 0, sums, 1)[..., None]
    entropy = -jnp.sum(jax.scipy.special.xlogy(shares, shares), axis=-1)
    by_row = {
        "entropy": entropy,
        "effective_keys": jnp.exp(entropy),
        "weight_sum": sums,
        "first_token": shares[..., 0],
        "output_norm": jnp.linalg.norm(out, axis=-1),
    }
    distance = rows[:, None] - jnp.arange(length)
    for low, high in _distances(length):
        by_row[f"distance_{low}"] = jnp.sum(jnp.where((low <= distance) & (distance < high), shares, 0), axis=-1)
    statistics = {name: jnp.mean(values[0], axis=-1) for name, values in by_row.items()}
    statistics["max_logit"] = jnp.max(jnp.where(asked.keep, scores[0], -jnp.inf), axis=(-2, -1))
    shown = shares[0][:, _spread(rows.size, MAP_SIDE)]
    side = min(length, MAP_SIDE)
    stretches = jax.nn.one_hot(jnp.arange(length) * side // length, side)
    return AttentionStatistics(statistics, product("hts,sm->htm", shown, stretches))


def _spread(length: int, most: int) -> np.ndarray:
    """Return at most ``most`` evenly spaced numbers below ``length``, including the first and the last."""
    return np.linspace(0, length - 1, min(length, max(most, 2))).round().astype(np.int32)


def _distances(length: int) -> list[tuple[int, int]]:
    """Return (0, 1), (1, 4), (4, 16), (16, 64), … until they cover all distances below ``length``."""
    edges = [0, 1]
    while edges[-1] < length:
        edges.append(4 * edges[-1])
    return list(itertools.pairwise(edges))
