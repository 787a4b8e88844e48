"""Sequences of tokens: which ones a training step sees, and which ones an evaluation scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol, Self, overload

import numpy as np

ALL_ROWS = slice(None)


@dataclass(frozen=True)
class Batching:
    """How a run's data are divided into batches."""

    context_length: int
    batch_size: int
    sequences: int | Literal["all"]
    """Number of held-out sequences to score."""
    seed: int
    """Seed of the order of the training batches."""


class Batch(NamedTuple):
    """Sequences for training or evaluation: the loss is Σ weights · loss / Σ weights."""

    tokens: np.ndarray
    """int32 (B, S + 1): a sequence's inputs and the token after them."""
    weights: np.ndarray
    """float32 (B, S): 1 where the target counts, 0 where it is padding or nothing is asked for."""
    segment_ids: np.ndarray | None = None
    """int32 (B, S), of the inputs: different segments don't attend to each other. None: a sequence is one segment."""
    answers: np.ndarray | None = None
    """int32 (B, S): what is asked for at each input, if not the next token. None: the next token."""
    places: np.ndarray | None = None
    """int32 (B, K): the inputs at which a loss is computed; all others have weight 0. None: every input."""

    @property
    def inputs(self) -> np.ndarray:
        """int32 (B, S)."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> np.ndarray:
        """int32 (B, S): the answers, or the tokens shifted by one."""
        return self.tokens[:, 1:] if self.answers is None else self.answers

    @property
    def optional(self) -> tuple[tuple[str, int], ...]:
        """Names and widths of the optional arrays that are given, int32 (B, width) each."""
        arrays = {name: getattr(self, name) for name in ("segment_ids", "answers", "places")}
        return tuple((name, array.shape[1]) for name, array in arrays.items() if array is not None)

    def rows(self, rows: slice | np.ndarray) -> Batch:
        """Return a batch of only these rows."""
        return Batch(*(None if array is None else array[rows] for array in self))  # type: ignore[arg-type]


class Ids(Protocol):
    """Token ids (N,), in memory or on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Batches(Protocol):
    """``batch(step)`` returns the batch of update ``step``, counted from 0. It is pure: no call depends on earlier
    ones. ``rows`` selects some of the rows, for one host of several."""

    def __call__(self, step: int, rows: slice = ALL_ROWS) -> Batch: ...


