"""Makes batches ahead of time, in a thread, so that the device never waits for the disk."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from xattn.data.batches import ALL_ROWS, Batch, Batches

AHEAD = 2


class Prefetch:
    """``batch(step)`` of the given batches, from a thread that is two steps ahead of the last call.

    The batches made ahead are only a guess. A step out of order is made on request, so the function stays pure. An
    exception in the batches is raised by the call for that step.
    """

    def __init__(self, batch: Batches):
        self._batch = batch
        self._pool = ThreadPoolExecutor(1, "batches")
        self._ready: dict[tuple[int, int | None, int | None], Future[Batch]] = {}

    def __call__(self, step: int, rows: slice = ALL_ROWS) -> Batch:
        keys = [(number, rows.start, rows.stop) for number in range(step, step + AHEAD + 1)]
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
