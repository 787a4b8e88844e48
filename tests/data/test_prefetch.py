"""Batches made ahead are the batches."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from xattn.data.batches import ALL_ROWS, Batch, Batching, Prefetch, TrainingBatches

BATCHING = Batching(context_length=7, batch_size=3, sequences="all", seed=0)
BATCHES = TrainingBatches([(np.arange(251), 1.0)], BATCHING)


@pytest.mark.parametrize("steps", [range(12), [5, 6, 7, 2, 3, 3, 4, 9, 8, 0, 100, 101]], ids=["in order", "any order"])
def test_each_step_gets_its_own_batch(steps: list[int]) -> None:
    with Prefetch(BATCHES) as batch:
        for step in steps:
            np.testing.assert_array_equal(batch(step).tokens, BATCHES(step).tokens)
            np.testing.assert_array_equal(batch(step, slice(1, 3)).tokens, BATCHES(step).tokens[1:3])


def test_the_next_batch_is_made_before_anyone_asks() -> None:
    made, called = threading.Event(), list[int]()

    def batch(step: int, rows: slice = ALL_ROWS) -> Batch:
        called.append(step)
        if step == 6:
            made.set()
        return BATCHES(step, rows)

    with Prefetch(batch) as prefetched:
        prefetched(4)
        assert made.wait(60)
        prefetched(5)
    assert called[:3] == [4, 5, 6]
    assert sorted(set(called)) == sorted(called)


def test_an_error_is_raised_by_the_step_that_it_is_of() -> None:
    def batch(step: int, rows: slice = ALL_ROWS) -> Batch:
        if step == 2:
            raise OSError("disk")
        return BATCHES(step, rows)

    with Prefetch(batch) as prefetched:
        for step in (0, 1):
            prefetched(step)
        with pytest.raises(OSError, match="disk"):
            prefetched(2)
        prefetched(3)
