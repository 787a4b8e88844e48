"""Synthetic tasks: sequences in which some tokens can be known from what stands before them, and only those count.

Each is a corpus (``data=mqar``), whose examples never repeat and are a pure function of (seed, step), and a probe of a
model that was trained on something else (``evaluation.probes=[induction]``). Letters: n sequences, S inputs of each
(context_length), V vocabulary. A sequence has S + 1 tokens; weights, (n, S), are 1 at inputs that ask for an answer.
The answer is the next token, but in MQAR, whose answers don't stand in the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from xattn.data.batches import ALL_ROWS, Windows
from xattn.data.task_config import (
    CopyingConfig,
    InductionConfig,
    MQARConfig,
    PasskeyConfig,
    SelectiveCopyingConfig,
    TaskConfig,
)
from xattn.errors import BadInput

# The second word of a generator's seed: what is trained on and what is scored never share an example's randomness.
TRAINING, EVALUATION = 0, 1


class Examples(NamedTuple):
    """tokens: int32 (n, S + 1). distance: int32 (n, S), how many places before the next input the token stands that is
    the answer; 0 where nothing is asked for. most: the answers that a sequence asks for, or a bound of them, which all
    sequences of a run share. answers: int32 (n, S), see :class:`Windows`."""

    tokens: np.ndarray
    distance: np.ndarray
    most: int
    answers: np.ndarray | None = None

    @property
    def windows(self) -> Windows:
        asked = self.distance > 0
        places = np.sort(np.argsort(~asked, axis=1, kind="stable")[:, : self.most], axis=1).astype(np.int32)
        return Windows(self.tokens, asked.astype(np.float32), answers=self.answers, places=places)


@dataclass(frozen=True)
class TaskBatches:
    """The training windows of a task: ``batch(step)`` depends on (config, context_length, batch_size, seed, step)."""

    config: TaskConfig
    context_length: int
    batch_size: int
    seed: int

    def __call__(self, step: int, rows: slice = ALL_ROWS) -> Windows:
        generator = np.random.default_rng([self.seed, TRAINING, step])
        return examples(self.config, generator, self.batch_size, self.context_length).windows.rows(rows)


def evaluation_examples(config: TaskConfig, *, context_length: int, number: int) -> Examples:
    """The sequences that every evaluation of every run scores."""
    return examples(config, np.random.default_rng([0, EVALUATION]), number, context_length)


def examples(config: TaskConfig, generator: np.random.Generator, number: int, length: int) -> Examples:
    """So many sequences of a task; the ones :func:`check` refuses can't be made."""
    match config:
        case MQARConfig():
            return mqar(config, generator, number, length)
        case InductionConfig():
            return induction(config, generator, number, length)
        case CopyingConfig():
            return copying(config, generator, number, length)
        case SelectiveCopyingConfig():
            return selective_copying(config, generator, number, length)
        case PasskeyConfig():
            return passkey(config, generator, number, length)


def check(config: TaskConfig, context_length: int) -> None:
    """Raises :class:`BadInput` where the task does not fit the vocabulary or the length."""
    vocab, length, refusal = config.vocab_size, context_length, None
    match config:
        case MQARConfig(num_pairs=pairs):
            if 4 * pairs > length or length % 2:
                refusal = (
                    f"data.num_pairs = {pairs}: at most a quarter of backend.context_length = {length}, an even one"
                )
            elif pairs > vocab // 2 - 1:
                refusal = (
                    f"data.num_pairs = {pairs}: at most data.vocab_size / 2 − 1 = {vocab // 2 - 1}, each its own key"
                )
        case SelectiveCopyingConfig(num_tokens=tokens) if 2 * tokens > length:
            refusal = f"data.num_tokens = {tokens}: at most half of backend.context_length = {length}"
        case PasskeyConfig(key_length=tokens) if 2 * (tokens + 1) > length:
            refusal = f"data.key_length = {tokens}: at most backend.context_length / 2 − 1 = {length // 2 - 1}"
        case InductionConfig() | CopyingConfig() if length < 4:
            refusal = f"backend.context_length = {length}: data={config.name} needs at least 4"
    if refusal is not None:
        raise BadInput(refusal)