class TrainingBatches:
    """``batch(step)`` of text: a function of (seed, step, tokens) alone, with no memory between steps.

    Each source runs through its tokens in epochs. Several sources share the positions of all sequences in periods of
    1000. In each period every source has its rounded share of the sequences, in an order drawn for that period. A
    source whose share rounds to zero gets one sequence, and the period is one longer.

    sources: (tokens, weight) of each. packed_at: the id that begins a document, if documents don't attend to each
    other.
    """

    PERIOD = 1000

    def __init__(self, sources: Sequence[tuple[Ids, float]], batching: Batching, packed_at: int | None = None):
        self._batch_size, self._seed, self._packed_at = batching.batch_size, batching.seed, packed_at
        self._sources = [_Epochs(tokens, batching.context_length, batching.seed) for tokens, _ in sources]
        self._counts = np.maximum(shares([weight for _, weight in sources], self.PERIOD), 1)
        self._turns = lru_cache(maxsize=2)(self._draw_turns)

    def __call__(self, step: int, rows: slice = ALL_ROWS) -> Batch:
        positions = step * self._batch_size + np.arange(self._batch_size, dtype=np.int64)[rows]
        tokens = np.stack([self._sequence(int(p)) for p in positions]).astype(np.int32)
        return Batch(tokens, np.ones(tokens[:, 1:].shape, np.float32), segments_of(tokens, self._packed_at))

    def _sequence(self, position: int) -> np.ndarray:
        period, place = divmod(position, int(self._counts.sum()))
        source, turn = self._turns(period)
        return self._sources[source[place]].sequence(int(period * self._counts[source[place]] + turn[place]))

    def _draw_turns(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each position of the period: the source it draws from, and its index within that source."""
        generator = np.random.default_rng([self._seed, period, 1])
        source = generator.permutation(np.repeat(np.arange(len(self._counts)), self._counts))
        turn = np.zeros_like(source)
        for number, count in enumerate(self._counts):
            turn[source == number] = np.arange(count)
        return source, turn


class _Epochs:
    """The sequences of one text, epoch after epoch.

    Each epoch draws an offset and cuts the text from there into sequences of context_length tokens. It uses every
    sequence once, in an order drawn for that epoch.
    """

    def __init__(self, tokens: Ids, context_length: int, seed: int):
        self._tokens, self._context_length, self._seed = tokens, context_length, seed
        # One fewer than fits, so that the number is the same for every offset below context_length; at least 1.
        self._per_epoch = max(1, (len(tokens) - 1) // context_length - 1)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def sequence(self, position: int) -> np.ndarray:
        """Return the sequence at this position in the order of all epochs: (context_length + 1,)."""
        start = self._epoch(position // self._per_epoch)[position % self._per_epoch]
        return self._tokens[start : start + self._context_length + 1]

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self._seed, epoch])
        slack = len(self._tokens) - 1 - self._per_epoch * self._context_length
        offset = generator.integers(min(slack, self._context_length - 1) + 1)
        return offset + self._context_length * generator.permutation(self._per_epoch)


def shares(weights: Sequence[float], total: int) -> np.ndarray:
    """Return the whole numbers nearest to the weights that sum to ``total``; the largest remainders are rounded up."""
    exact = total * np.asarray(weights, np.float64) / np.sum(weights)
    floors = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - floors), kind="stable")
    floors[order[: total - floors.sum()]] += 1
    return floors


def segments_of(tokens: np.ndarray, packed_at: int | None) -> np.ndarray | None:
    """Return int32 (B, S): how many inputs up to each one begin a document; None if documents are not packed."""
    return None if packed_at is None else np.cumsum(tokens[:, :-1] == packed_at, axis=1, dtype=np.int32)


class Prefetch:
    """``batch(step)`` of the given batches, from a thread that is two steps ahead of the last call.

    The batches made ahead are only a guess. A step out of order is made on request, so the function stays pure. An
    exception in the batches is raised by the call for that step.
    """

    AHEAD = 2

    def __init__(self, batch: Batches):
        self._batch = batch
        self._pool = ThreadPoolExecutor(1, "batches")
        self._ready: dict[tuple[int, int | None, int | None], Future[Batch]] = {}

    def __call__(self, step: int, rows: slice = ALL_ROWS) -> Batch:
        keys = [(number, rows.start, rows.stop) for number in range(step, step + self.AHEAD + 1)]
        before, self._ready = self._ready, {}
        for key in keys:
            self._ready[key] = before.pop(key) if key in before else self._pool.submit(self._batch, key[0], rows)
        for unwanted in before.values():
            unwanted.cancel()
        return self._ready[keys[0]].result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)


class HeldOutBatches(Sequence[Batch]):
    """The sequences that every evaluation of every run scores, in equal batches, source after source.

    A number of sequences is divided by weight, with at least one for each source. The arguments are those of
    :class:`TrainingBatches`.
    """

    def __init__(self, sources: Sequence[tuple[Ids, float]], batching: Batching, packed_at: int | None = None):
        self._context_length, self._batch_size = batching.context_length, batching.batch_size
        number, weights = batching.sequences, [weight for _, weight in sources]
        counts = ["all" for _ in sources] if number == "all" else np.maximum(shares(weights, number), 1).tolist()
        self._sources = [
            (tokens, sequence_starts(tokens, self._context_length, count))
            for (tokens, _), count in zip(sources, counts, strict=True)
        ]
        self._packed_at = packed_at
        self._ends = np.cumsum([len(starts) for _, starts in self._sources])

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self._batch_size)

    def targets(self) -> Iterator[tuple[Ids, slice]]:
        """Yield, for each sequence, the ids it is cut from and the slice of its targets in them."""
        for ids, starts in self._sources:
            for start in starts.tolist():
                yield ids, slice(start + 1, min(start + self._context_length + 1, len(ids)))

    @overload
    def __getitem__(self, number: int) -> Batch: ...
    @overload
    def __getitem__(self, number: slice) -> list[Batch]: ...
    def __getitem__(self, number: int | slice) -> Batch | list[Batch]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        tokens = np.zeros((self._batch_size, self._context_length + 1), np.int32)
        weights = np.zeros((self._batch_size, self._context_length), np.float32)
        first = number * self._batch_size
        for row in range(min(self._batch_size, int(self._ends[-1]) - first)):
            source = int(np.searchsorted(self._ends, first + row, side="right"))
            ids, starts = self._sources[source]
            start = starts[first + row - self._ends[source]]  # a negative index, from the end of its starts
            sequence = ids[start : start + self._context_length + 1]
            tokens[row, : len(sequence)] = sequence
            weights[row, : len(sequence) - 1] = 1
        return Batch(tokens, weights, segments_of(tokens, self._packed_at))


def sequence_starts(tokens: Ids, context_length: int, sequences: int | Literal["all"]) -> np.ndarray:
    """Return the start of each scored sequence.

    ``all`` cuts the text into sequences of context_length targets and pads the last one, so every token but the first
    is scored once. A number takes that many full sequences, or all of them if there are fewer, spread evenly.
    """
    scored = len(tokens) - 1
    if sequences == "all":
        return np.arange(0, scored, context_length)
    full = scored // context_length
    return context_length * np.unique(np.linspace(0, full - 1, min(sequences, full)).round().astype(np.int64))


def in_batches(sequences: Batch, batch_size: int) -> list[Batch]:
    """Return the same sequences in batches of one shape. Rows of zeros, which don't count, fill the last batch."""
    number = len(sequences.tokens)
    fill = ((0, -number % batch_size), (0, 0))
    filled = Batch(*(None if array is None else np.pad(array, fill) for array in sequences))  # type: ignore[arg-type]
    return [filled.rows(slice(first, first + batch_size)) for first in range(0, number, batch_size)]
