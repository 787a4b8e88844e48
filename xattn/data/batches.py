"""Windows of tokens: which ones a training step sees, and which ones an evaluation scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol, overload

import numpy as np

ALL_ROWS = slice(None)


class Windows(NamedTuple):
    """A batch, of training and of evaluation: the loss is Σ weights · loss / Σ weights.

    tokens: int32 (B, S + 1), a window's inputs and the token after them. weights: float32 (B, S), 1 where the target
    counts, 0 where it is padding or nothing that is asked for. segment_ids: int32 (B, S), of the inputs; tokens of
    different segments don't attend to each other. None: each window is one segment. answers: int32 (B, S), what is
    asked for at each input where that is not the next token. None: it is. places: int32 (B, K), the inputs that a loss
    is made for; all others have the weight 0. None: every input.
    """

    tokens: np.ndarray
    weights: np.ndarray
    segment_ids: np.ndarray | None = None
    answers: np.ndarray | None = None
    places: np.ndarray | None = None

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
        """The names and widths of the optional arrays, int32 (B, width) each, that are given."""
        arrays = {name: getattr(self, name) for name in ("segment_ids", "answers", "places")}
        return tuple((name, array.shape[1]) for name, array in arrays.items() if array is not None)

    def rows(self, rows: slice | np.ndarray) -> Windows:
        """Some of its rows."""
        return Windows(*(None if array is None else array[rows] for array in self))  # type: ignore[arg-type]


class Ids(Protocol):
    """Token ids (N,), in memory or on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Batches(Protocol):
    """``batch(step)``: the windows of update number ``step``, counted from 0. It is a pure function: nothing is
    remembered between calls. ``rows`` takes some of its rows, as a host of several does."""

    def __call__(self, step: int, rows: slice = ALL_ROWS) -> Windows: ...


class TrainingBatches:
    """``batch(step)`` is a function of (seed, step, tokens) alone: nothing is remembered between steps.

    The text is gone through in epochs. In each it is cut, from an offset drawn for that epoch, into windows of
    context_length tokens, every window is used once, and their order is drawn for that epoch.

    packed_at: the id that begins a document, where documents don't attend to each other.
    """

    def __init__(self, tokens: Ids, *, context_length: int, batch_size: int, seed: int, packed_at: int | None = None):
        self._tokens = tokens
        self._context_length = context_length
        self._batch_size = batch_size
        self._seed = seed
        self._packed_at = packed_at
        # One window fewer than fits, so that every offset below context_length leaves as many; at least one.
        self._windows_per_epoch = max(1, (len(tokens) - 1) // context_length - 1)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __call__(self, step: int, rows: slice = ALL_ROWS) -> Windows:
        position = step * self._batch_size + np.arange(self._batch_size, dtype=np.int64)[rows]
        tokens = np.stack([self.window(int(p)) for p in position]).astype(np.int32)
        return Windows(tokens, np.ones(tokens[:, 1:].shape, np.float32), segments_of(tokens, self._packed_at))

    def window(self, position: int) -> np.ndarray:
        """The window at that place in the order of all epochs: (context_length + 1,)."""
        start = self._epoch(position // self._windows_per_epoch)[position % self._windows_per_epoch]
        return self._tokens[start : start + self._context_length + 1]

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self._seed, epoch])
        slack = len(self._tokens) - 1 - self._windows_per_epoch * self._context_length
        offset = generator.integers(min(slack, self._context_length - 1) + 1)
        return offset + self._context_length * generator.permutation(self._windows_per_epoch)


