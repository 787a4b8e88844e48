"""The training loop: a free function over programs, state, batches and trackers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from xattn.data.batches import Windows
from xattn.evaluation.loss import held_out_loss
from xattn.run_folder import finite_or_none
from xattn.tracking.tracker import Tracker
from xattn.training.checkpoint import Checkpoints
from xattn.training.config import TrainerConfig
from xattn.training.programs import Programs, TrainState


class TrainingClock:
    """Seconds and tokens of training alone: it stands while the loop evaluates or saves."""

    def __init__(self) -> None:
        self.seconds, self.tokens = 0.0, 0
        self._since = time.perf_counter()
        self._lap = (0.0, 0)

    def add(self, tokens: int) -> float:
        """Counts tokens that are done by now; the tokens per second since the last call."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        self.tokens += tokens
        seconds, done = self.seconds - self._lap[0], self.tokens - self._lap[1]
        self._lap = (self.seconds, self.tokens)
        return done / seconds

    def resume(self) -> None:
        """Time since the last :meth:`add` was not training."""
        self._since = time.perf_counter()

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None


@dataclass
class Progress:
    """How far a run is. Numbers that were never finite are None."""

    state: TrainState
    step: int = 0
    committed_step: int | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    val_bpb: float | None = None
    best_val_loss: float | None = None
    halted_at: int | None = None
    clock: TrainingClock = field(default_factory=TrainingClock)


def train(
    programs: Programs,
    progress: Progress,
    batch: Callable[[int], np.ndarray],
    windows: Sequence[Windows],
    checkpoints: Checkpoints,
    trackers: Sequence[Tracker],
    config: TrainerConfig,
    *,
    bytes_per_token: float,
) -> None:
    """Trains to config.steps, or to the update that halts it, and keeps ``progress`` up to date.

    Python runs ahead of the device: only a step that logs, evaluates or saves waits for it. There the order is: the
    update's own metrics, the evaluation of the parameters after it, the save, and then the step's one row.
    """
    tokens_per_step = config.batch_size * (batch(0).shape[1] - 1)
    waited_at = progress.step
    progress.clock.resume()
    for step in range(progress.step + 1, config.steps + 1):
        progress.state, metrics = programs.step(progress.state, batch(step - 1))
        last = step == config.steps
        logs = last or step % config.log_every == 0
        evaluates = last or step % config.eval_every == 0
        saves = last or (config.checkpoint_every is not None and step % config.checkpoint_every == 0)
        if not (logs or evaluates or saves):
            continue

        values = {name: value.item() for name, value in jax.device_get(metrics)._asdict().items()}
        tokens_per_second = progress.clock.add((step - waited_at) * tokens_per_step)
        waited_at = step
        if (halted_at := values.pop("halted_at")) >= 0:
            progress.halted_at, progress.step = halted_at, halted_at - 1
            return
        progress.step, progress.train_loss = step, finite_or_none(values["train_loss"])
        row: dict[str, Any] = {"step": step}
        if logs:
            row |= values | {"tokens_per_second": tokens_per_second}
        if evaluates:
            row |= _evaluate(programs, progress, windows, bytes_per_token)
            saves = saves or (progress.val_loss is not None and progress.val_loss == progress.best_val_loss)
        if saves:
            checkpoints.save(step, progress.state, progress.val_loss if evaluates else None)
            progress.committed_step = step
        if logs or evaluates:
            for tracker in trackers:
                tracker.log(row)
        progress.clock.resume()


def _evaluate(
    programs: Programs, progress: Progress, windows: Sequence[Windows], bytes_per_token: float
) -> dict[str, Any]:
    state = progress.state
    loss = held_out_loss(
        programs.score, state.params, state.hyperparameters.model, windows, bytes_per_token=bytes_per_token
    )
    progress.val_loss, progress.val_bpb = finite_or_none(loss.val_loss), finite_or_none(loss.val_bpb)
    finite = [x for x in (progress.val_loss, progress.best_val_loss) if x is not None]
    progress.best_val_loss = min(finite, default=None)
    return loss._asdict()
