"""The training loop: a free function over the compiled programs and the members of a pack (one run or several).

Runs that differ only in numbers can train as one program, with their states stacked (:mod:`xattn.training.programs`).
Everything else belongs to a single member: its batches, its rows, its checkpoints, and the step at which it ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from xattn.data.batches import Batch, Batches
from xattn.evaluation.attention import statistics_batch, statistics_row
from xattn.evaluation.loss import held_out_loss
from xattn.evaluation.probes import Probe, run_probes
from xattn.runs.run_folder import finite_or_none
from xattn.system.hosts import team
from xattn.tracking.tracker import Row, Tracker
from xattn.training.checkpoint import Checkpoints
from xattn.training.config import TrainerConfig
from xattn.training.programs import Programs, StepMetrics, TrainState


class TrainingClock:
    """A clock for training alone: it is paused while the loop evaluates or saves."""

    def __init__(self) -> None:
        self.seconds, self.tokens = 0.0, 0
        self._since = time.perf_counter()

    def add(self, tokens: int) -> float:
        """Count tokens that are done by now; return the tokens per second since :meth:`resume` or the last call."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.seconds += seconds
        self.tokens += tokens
        return tokens / seconds

    def resume(self) -> None:
        """Ignore the time since the last :meth:`add`, which was not training."""
        self._since = time.perf_counter()

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None


# Fields of Progress that a checkpoint holds, besides the state.
_SAVED = ("train_loss", "val_loss", "val_bpb", "best_val_loss", "measured", "batches_left_out")


@dataclass
class Progress:
    """How far a run is. Losses are None until they are measured, and where they are not finite."""

    state: TrainState
    """Current whenever :func:`train` has returned."""
    step: int = 0
    """Updates tried."""
    train_loss: float | None = None
    val_loss: float | None = None
    val_bpb: float | None = None
    best_val_loss: float | None = None
    measured: dict[str, float | None] = field(default_factory=dict)
    """Latest values of the row's other columns, such as probes."""
    batches_left_out: list[int] = field(default_factory=list)
    """Numbers of the batches that ``nonfinite=rollback`` leaves out, in the order in which they were found."""
    halted_at: int | None = None
    """The update that is not finite and ends the run."""
    pruned: bool = False
    """Whether a tuner has ended the run."""
    clock: TrainingClock = field(default_factory=TrainingClock)
    of_sequences: np.ndarray | None = None
    """See :class:`~xattn.evaluation.loss.HeldOutLoss`; None where another process has it."""

    def batch_of(self, step: int) -> int:
        """Return the batch number of update ``step``, counted from 0: step − 1, shifted past the batches left out."""
        number = step - 1
        for left_out in sorted(self.batches_left_out):
            number += left_out <= number
        return number

    def saved(self) -> dict[str, Any]:
        """Return JSON values from which :meth:`restore` continues, given the state."""
        clock = {"seconds": self.clock.seconds, "tokens": self.clock.tokens}
        return {name: getattr(self, name) for name in _SAVED} | clock

    def restore(self, step: int, state: TrainState, saved: Mapping[str, Any]) -> None:
        self.step, self.state, self.halted_at = step, state, None
        for name in _SAVED:
            setattr(self, name, saved[name])
        self.clock.seconds, self.clock.tokens = saved["seconds"], saved["tokens"]


@dataclass(eq=False)
class Member:
    """A run as the loop sees it."""

    progress: Progress
    batch: Batches
    checkpoints: Checkpoints | None = None
    trackers: Sequence[Tracker] = ()
    prune: Callable[[Row], bool] | None = None
    """Called with the row of each evaluation but the last; True ends the run."""
    probes: Sequence[Probe] = ()
    active: bool = True
    """Whether it still trains. A finished member keeps its place in the pack; its state is ignored and not saved."""


class _Actions(NamedTuple):
    """What a step does besides the update."""

    logs: bool
    evaluates: bool
    takes_statistics: bool
    saves: bool


class _Pace:
    """Decides when to log, evaluate and save."""

    def __init__(self, config: TrainerConfig):
        self._config = config
        self._saved_at = time.monotonic()
        self._is_late = team().agreed(self._is_late_here)

    def due(self, step: int, *, stopping: bool) -> _Actions:
        config = self._config
        saves = (
            step == config.steps
            or stopping
            or (config.checkpoint_every is not None and step % config.checkpoint_every == 0)
            or (config.checkpoint_minutes is not None and self._is_late())
        )
        return _Actions(config.logs(step), config.evaluates(step), config.takes_statistics(step), saves)

    def saved(self) -> None:
        self._saved_at = time.monotonic()

    def _is_late_here(self) -> bool:
        minutes = self._config.checkpoint_minutes
        return minutes is not None and time.monotonic() - self._saved_at > 60 * minutes


