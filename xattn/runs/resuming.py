"""Where the members of a pack start: at a checkpoint or the beginning. A rollback returns a member to either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from xattn.data.run_data import RunData
from xattn.errors import IntegrityError
from xattn.runs import run_folder
from xattn.runs.opening import Desk
from xattn.runs.record import Run
from xattn.runs.run_folder import shown
from xattn.system import hosts
from xattn.tracking.tracker import MetricsFile, Tracker, brief, read_rows
from xattn.training.checkpoint import Restored
from xattn.training.llama import initial_weights
from xattn.training.loop import Member, Progress
from xattn.training.programs import Programs, TrainState, ended, hyperparameters
from xattn.training.sharding import like

MAX_ROLLBACKS = 3


class Start(NamedTuple):
    """Where a run starts from."""

    checkpoint: Restored | None
    """None for the beginning."""
    lost: Sequence[int]
    """The steps up to the newest checkpoint whose rows of metrics.jsonl are gone."""


@dataclass(frozen=True, eq=False)
class Trainee:
    """A run that trains: its desk, its metrics.jsonl, and its member of the pack."""

    desk: Desk
    metrics: MetricsFile
    member: Member


def newest_of_all(desks: Sequence[Desk], fresh: Mapping[Run, TrainState]) -> dict[Desk, Start]:
    """Return where each run starts; all start at the same step.

    ``fresh`` is the state that each run begins with. Raise :class:`IntegrityError` if rows of metrics.jsonl are lost
    and no checkpoint is old enough to make them again.
    """
    at_most: int | None = None
    while True:
        starts = {desk: restore(desk, fresh[desk.run], at_most) for desk in desks}
        steps = {0 if start.checkpoint is None else start.checkpoint.step for start in starts.values()}
        if 0 in steps:
            with hosts.team().in_step():
                for desk, start in starts.items():
                    _refuse_to_lose(desk.run, start.lost)
        if len(steps) == 1:
            return starts
        at_most = min(steps)


def restore(desk: Desk, shapes: TrainState, at_most: int | None) -> Start:
    """Return the newest intact checkpoint, at most at step ``at_most``, that metrics.jsonl has all rows up to."""
    run, team = desk.run, hosts.team()
    if steps := desk.checkpoints.steps():  # the newest may have been renamed into place just before a kill
        run.write_summary(committed_step=steps[-1])  # before a broken one is moved aside
    lost = team.from_first(_steps_without_row(run, steps[-1] if steps else 0))
    bounds = [*([] if at_most is None else [at_most]), *(step - 1 for step in lost[:1])]
    checkpoint = desk.checkpoints.restore_state(shapes, at_most=min(bounds, default=None))
    with team.in_step():
        committed = run.summary["committed_step"]
        if checkpoint is None and not bounds and committed is not None:
            raise IntegrityError(
                f"{desk.checkpoints.folder}: the checkpoint of step {committed} is missing; restore it, or start over "
                "with resume=never"
            )
    return Start(checkpoint, lost)


def _steps_without_row(run: Run, until: int) -> list[int]:
    """Return the steps up to ``until`` whose row is missing from metrics.jsonl."""
    there = read_rows(run.folder / run_folder.METRICS).lines if until else {}
    leaves_row = run.config.trainer.leaves_row
    return [step for step in range(1, until + 1) if leaves_row(step) and step not in there]


def _refuse_to_lose(run: Run, lost: Sequence[int]) -> None:
    """Raise :class:`IntegrityError` if rows are lost; no checkpoint is old enough to make them again."""
    if lost:
        raise IntegrityError(
            f"{shown(run.folder / run_folder.METRICS)}: the rows of steps {brief(lost)} are lost or "
            "damaged, and no checkpoint is old enough to compute them again\nrestore them from a copy or a "
            'tracker, write {"step": N} for each to give it up, or start over with resume=never'
        )


def resumed(desk: Desk, start: Start, fresh: TrainState) -> Trainee:
    """Return the run as it was at the checkpoint, or as it begins with ``fresh``."""
    run, (checkpoint, lost) = desk.run, start
    if checkpoint is None:
        progress = Progress(_with_initial_weights(run, fresh))
        run.write_summary(step=0, committed_step=None)
    else:
        progress = Progress(fresh)
        progress.restore(checkpoint.step, checkpoint.tree, checkpoint.progress)
        run.committed(checkpoint.step)
        run.display.say(f"resumed     from step {checkpoint.step}")
        if lost:
            run.display.warn(
                f"warning: {shown(run.folder / run_folder.METRICS)}: the rows of steps {brief(lost)} are "
                f"lost or damaged; they are computed again, and later checkpoints are moved to checkpoints/.bad"
            )
    desk.checkpoints.set_back(progress.step)
    metrics = MetricsFile(run.folder / run_folder.METRICS, after=progress.step, say=run.display.warn)
    trackers: list[Tracker] = [metrics, run.display, *run.job.watch, *([] if run.mirror is None else [run.mirror])]
    member = Member(progress, desk.batch, desk.checkpoints, trackers, run.job.prune, desk.inputs.probes)
    return Trainee(desk, metrics, member)


def spectator(data: RunData, fresh: TrainState) -> Member:
    """Return the member of a run that has ended: it keeps its place in the program."""
    return Member(Progress(ended(fresh)), data.batch, active=False)


def _with_initial_weights(run: Run, state: TrainState) -> TrainState:
    """Return the state with the weights of ``model.init_from``, if that is given."""
    weights = initial_weights(run.config)
    if weights is None:
        return state
    run.display.say(f"weights     from {weights.folder}")
    return state._replace(params=like(weights.params(), state.params))


def rolls_back(trainee: Trainee, compiled: Programs) -> bool:
    """Roll back to the last checkpoint if an update is not finite, and leave out its batch; return whether it did so.

    Without a checkpoint it goes back to the beginning. The earlier batches are seen as before, so the result does not
    depend on which checkpoints exist.
    """
    desk, member = trainee.desk, trainee.member
    config, progress = desk.run.config, member.progress
    halted_at = progress.halted_at
    if halted_at is None or config.trainer.nonfinite != "rollback":
        return False
    if len(progress.batches_left_out) >= MAX_ROLLBACKS:
        return False
    desk.checkpoints.wait()
    checkpoint = restore(desk, progress.state, None).checkpoint
    left_out = [*progress.batches_left_out, progress.batch_of(halted_at)]
    if checkpoint is None:
        progress = member.progress = Progress(_with_initial_weights(desk.run, compiled.init(hyperparameters(config))))
    else:
        progress.restore(checkpoint.step, checkpoint.tree, checkpoint.progress)
    progress.batches_left_out = left_out
    trainee.metrics.rewind(progress.step)
    member.active = True
    desk.run.display.warn(
        f"update {halted_at} is not finite: going back to step {progress.step} and leaving out its batch "
        f"({len(left_out)} of at most {MAX_ROLLBACKS} times)"
    )
    return True
