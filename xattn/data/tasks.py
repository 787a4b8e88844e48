"""The synthetic tasks, a class each: its numbers, the lengths it refuses, and how it makes its sequences."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import PositiveInt

from xattn.data.task import Examples, Task, VocabSize


class MQAR(Task):
    """``data=mqar``: multi-query associative recall.

    The sequence is k₁ v₁ k₂ v₂ …, then each key once more among filler; what was its value?

    Arora et al., Zoology (arXiv 2312.04927), section 4 and appendix: vocabulary 8192, keys from its lower half (without
    0), values from its upper half, all different. The gap from the pairs to a query is drawn without replacement with
    p(i) ∝ i^(α − 1), α = 0.01, in steps of two tokens. The answer is asked for at its query, and filler follows the
    query. There are two differences. Their code fills with random tokens by default, but the runs of the paper's figure
    use the token 0 alone: ``filler=zeros`` is that, ``random`` is our default. Our random tokens exclude the sequence's
    own keys. Theirs include a few by chance, hardly any of 8192 but many in a small vocabulary. Known result, with
    zeros: attention with two layers solves it at every width from 64 up, at lengths 64–512 with 4–64 pairs; gated
    convolutions need a width that grows with the length.
    """

    name: Literal["mqar"]
    vocab_size: VocabSize
    """Number of different tokens; the lower half are keys, the upper half values."""
    num_pairs: PositiveInt
    """Number of keys with their values, each asked for once; at most context_length / 4."""
    filler: Literal["random", "zeros"] = "random"
    """What fills the places between the queries."""

    def examples(self, generator: np.random.Generator, number: int, length: int) -> Examples:
        half, pairs = self.vocab_size // 2, self.num_pairs
        keys = 1 + _distinct(generator, number, pairs, half - 1)
        values = half + _distinct(generator, number, pairs, self.vocab_size - half)
        places = (length - 2 * pairs) // 2
        weights = np.arange(1, places + 1) ** (0.01 - 1)
        # Gumbel's trick: the largest of log p + noise are a draw without replacement, for every sequence.
        noise = np.log(weights) + generator.gumbel(size=(number, places))
        queries = 2 * pairs + 2 * np.argsort(-noise, axis=1)[:, :pairs]
        if self.filler == "zeros":
            tokens = np.zeros((number, length + 1), np.int64)
        else:
            tokens = generator.integers(0, self.vocab_size - pairs, (number, length + 1))
            for key in np.sort(keys, axis=1).T:  # ascending, so that each key is stepped over
                tokens += tokens >= key[:, None]
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        distance, answers = np.zeros((2, number, length), np.int32)
        np.put_along_axis(tokens, queries, keys, axis=1)
        np.put_along_axis(answers, queries, values, axis=1)
        np.put_along_axis(distance, queries, queries - 2 * np.arange(pairs), axis=1)
        return Examples(tokens.astype(np.int32), distance, pairs, answers)

    def refusal(self, length: int) -> str | None:
        pairs, most = self.num_pairs, self.vocab_size // 2 - 1
        if 4 * pairs > length or length % 2:
            rule = f"must be at most a quarter of backend.context_length = {length}, which must be even"
            return f"data.num_pairs = {pairs}: {rule}"
        if pairs > most:
            return f"data.num_pairs = {pairs}: must be at most data.vocab_size / 2 − 1 = {most}, so that keys differ"
        return None

    @classmethod
    def as_probe(cls, vocab_size: int, length: int) -> MQAR:
        pairs = max(1, min(8, length // 4, vocab_size // 2 - 1))
        return cls(name="mqar", vocab_size=vocab_size, num_pairs=pairs)


class Induction(Task):
    """``data=induction``: random tokens, repeated with a period that is drawn for each sequence.

    The tokens are x₁ … x_p, again and again: what came after this token the last time?

    Elhage et al. 2021 and Olsson et al. (arXiv 2209.11895): repeated random tokens, which no statistics of a text help
    to predict. Here the period p is drawn for each sequence between a quarter and a half of the length, so no fixed
    offset works. The tokens of a period are all different, so vocab_size limits p. Known result: a transformer of one
    layer cannot solve it; one of two layers forms induction heads and is almost perfect.
    """

    name: Literal["induction"]

    def examples(self, generator: np.random.Generator, number: int, length: int) -> Examples:
        longest = min(length // 2, self.vocab_size)
        shortest = max(1, longest // 2)
        periods = generator.integers(shortest, longest + 1, (number, 1))
        drawn = _distinct(generator, number, longest, self.vocab_size)
        places = np.arange(length + 1)
        tokens = np.take_along_axis(drawn, places % periods, axis=1)
        # From the second occurrence of the first token on, each successor is known.
        distance = np.where(places[:-1] >= periods, periods, 0)
        return Examples(tokens.astype(np.int32), distance.astype(np.int32), length - shortest)

    def refusal(self, length: int) -> str | None:
        return _at_least_four(self, length)


class Copying(Task):
    """``data=copying``: random tokens, a separator, and the same tokens again.

    The tokens are x₁ … x_m, a separator (the token 0), x₁ … x_m with m = ⌊S / 2⌋; the copy is asked for.

    Jelassi et al., "Repeat After Me" (arXiv 2402.01032): transformers learn it from few examples and generalise to
    unseen lengths; models with a state of fixed size can't copy more than the state holds.
    """

    name: Literal["copying"]

    def examples(self, generator: np.random.Generator, number: int, length: int) -> Examples:
        copied = length // 2
        drawn = generator.integers(1, self.vocab_size, (number, copied))
        tokens = np.zeros((number, length + 1), np.int32)
        start = length - 2 * copied  # an odd length begins with one more separator
        tokens[:, start : start + copied], tokens[:, start + copied + 1 :] = drawn, drawn
        distance = np.zeros((number, length), np.int32)
        distance[:, -copied:] = copied + 1
        return Examples(tokens, distance, copied)

    def refusal(self, length: int) -> str | None:
        return _at_least_four(self, length)


class SelectiveCopying(Task):
    """``data=selective_copying``: tokens among noise, a separator, and the tokens without the noise.

    num_tokens tokens stand at random places of noise (the token 0); a separator (1) and the tokens in order follow.

    Gu & Dao, Mamba (arXiv 2312.00752), section 4.1.1, there with 16 tokens in 4096: what to remember depends on
    content, not on position. This defeats convolutions with fixed kernels; attention solves it.
    """

    name: Literal["selective_copying"]
    num_tokens: PositiveInt
    """Number of tokens to copy; at most context_length / 2."""

    def examples(self, generator: np.random.Generator, number: int, length: int) -> Examples:
        data = self.num_tokens
        context = length - data
        drawn = generator.integers(2, self.vocab_size, (number, data))
        places = np.sort(_distinct(generator, number, data, context), axis=1)
        tokens = np.zeros((number, length + 1), np.int32)
        np.put_along_axis(tokens, places, drawn, axis=1)
        tokens[:, context], tokens[:, context + 1 :] = 1, drawn
        distance = np.zeros((number, length), np.int32)
        distance[:, context:] = context + np.arange(data) - places + 1
        return Examples(tokens, distance, data)

    def refusal(self, length: int) -> str | None:
        if 2 * self.num_tokens > length:
            return f"data.num_tokens = {self.num_tokens}: must be at most half of backend.context_length = {length}"
        return None

    @classmethod
    def as_probe(cls, vocab_size: int, length: int) -> SelectiveCopying:
        return cls(name="selective_copying", vocab_size=vocab_size, num_tokens=max(1, min(16, length // 2)))


class Passkey(Task):
    """``data=passkey``: a key somewhere in repetitive filler, asked for at the end.

    Filler, a marker (the token 0) with the key behind it, filler, the marker again: what was the key?

    Mohtashami & Jaggi (arXiv 2305.16300): a number in repetitive text, at a depth that is drawn for each sequence. The
    filler here is 1 2 3 1 2 3 …, and key tokens are 4 and up. Known result: attention finds it anywhere within the
    length it was trained on. Beyond that it fails unless positions extrapolate.
    """

    name: Literal["passkey"]
    key_length: PositiveInt
    """Number of tokens in the key; at most context_length / 2 − 1."""

    def examples(self, generator: np.random.Generator, number: int, length: int) -> Examples:
        size = self.key_length
        drawn = generator.integers(4, self.vocab_size, (number, size))
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

    def refusal(self, length: int) -> str | None:
        if 2 * (self.key_length + 1) > length:
            most = f"backend.context_length / 2 − 1 = {length // 2 - 1}"
            return f"data.key_length = {self.key_length}: must be at most {most}"
        return None

    @classmethod
    def as_probe(cls, vocab_size: int, length: int) -> Passkey:
        return cls(name="passkey", vocab_size=vocab_size, key_length=max(1, min(5, length // 2 - 1)))


def _at_least_four(task: Task, length: int) -> str | None:
    return f"backend.context_length = {length}: data={task.name} needs at least 4" if length < 4 else None


def _distinct(generator: np.random.Generator, number: int, size: int, below: int) -> np.ndarray:
    """Return (number, size): each row holds different integers from 0 to below − 1, every order equally likely."""
    random = generator.random((number, below), np.float32)
    smallest = np.argpartition(random, size - 1, axis=1)[:, :size]
    order = np.argsort(np.take_along_axis(random, smallest, axis=1), axis=1)
    return np.take_along_axis(smallest, order, axis=1)


TASKS = (MQAR, Induction, Copying, SelectiveCopying, Passkey)
