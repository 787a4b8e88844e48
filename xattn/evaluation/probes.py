"""Probes: measurements of what a model can do with its context, which the mean loss does not show.

A probe is a set of sequences, and a few numbers computed from the model's loss and hits at every position. Probes read
the parameters and use none of the run's random generators, so probes do not change the bits of a run's result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from xattn import registry
from xattn.backend.activations import activation
from xattn.data.batches import Batch, Batching, in_batches
from xattn.data.config import DataConfig, tasks
from xattn.data.run_data import RunData, load_data
from xattn.data.task import Task, evaluation_examples, measures
from xattn.data.tokenizer import TextTokenizer
from xattn.errors import BadInput
from xattn.evaluation.config import registered_probes
from xattn.model.config import BackendConfig
from xattn.model.hyperparameters import ModelHyperparameters, with_sigmoid_bias
from xattn.model.loss import at, next_token_losses, spread
from xattn.model.transformer import LanguageModel

SEQUENCES = 64  # for each task used as a probe
LONGEST = 8  # times context_length, for extrapolation
LONG_SEQUENCES = 8


class TokenScores(NamedTuple):
    """The model's results at every position."""

    losses: np.ndarray
    """−log p of each target in nats, (n, S)."""
    correct: np.ndarray
    """Whether the target is the likeliest token, bool (n, S)."""


TokenScoresOf = Callable[[Any, ModelHyperparameters, Batch], Any]
Measure = Callable[[TokenScores], dict[str, float]]


@dataclass(frozen=True)
class Probe:
    """A set of sequences and the numbers to compute from a model's results on them."""

    name: str
    batches: Sequence[Batch]
    """Batches of one shape."""
    measure: Measure
    """Maps the scores of all rows, including padding rows, to named numbers."""
    sigmoid_bias: Mapping[str, float] = field(default_factory=dict)
    """Kind of layer → a bias to use in place of the run's own."""


@lru_cache(maxsize=8)
def token_scores_of(model: LanguageModel) -> TokenScoresOf:
    """Return a function (params, hyperparameters, batch) → :class:`TokenScores` of the batch, on the device."""

    def places(params: Any, hyperparameters: ModelHyperparameters, batch: Batch) -> Any:
        logits: Any = model.apply(
            {"params": params},
            *(batch.inputs, hyperparameters),
            segment_ids=batch.segment_ids,
            places=batch.places,
            method="logits",
        )
        targets = jnp.asarray(batch.targets)
        if batch.places is None:
            return next_token_losses(logits, targets), logits.argmax(-1) == targets
        asked = targets[at(batch.places)]
        found = next_token_losses(logits, asked), logits.argmax(-1) == asked
        return tuple(spread(each, batch.places, targets.shape[1]) for each in found)

    return jax.jit(places)


registry.caches.append(token_scores_of.cache_clear)


def run_probes(
    token_scores_of: TokenScoresOf, params: Any, hyperparameters: ModelHyperparameters, probes: Sequence[Probe]
) -> dict[str, float]:
    """Run all probes on the model; return ``probe/<name>/<measure>`` → number."""
    found: dict[str, float] = {}
    for probe in probes:
        hyper = with_sigmoid_bias(hyperparameters, {k: jnp.float32(bias) for k, bias in probe.sigmoid_bias.items()})
        scored = [token_scores_of(params, hyper, batch) for batch in probe.batches]
        losses, correct = (np.concatenate([_fetched(scores[i]) for scores in scored]) for i in range(2))
        measured = probe.measure(TokenScores(losses.astype(np.float64), correct))
        found |= {f"probe/{probe.name}/{name}": value for name, value in measured.items()}
    return found


@dataclass(frozen=True)
class Scene:
    """Everything a probe is built from: the data, the held-out sequences, and the attention of the run."""

    data: DataConfig
    run_data: RunData
    backend: BackendConfig
    batch_size: int
    rows: int = 1
    """Number of the longest sequences that are scored at a time."""

    @property
    def length(self) -> int:
        return self.backend.context_length


def make_probes(names: Sequence[str], scene: Scene) -> list[Probe]:
    """Return the probes of those names, and for a run on a task a probe of that task.

    Raise :class:`BadInput` if the run's vocabulary, context_length or text is too small for one of them.
    """
    own = scene.data if isinstance(scene.data, Task) else None
    probes: list[Probe] = []
    if own is not None:
        scored = sum(int((batch.weights.sum(1) > 0).sum()) for batch in scene.run_data.held_out)
        probes.append(_task_probe(own, scene, scored))
    for name in names:
        if own is None or name != own.name:
            probes += _made(name, scene)
    return probes