def mqar(config: MQARConfig, generator: np.random.Generator, number: int, length: int) -> Examples:
    """Multi-query associative recall: k₁ v₁ k₂ v₂ …, then each key once more among filler; what was its value?

    Arora et al., Zoology (arXiv 2312.04927), section 4 and appendix: vocabulary 8192, keys from its lower half (0 left
    out), values from its upper, all different; the gap from the pairs to a query is drawn without replacement with
    p(i) ∝ i^(α − 1), α = 0.01, in steps of two tokens. The answer is asked for at its query, and what follows there is
    filler. Two differences. Their code fills with random tokens by default, but the runs of the paper's figure with the
    token 0 alone: ``filler=zeros`` is that, ``random`` is our default. And our random tokens are all but the sequence's
    own keys, of which theirs has a few by chance: hardly any of 8192, but many in a small vocabulary. Known result,
    with zeros: attention solves it at every width from 64 on, with two layers, at lengths 64–512 with 4–64 pairs; gated
    convolutions need a width that grows with the length.
    """
    half, pairs = config.vocab_size // 2, config.num_pairs
    keys = 1 + _distinct(generator, number, pairs, half - 1)
    values = half + _distinct(generator, number, pairs, config.vocab_size - half)
    places = (length - 2 * pairs) // 2
    weights = np.arange(1, places + 1) ** (0.01 - 1)
    # Gumbel's trick: the largest of log p + noise are a draw without replacement, for all sequences at once.
    noise = np.log(weights) + generator.gumbel(size=(number, places))
    queries = 2 * pairs + 2 * np.argsort(-noise, axis=1)[:, :pairs]
    if config.filler == "zeros":
        tokens = np.zeros((number, length + 1), np.int64)
    else:
        tokens = generator.integers(0, config.vocab_size - pairs, (number, length + 1))
        for key in np.sort(keys, axis=1).T:  # ascending: each is stepped over
            tokens += tokens >= key[:, None]
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    distance, answers = np.zeros((2, number, length), np.int32)
    np.put_along_axis(tokens, queries, keys, axis=1)
    np.put_along_axis(answers, queries, values, axis=1)
    np.put_along_axis(distance, queries, queries - 2 * np.arange(pairs), axis=1)
    return Examples(tokens.astype(np.int32), distance, pairs, answers)


