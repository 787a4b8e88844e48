"""Windows of tokens: which ones a training step sees, and which ones an evaluation scores."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import numpy as np

ALL_ROWS = slice(None)


class Windows(NamedTuple):
    """A batch, of training and of evaluation: the loss is Σ weights · loss / Σ weights.

    tokens: int32 (B, S + 1), a window's inputs and, shifted by one, its targets. weights: float32 (B, S), 1 where the
    target counts, 0 where it is padding or nothing that is asked for. segment_ids: int32 (B, S), of the inputs; tokens
    of different segments don't attend to each other. None: each window is one segment.
    """

    tokens: np.ndarray
    weights: np.ndarray
    segment_ids: np.ndarray | None = None


class Batches(Protocol):
    """``batch(step)``: the windows of update number ``step``, counted from 0. It is a pure function: nothing is
    remembered between calls. ``rows`` takes some of its rows, as a host of several does, and makes no others."""

    def __call__(self, step: int, rows: slice = ALL_ROWS) -> Windows: ...


class TrainingBatches:
    """``batch(step)`` is a function of (seed, step, tokens) alone: nothing is remembered between steps.

    The text is gone through in epochs. In each it is cut, from an offset drawn for that epoch, into windows of
    context_length tokens, every window is used once, and their order is drawn for that epoch.
    """

    def __init__(self, tokens: np.ndarray, *, context_length: int, batch_size: int, seed: int):
        self._tokens = tokens
        self._context_length = context_length
        self._batch_size = batch_size
        self._seed = seed
        # One window fewer than fits, so that every offset below context_length leaves as many; at least one.
        self._windows_per_epoch = max(1, (len(tokens) - 1) // context_length - 1)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __call__(self, step: int, rows: slice = ALL_ROWS) -> Windows:
        position = step * self._batch_size + np.arange(self._batch_size, dtype=np.int64)[rows]
        starts = [self._epoch(int(p // self._windows_per_epoch))[p % self._windows_per_epoch] for p in position]
        tokens = np.stack([self._tokens[s : s + self._context_length + 1] for s in starts]).astype(np.int32)
        return Windows(tokens, np.ones((len(starts), self._context_length), np.float32))

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self._seed, epoch])
        slack = len(self._tokens) - 1 - self._windows_per_epoch * self._context_length
        offset = generator.integers(min(slack, self._context_length - 1) + 1)
        return offset + self._context_length * generator.permutation(self._windows_per_epoch)


def evaluation_windows(
    tokens: np.ndarray, *, context_length: int, batch_size: int, windows: int | Literal["all"]
) -> list[Windows]:
    """The windows that every evaluation of every run scores, in batches of one shape.

    ``all``: the text cut into windows of context_length targets, the last one padded, so that every token but the
    first is scored once. A number: that many of the full windows, or all of them if there are fewer, spread evenly.
    """
    scored = len(tokens) - 1
    if windows == "all":
        starts = np.arange(0, scored, context_length)
    else:
        full = scored // context_length
        starts = context_length * np.unique(np.linspace(0, full - 1, min(windows, full)).round().astype(np.int64))
    padded = np.zeros((len(starts), context_length + 1), np.int32)
    weights = np.zeros((len(starts), context_length), np.float32)
    for row, start in enumerate(starts):
        window = tokens[start : start + context_length + 1]
        padded[row, : len(window)] = window
        weights[row, : len(window) - 1] = 1
    return in_batches(padded, weights, batch_size)


def in_batches(tokens: np.ndarray, weights: np.ndarray, batch_size: int) -> list[Windows]:
    """Windows (N, ·) in batches of one shape; rows of zeros, which don't count, fill the last."""
    missing = -len(tokens) % batch_size
    tokens, weights = (np.pad(array, ((0, missing), (0, 0))) for array in (tokens, weights))
    return [Windows(tokens[i : i + batch_size], weights[i : i + batch_size]) for i in range(0, len(tokens), batch_size)]