def train(
    programs: Programs,
    members: Sequence[Member],
    held_out: Sequence[Batch],
    config: TrainerConfig,
    *,
    bytes_per_token: float | None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train the active members, which are all at the same step, and keep their progress up to date.

    Returns when they reach config.steps, when ``stop()`` was True, or when a member ends by itself: an update that is
    not finite halts it, or it is pruned. Finished members become inactive; the rest can keep training.

    Python runs ahead of the device: only a step that logs, evaluates or saves waits for it. Such a step has a fixed
    order: the update's own metrics, the evaluation of the parameters after it, the step's one row, and then the save.
    So a checkpoint never exists without the rows that lead to it.
    """
    active = [member for member in members if member.active]
    waited_at = active[0].progress.step
    pace = _Pace(config)

    def measure(member: Member, due: _Actions) -> dict[str, Any]:
        progress, row = member.progress, {}
        if due.evaluates:
            row = evaluate(programs, progress, held_out, bytes_per_token) | _probe(programs, progress, member.probes)
        return row | (_attention(programs, progress, held_out) if due.takes_statistics else {})

    state = programs.stack([member.progress.state for member in members])
    for member in active:
        member.progress.clock.resume()
    for step in range(waited_at + 1, config.steps + 1):
        batches = [member.batch(member.progress.batch_of(step)) for member in members]
        state, metrics = programs.step(state, programs.stack_batches(batches))
        stopping = stop()
        due = pace.due(step, stopping=stopping)
        if not any(due):
            continue

        # From here on the step waits for the device.
        reached = programs.split_metrics(metrics)
        tokens_per_step = config.batch_size * batches[0].weights.shape[1]
        tokens = (step - waited_at) * tokens_per_step
        waited_at = step
        rows = [_reach(member, step, reached[members.index(member)], tokens) for member in active]
        if due.evaluates or due.takes_statistics or due.saves or not all(member.active for member in active):
            for member in active:
                member.progress.state = programs.take(state, members.index(member))
        # Halted members get no row and no save. The others get their row first and then the save.
        going = [(member, row) for member, row in zip(active, rows, strict=True) if member.active]
        saves = due.saves
        for member, row in going:
            saves |= _log(member, row, due, measure, tokens=step * tokens_per_step, last=step == config.steps)
        if saves:
            _save([member for member, _ in going], evaluated=due.evaluates)
            pace.saved()
        for member, _ in going:
            member.active = not (stopping or member.progress.pruned or step == config.steps)
        if not all(member.active for member in active):
            return
        for member in active:
            member.progress.clock.resume()
    for member in active:  # restored at config.steps: no step is left to train
        member.active = False


def _reach(member: Member, step: int, metrics: StepMetrics, tokens: int) -> dict[str, Any]:
    """Update the member's progress after a step and return the figures of its training row. An update that is not
    finite deactivates the member, and its figures are then unused."""
    progress, values = member.progress, metrics._asdict()
    tokens_per_second = progress.clock.add(tokens)
    if (halted_at := values.pop("halted_at")) >= 0:
        progress.halted_at, progress.step = halted_at, halted_at - 1
        member.active = False
    else:
        progress.step, progress.train_loss = step, finite_or_none(values["train_loss"])
    return values | {"tokens_per_second": tokens_per_second}


def _log(
    member: Member,
    figures: dict[str, Any],
    due: _Actions,
    measure: Callable[[Member, _Actions], dict[str, Any]],
    *,
    tokens: int,
    last: bool,
) -> bool:
    """Measure and log what is due; return whether the result calls for a checkpoint. ``tokens`` counts the batches of
    all updates so far, steps × batch_size × context_length."""
    progress = member.progress
    row: dict[str, Any] = {"step": progress.step, "tokens": tokens} | (figures if due.logs else {})
    row |= measure(member, due)
    if due.logs or due.evaluates or due.takes_statistics:
        for tracker in member.trackers:
            tracker.log(row)
    if not due.evaluates:
        return False
    progress.pruned = not last and member.prune is not None and member.prune(row)
    return progress.pruned or (progress.val_loss is not None and progress.val_loss == progress.best_val_loss)


def _save(members: Sequence[Member], *, evaluated: bool) -> None:
    """Save all members. No save starts before all previous ones are done, so the whole pack always has a common
    step."""
    own = [(member.progress, member.checkpoints) for member in members if member.checkpoints is not None]
    for _, checkpoints in own:
        checkpoints.wait()
    for progress, checkpoints in own:
        val_loss = progress.val_loss if evaluated else None
        checkpoints.save(progress.step, progress.state, progress.saved(), val_loss=val_loss)


def evaluate(
    programs: Programs, progress: Progress, held_out: Sequence[Batch], bytes_per_token: float | None
) -> dict[str, Any]:
    state = progress.state
    loss = held_out_loss(
        programs.score, state.params, state.hyperparameters.model, held_out, bytes_per_token=bytes_per_token
    )
    progress.val_loss, progress.val_bpb = finite_or_none(loss.val_loss), finite_or_none(loss.val_bpb)
    finite = [x for x in (progress.val_loss, progress.best_val_loss) if x is not None]
    progress.best_val_loss = min(finite, default=None)
    progress.of_sequences = loss.of_sequences
    return loss.row()


def _probe(programs: Programs, progress: Progress, probes: Sequence[Probe]) -> dict[str, float | None]:
    state = progress.state
    found = run_probes(programs.token_scores, state.params, state.hyperparameters.model, probes)
    progress.measured |= {name: finite_or_none(value) for name, value in found.items()}
    return {name: progress.measured[name] for name in found}


def _attention(programs: Programs, progress: Progress, held_out: Sequence[Batch]) -> dict[str, float | None]:
    state = progress.state
    each = programs.attention_statistics(state.params, state.hyperparameters.model, statistics_batch(held_out))
    found = {name: finite_or_none(value) for name, value in statistics_row(each).items()}
    progress.measured |= found
    return found
