"""The training loop: a free function over programs, state, batches and trackers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from xattn.data.batches import Batches, Windows
from xattn.evaluation.attention import statistics_row, study_windows
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

    def add(self, tokens: int) -> float:
        """Counts tokens that are done by now; the tokens per second since :meth:`resume` or the last call."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.seconds += seconds
        self.tokens += tokens
        return tokens / seconds

    def resume(self) -> None:
        """Time since the last :meth:`add` was not training."""
        self._since = time.perf_counter()

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None


# What comes back with a checkpoint, besides the state.
_SAVED = ("train_loss", "val_loss", "val_bpb", "best_val_loss", "measured", "batches_left_out")


@dataclass
class Progress:
    """How far a run is. Losses are None while there is none, or where it is not finite.

    step: updates tried. measured: the last values of what a row has besides the losses. halted_at: the update that is
    not finite and ends the run. batches_left_out: the numbers of the batches that ``nonfinite=rollback`` leaves out, in
    the order in which they were found.
    """

    state: TrainState
    step: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    val_bpb: float | None = None
    best_val_loss: float | None = None
    measured: dict[str, float | None] = field(default_factory=dict)
    batches_left_out: list[int] = field(default_factory=list)
    halted_at: int | None = None
    clock: TrainingClock = field(default_factory=TrainingClock)

    def batch_of(self, step: int) -> int:
        """The number of the batch of update ``step``, counted from 0: step − 1, past those that are left out."""
        number = step - 1
        for left_out in sorted(self.batches_left_out):
            number += left_out <= number
        return number

    def saved(self) -> dict[str, Any]:
        """JSON values from which, with the state, :meth:`restore` goes on."""
        clock = {"seconds": self.clock.seconds, "tokens": self.clock.tokens}
        return {name: getattr(self, name) for name in _SAVED} | clock

    def restore(self, step: int, state: TrainState, saved: Mapping[str, Any]) -> None:
        self.step, self.state, self.halted_at = step, state, None
        for name in _SAVED:
            setattr(self, name, saved[name])
        self.clock.seconds, self.clock.tokens = saved["seconds"], saved["tokens"]


def train(
    programs: Programs,
    progress: Progress,
    batch: Batches,
    windows: Sequence[Windows],
    checkpoints: Checkpoints,
    trackers: Sequence[Tracker],
    config: TrainerConfig,
    *,
    bytes_per_token: float | None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains to config.steps, to the update that halts it, or until ``stop()``, and keeps ``progress`` up to date.

    Python runs ahead of the device: only a step that logs, evaluates or saves waits for it. There the order is: the
    update's own metrics, the evaluation of the parameters after it, the step's one row, and then the save, so that a
    checkpoint never exists without the rows that lead to it.
    """
    tokens_per_step = config.batch_size * batch(0).weights.shape[1]
    waited_at = progress.step
    saved_at = time.monotonic()
    progress.clock.resume()
    for step in range(progress.step + 1, config.steps + 1):
        progress.state, metrics = programs.step(progress.state, batch(progress.batch_of(step)))
        last, stopping = step == config.steps, stop()
        logs = last or step % config.log_every == 0
        evaluates = last or step % config.eval_every == 0
        studies = config.attention_stats_every is not None and (last or step % config.attention_stats_every == 0)
        saves = (
            last
            or stopping
            or (config.checkpoint_every is not None and step % config.checkpoint_every == 0)
            or (config.checkpoint_minutes is not None and time.monotonic() - saved_at > 60 * config.checkpoint_minutes)
        )
        if not (logs or evaluates or studies or saves):
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
        if studies:
            row |= _study(programs, progress, windows)
        if logs or evaluates or studies:
            for tracker in trackers:
                tracker.log(row)
        if saves:
            val_loss = progress.val_loss if evaluates else None
            checkpoints.save(step, progress.state, progress.saved(), val_loss=val_loss)
            saved_at = time.monotonic()
        if stopping:
            return
        progress.clock.resume()


def _evaluate(
    programs: Programs, progress: Progress, windows: Sequence[Windows], bytes_per_token: float | None
) -> dict[str, Any]:
    state = progress.state
    loss = held_out_loss(
        programs.score, state.params, state.hyperparameters.model, windows, bytes_per_token=bytes_per_token
    )
    progress.val_loss, progress.val_bpb = finite_or_none(loss.val_loss), finite_or_none(loss.val_bpb)
    finite = [x for x in (progress.val_loss, progress.best_val_loss) if x is not None]
    progress.best_val_loss = min(finite, default=None)
    return loss._asdict()


def _study(programs: Programs, progress: Progress, windows: Sequence[Windows]) -> dict[str, float | None]:
    state = progress.state
    study = programs.study(state.params, state.hyperparameters.model, study_windows(windows))
    found = {name: finite_or_none(value) for name, value in statistics_row(study).items()}
    progress.measured |= found
    return found