def induction(config: InductionConfig, generator: np.random.Generator, number: int, length: int) -> Examples:
    """Random tokens x₁ … x_p, again and again: after a token that was seen, what came after it?

    Elhage et al. 2021 and Olsson et al. (arXiv 2209.11895): repeated random tokens, which no statistics of a text help
    to predict. Here the period p is drawn for each sequence between a quarter and a half of the length, so that no
    fixed offset does it, and the tokens of a period are all different as far as the vocabulary allows. Known result:
    a transformer of one layer cannot, one of two layers forms induction heads and does it almost perfectly.
    """
    longest = min(length // 2, config.vocab_size)
    shortest = max(1, longest // 2)
    periods = generator.integers(shortest, longest + 1, (number, 1))
    drawn = _distinct(generator, number, longest, config.vocab_size)
    places = np.arange(length + 1)
    tokens = np.take_along_axis(drawn, places % periods, axis=1)
    # The second time that the first token is seen its successor is known.
    distance = np.where(places[:-1] >= periods, periods, 0)
    return Examples(tokens.astype(np.int32), distance.astype(np.int32), length - shortest)


def copying(config: CopyingConfig, generator: np.random.Generator, number: int, length: int) -> Examples:
    """x₁ … x_m, a separator (the token 0), x₁ … x_m with m = ⌊S / 2⌋; the copy is asked for.

    Jelassi et al., "Repeat After Me" (arXiv 2402.01032): transformers learn it from few examples and to lengths they
    have not seen; models with a state of fixed size can't copy more than the state holds.
    """
    copied = length // 2
    drawn = generator.integers(1, config.vocab_size, (number, copied))
    tokens = np.zeros((number, length + 1), np.int32)
    start = length - 2 * copied  # an odd length begins with one separator more
    tokens[:, start : start + copied], tokens[:, start + copied + 1 :] = drawn, drawn
    distance = np.zeros((number, length), np.int32)
    distance[:, -copied:] = copied + 1
    return Examples(tokens, distance, copied)


def selective_copying(
    config: SelectiveCopyingConfig, generator: np.random.Generator, number: int, length: int
) -> Examples:
    """num_tokens tokens at random places of noise (the token 0), a separator (1), and then the tokens in their order.

    Gu & Dao, Mamba (arXiv 2312.00752), section 4.1.1, there with 16 tokens in 4096: what is remembered depends on
    content, not on its place, which defeats convolutions of fixed kernels; attention solves it.
    """
    data = config.num_tokens
    context = length - data
    drawn = generator.integers(2, config.vocab_size, (number, data))
    places = np.sort(_distinct(generator, number, data, context), axis=1)
    tokens = np.zeros((number, length + 1), np.int32)
    np.put_along_axis(tokens, places, drawn, axis=1)
    tokens[:, context], tokens[:, context + 1 :] = 1, drawn
    distance = np.zeros((number, length), np.int32)
    distance[:, context:] = context + np.arange(data) - places + 1
    return Examples(tokens, distance, data)


def passkey(config: PasskeyConfig, generator: np.random.Generator, number: int, length: int) -> Examples:
    """Filler, a marker (the token 0) with the key behind it, filler, the marker again: what was the key?

    Mohtashami & Jaggi (arXiv 2305.16300): a number in repetitive text, at a depth that is drawn for each sequence. The
    filler here is 1 2 3 1 2 3 …, and key tokens are 4 and up. Known result: attention finds it anywhere within the
    length it was trained at, and loses it beyond unless positions extrapolate.
    """
    size = config.key_length
    drawn = generator.integers(4, config.vocab_size, (number, size))
    question = length - size
    places = generator.integers(0, question - size, (number, 1))
    tokens = np.tile(1 + np.arange(length + 1) % 3, (number, 1))
    behind = np.arange(1, size + 1)
    np.put_along_axis(tokens, places, 0, axis=1)
    np.put_along_axis(tokens, places + behind, drawn, axis=1)
    tokens[:, question], tokens[:, question + behind] = 0, drawn
    distance = np.zeros((number, length), np.int32)
    distance[:, question:] = question - places
    return Examples(tokens.astype(np.int32), distance, size)


def _distinct(generator: np.random.Generator, number: int, size: int, below: int) -> np.ndarray:
    """(number, size): in each row different integers from 0 to below − 1, every order equally likely."""
    random = generator.random((number, below), np.float32)
    smallest = np.argpartition(random, size - 1, axis=1)[:, :size]
    order = np.argsort(np.take_along_axis(random, smallest, axis=1), axis=1)
    return np.take_along_axis(smallest, order, axis=1)


def measures(distance: np.ndarray, losses: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """What a model does with examples, from distance, losses and correct, all (n, S).

    loss and accuracy: means over all answers. exact: the share of sequences of which every answer is right.
    accuracy_to_position_x: over answers to inputs at the places of one quarter of the sequence, x the end of it.
    accuracy_to_distance_x: over distances in (x / 2, x]. A part without answers is left out.
    """
    asked = distance > 0
    found = {
        "loss": _mean(losses, asked),
        "accuracy": _mean(correct, asked),
        "exact": float((correct | ~asked).all(axis=1).mean()),
    }
    length = distance.shape[1]
    places = np.broadcast_to(np.arange(length), distance.shape)
    for quarter in range(4):
        start, end = quarter * length // 4, (quarter + 1) * length // 4
        part = asked & (places >= start) & (places < end)
        if part.any():
            found[f"accuracy_to_position_{end}"] = _mean(correct, part)
    reach = 1
    while reach < 2 * length:
        part = asked & (distance > reach // 2) & (distance <= reach)
        if part.any():
            found[f"accuracy_to_distance_{reach}"] = _mean(correct, part)
        reach *= 2
    return found


def _mean(values: np.ndarray, where: np.ndarray) -> float:
    return float(values[where].mean(dtype=np.float64))