class MixtureBatches:
    """Windows of several sources, each source's by its own epochs. A function of (seed, step, tokens) alone, too.

    Of every 1000 windows that follow each other from a multiple of 1000 on, each source has its share, rounded; their
    order is drawn anew each time. A source whose share rounds to none has one window, and the 1000 are one more.
    """

    PERIOD = 1000

    def __init__(self, sources: Sequence[TrainingBatches], weights: Sequence[float], *, batch_size: int, seed: int):
        self._sources, self._batch_size, self._seed = sources, batch_size, seed
        self._counts = np.maximum(shares(weights, self.PERIOD), 1)
        self._turns = lru_cache(maxsize=2)(self._draw_turns)

    def __call__(self, step: int, rows: slice = ALL_ROWS) -> Windows:
        positions = step * self._batch_size + np.arange(self._batch_size, dtype=np.int64)[rows]
        tokens = np.stack([self._window(int(p)) for p in positions]).astype(np.int32)
        segment_ids = segments_of(tokens, self._sources[0]._packed_at)
        return Windows(tokens, np.ones(tokens[:, 1:].shape, np.float32), segment_ids)

    def _window(self, position: int) -> np.ndarray:
        period, place = divmod(position, int(self._counts.sum()))
        source, turn = self._turns(period)
        return self._sources[source[place]].window(int(period * self._counts[source[place]] + turn[place]))

    def _draw_turns(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Whose turn it is at each place, and that source's how manieth of the period it is."""
        generator = np.random.default_rng([self._seed, period, 1])
        source = generator.permutation(np.repeat(np.arange(len(self._counts)), self._counts))
        turn = np.zeros_like(source)
        for number, count in enumerate(self._counts):
            turn[source == number] = np.arange(count)
        return source, turn


def shares(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers that sum up to ``total`` and are nearest to the weights: the largest remainders are rounded up."""
    exact = total * np.asarray(weights, np.float64) / np.sum(weights)
    floors = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - floors), kind="stable")
    floors[order[: total - floors.sum()]] += 1
    return floors


def segments_of(tokens: np.ndarray, packed_at: int | None) -> np.ndarray | None:
    """int32 (B, S): how many of the inputs up to this one begin a document; None where documents are not packed."""
    return None if packed_at is None else np.cumsum(tokens[:, :-1] == packed_at, axis=1, dtype=np.int32)


class EvaluationWindows(Sequence[Windows]):
    """Batches of windows, made when they are asked for: ids and the starts of windows in them, source after source."""

    def __init__(
        self,
        sources: Sequence[tuple[Ids, np.ndarray]],
        *,
        context_length: int,
        batch_size: int,
        packed_at: int | None = None,
    ):
        self._sources, self._context_length, self._batch_size = sources, context_length, batch_size
        self._packed_at = packed_at
        self._ends = np.cumsum([len(starts) for _, starts in sources])

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self._batch_size)

    def targets(self) -> Iterator[tuple[Ids, slice]]:
        """For each window: the ids that it is cut from, and where in them its targets stand."""
        for ids, starts in self._sources:
            for start in starts.tolist():
                yield ids, slice(start + 1, min(start + self._context_length + 1, len(ids)))

    @overload
    def __getitem__(self, number: int) -> Windows: ...
    @overload
    def __getitem__(self, number: slice) -> list[Windows]: ...
    def __getitem__(self, number: int | slice) -> Windows | list[Windows]:
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
            start = starts[first + row - self._ends[source]]  # counted from the end of its starts
            window = ids[start : start + self._context_length + 1]
            tokens[row, : len(window)] = window
            weights[row, : len(window) - 1] = 1
        return Windows(tokens, weights, segments_of(tokens, self._packed_at))


def evaluation_windows(
    tokens: Ids, *, context_length: int, batch_size: int, windows: int | Literal["all"], packed_at: int | None = None
) -> EvaluationWindows:
    """The windows that every evaluation of every run scores, in batches of one shape, see :func:`window_starts`."""
    sources = [(tokens, window_starts(tokens, context_length, windows))]
    return EvaluationWindows(sources, context_length=context_length, batch_size=batch_size, packed_at=packed_at)


def window_starts(tokens: Ids, context_length: int, windows: int | Literal["all"]) -> np.ndarray:
    """Where the scored windows begin.

    ``all``: the text cut into windows of context_length targets, the last one padded, so that every token but the
    first is scored once. A number: that many of the full windows, or all of them if there are fewer, spread evenly.
    """
    scored = len(tokens) - 1
    if windows == "all":
        return np.arange(0, scored, context_length)
    full = scored // context_length
    return context_length * np.unique(np.linspace(0, full - 1, min(windows, full)).round().astype(np.int64))


def in_batches(windows: Windows, batch_size: int) -> list[Windows]:
    """The same windows in batches of one shape; rows of zeros, which don't count, fill the last."""
    number = len(windows.tokens)
    fill = ((0, -number % batch_size), (0, 0))
    filled = Windows(*(None if array is None else np.pad(array, fill) for array in windows))  # type: ignore[arg-type]
    return [filled.rows(slice(first, first + batch_size)) for first in range(0, number, batch_size)]