def _made(name: str, scene: Scene) -> Sequence[Probe]:
    if name == "in_context":
        return [Probe(name, scene.run_data.held_out, _in_context(scene.run_data.held_out))]
    if name == "extrapolation":
        return _extrapolation(scene)
    if name in registered_probes:
        return [registered_probes[name](scene)]
    vocab_size = scene.run_data.tokenizer.vocab_size
    if vocab_size < 8:
        raise BadInput(f"evaluation.probes: {name} needs a vocabulary of 8 tokens, and this run's has {vocab_size}")
    task = tasks()[name].as_probe(vocab_size, scene.length)
    try:
        task.check(scene.length)
    except BadInput as error:
        raise BadInput(f"evaluation.probes: {name} does not fit this run: {error}") from error
    return [_task_probe(task, scene, SEQUENCES)]


def _task_probe(task: Task, scene: Scene, number: int) -> Probe:
    made = evaluation_examples(task, context_length=scene.length, number=number)
    batches = in_batches(made.batch, scene.batch_size)
    distance = made.distance
    return Probe(task.name, batches, lambda scores: measures(distance, scores.losses[:number], scores.correct[:number]))


def _in_context(batches: Sequence[Batch]) -> Measure:
    """Measure loss late in a sequence minus loss early in it (Olsson et al., arXiv 2209.11895: tokens 500, 50 of 512).

    early is the mean over positions S/16 to S/8, and late the mean over the last S/8. score = late − early: the more
    negative, the more the model learns from the context.
    """
    weights = np.concatenate([batch.weights for batch in batches])
    length = weights.shape[1]

    def measure(scores: TokenScores) -> dict[str, float]:
        early = _mean(scores.losses, weights, length // 16, max(length // 8, length // 16 + 1))
        late = _mean(scores.losses, weights, length - max(length // 8, 1), length)
        return {"score": late - early, "early_loss": early, "late_loss": late}

    return measure


def _extrapolation(scene: Scene) -> list[Probe]:
    """Measure the loss beyond the training length, up to 8 · context_length, on held-out sequences of that length.

    loss_to_<x> is the mean over positions x/2 to x, for x = 1, 2, 4, 8 times context_length, with sigmoid's n still
    context_length; rise_in_loss is the last of them minus the first. If a kind of layer has ``sigmoid_bias=auto``, the
    positions are scored again for x > context_length, in sequences of x tokens with n = x, so bias −log x:
    loss_to_<x>_n_<x>.
    """
    length, tokenizer = scene.length, scene.run_data.tokenizer
    longest = LONGEST * length
    try:
        # Deliberately independent of evaluation.sequences: these are a few long ones.
        held_out = load_data(
            scene.data,
            Batching(context_length=longest, batch_size=scene.rows, sequences=LONG_SEQUENCES, seed=0),
            tokenizer=tokenizer if isinstance(tokenizer, TextTokenizer) else None,
        ).held_out
    except BadInput as error:
        raise BadInput(f"evaluation.probes: extrapolation scores sequences of {longest} tokens: {error}") from error

    def measure(size: int, first: int, suffix: str) -> Measure:
        weights = np.concatenate([batch.weights[:, :size] for batch in held_out])

        def measured(scores: TokenScores) -> dict[str, float]:
            ends = [end for end in (length, 2 * length, 4 * length, 8 * length) if first <= end <= size]
            losses = {end: _mean(scores.losses, weights, end // 2, end) for end in ends}
            found = {f"loss_to_{end}{suffix}": loss for end, loss in losses.items()}
            if length in losses:
                found["rise_in_loss"] = losses[longest] - losses[length]
            return found

        return measured

    probes = [Probe("extrapolation", held_out, measure(longest, 0, ""))]
    if biased := [
        kind
        for kind, layers in scene.backend.kinds.items()
        if activation(layers.activation).takes_bias and layers.sigmoid_bias == "auto"
    ]:
        for size in (2 * length, 4 * length, 8 * length):
            cut = [_cut(batch, size) for batch in held_out]
            bias = dict.fromkeys(biased, -math.log(size))
            probes.append(Probe("extrapolation", cut, measure(size, size, f"_n_{size}"), bias))
    return probes


def _cut(batch: Batch, length: int) -> Batch:
    """Return the first ``length`` inputs of each sequence, with logits at all positions."""
    tokens, *others = batch._replace(places=None)
    cut: list[Any] = [None if array is None else array[:, :length] for array in others]
    return Batch(tokens[:, : length + 1], *cut)


def _mean(losses: np.ndarray, weights: np.ndarray, start: int, end: int) -> float:
    """Return the weighted mean of the losses from ``start`` to ``end``; NaN if all weights there are 0."""
    part = weights[:, start:end].astype(np.float64)
    return float((losses[:, start:end] * part).sum() / part.sum()) if part.any() else math.nan


def _fetched(array: Any) -> np.ndarray:
    """Return all rows on this host, even if other hosts computed some of them."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
