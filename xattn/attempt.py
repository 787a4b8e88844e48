"""One run's side of an attempt at training it: builds the run's parts, and keeps its folder true.

:class:`xattn.pack.Pack` carries it out, for one run or for several that train as one program. Importing this module
imports no jax: what can be judged without it is told before it is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import xattn.config
from xattn import hosts, keys, run_folder
from xattn.config import Config
from xattn.data.baselines import MIN_GZIP_BYTES, gzip_bits_per_byte, unigram_bits_per_byte
from xattn.data.batches import Batches
from xattn.data.corpus import check
from xattn.data.prefetch import Prefetch
from xattn.data.run_data import RunData, load_data
from xattn.data.tokenizer import IdTokenizer, Tokenizer
from xattn.errors import BadInput, ExitCode, IntegrityError, XattnError
from xattn.mirror import end_mirror, mirror_of
from xattn.provenance import belongs_to, changes, corpus, provenance
from xattn.run_folder import RunFolder, result_line, shown
from xattn.screen import printable
from xattn.tracking.display import Display
from xattn.tracking.tracker import MetricsFile, Row, Tracker, brief, read_rows
from xattn.tracking.wandb import WandbMirror, refuse_without_key
from xattn.training.kept import keep_only
from xattn.training.llama import initial_weights

if TYPE_CHECKING:
    from xattn.backend.dispatch import Choice
    from xattn.evaluation.probes import Probe
    from xattn.training.checkpoint import Checkpoints, Restored
    from xattn.training.loop import Member, Progress
    from xattn.training.programs import Programs, TrainState
    from xattn.training.sharding import Layout

SAMPLE_TOKENS = 300
SAMPLE_TEMPERATURE = 0.8
MAX_FAILURES_IN_A_ROW = 3
MAX_ROLLBACKS = 3


def prunes_nothing(row: Row) -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to make: its validated config, its folder, and what the person typed for it.

    watch: trackers besides the run's own. prune: given each evaluation's row but the last; True ends the run.
    answerable: whether a finished run of the same training may stand in for it.
    """

    config: Config
    folder: Path
    overrides: tuple[str, ...] = ()
    watch: tuple[Tracker, ...] = ()
    prune: Callable[[Row], bool] = prunes_nothing
    answerable: bool = True


class Attempt:
    """One attempt at a run, in a folder that this process holds.

    before: the summary that the attempt before this one left, empty at a first start. code: what it has come to.
    """

    def __init__(self, job: Job, folder: RunFolder, before: Mapping[str, Any], *, quiet: bool):
        self.config, self.folder, self._job, self._before = job.config, folder, job, before
        self.display = Display(folder / run_folder.LOG, job.config.trainer.steps, quiet=quiet)
        self.is_finished = before.get("status") in ("done", "diverged")
        self.code = ExitCode[before["status"].upper()] if self.is_finished else ExitCode.ERROR
        self.is_concluded = False
        self._supersedes = job.config.resume == "never" and folder.is_ours()  # moved aside once nothing is refused
        self._has_begun = False
        self._start = time.perf_counter()
        self._summary: dict[str, Any] = {"step": 0, "committed_step": None} | dict(before) | {"status": "running"}
        self._mirror: WandbMirror | None = None
        self._lost: list[int] = []  # steps up to the newest checkpoint whose rows are gone
        self.data: RunData
        self._probes: list[Probe]
        self._rows: slice
        self._batch: Batches
        self._metrics: MetricsFile
        self._checkpoints: Checkpoints
        self._member: Member

    # ---- how it begins

    def look(self) -> None:
        """Raises what can be judged without jax."""
        failures = self._before.get("failures")
        if failures and failures["count"] >= MAX_FAILURES_IN_A_ROW and not changes(failures, provenance()):
            raise XattnError(
                f"{shown(self.folder.path)}: failed {failures['count']} times in a row at step {failures['step']}, "
                f"with this same source; see its {run_folder.LOG}. Change the source, or begin anew with resume=never"
            )
        refuse_without_key(self.config.tracking.wandb)
        with self._as_recorded():
            check(self.config.data)
        if self._summary["committed_step"] is None:  # later its own checkpoints are what it goes on from
            initial_weights(self.config)

    def read_data(self, layout: Layout, stop: Callable[[], bool]) -> None:
        """The data, and the probes that are made from it.

        stop: asked while the corpus is tokenised; True leaves with :class:`Preempted`.
        """
        from xattn.evaluation.probes import Scene, make_probes

        config = self.config
        with self._as_recorded():
            self.data = load_data(
                config.data,
                context_length=config.backend.context_length,
                batch_size=config.trainer.batch_size,
                windows=config.evaluation.windows,
                seed=config.seed,
                say=self.display.say,
                stop=stop,
            )
            rows = layout.sizes["data"] * layout.sizes["fsdp"]
            scene = Scene(config.data, self.data, config.backend, config.trainer.batch_size, rows)
            self._probes = make_probes(config.evaluation.probes, scene)
        if self._summary["committed_step"] is None:
            self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        weights, tokens = initial_weights(self.config), self.data.tokenizer.vocab_size
        if weights is not None and weights.vocab_size != tokens:
            raise BadInput(
                f"model.init_from = {weights.folder}: its vocabulary has {weights.vocab_size} tokens, that of the data "
                f"{tokens}; give data.tokenizer the tokenizer.json of those weights"
            )

    @contextlib.contextmanager
    def _as_recorded(self) -> Iterator[None]:
        """Data that a first start would refuse are not the person's mistake where the run has begun with other data."""
        try:
            yield
        except BadInput as error:
            if self._supersedes or self.folder.read_json(run_folder.PROVENANCE) is None:
                raise
            raise IntegrityError(f"the training data are not those that this run began with: {error}") from error

    def begin(self, choices: Mapping[str, Choice], layout: Layout, pack: Sequence[str] | None) -> None:
        """Makes the folder a run's, or continues the run in it.

        choices: kind of layer → what computes its attention. pack: the names of the runs in its pack.
        """
        config, display = self.config, self.display
        if self._supersedes:
            self._move_aside()
        if config.resume == "never" and hosts.team().is_first:
            move_older_aside(config, self.folder.path, display.warn)
        origin = self._origin(layout.sizes, pack)
        self._has_begun = True
        display.say(f"run folder  {shown(self.folder.path)}")
        kinds = config.backend.kinds
        where = {"backend": "", "then": f" every {config.backend.every} layers"}
        records = {kind: choice.proof.record for kind, choice in choices.items() if choice.proof is not None}
        by = {kind: f" (record {records[kind]})" if kind in records else "" for kind in kinds}
        told = (f"{kinds[kind].activation}{where[kind]}, computed by {choices[kind].name}{by[kind]}" for kind in kinds)
        display.say(f"attention   {'; '.join(told)}")
        if layout.mesh is not None:
            display.say(f"devices     {layout}")
        for kind, choice in choices.items():
            of = f"{kinds[kind].activation} " if len(kinds) > 1 else ""
            for passed_over, reason in choice.passed_over.items():
                display.note(f"            {of}not by {passed_over}: {reason}")
        if pack is not None:
            display.note(f"pack        of {len(pack)} runs: {', '.join(pack)}")
        if config.tracking.wandb.mode != "disabled":
            self._mirror = mirror_of(config, self.folder.path, origin, say=display.say)
        self._summary |= {
            "implementation": _by_kind({kind: choice.name for kind, choice in choices.items()}),
            "passed_over": _by_kind({kind: choice.passed_over for kind, choice in choices.items()}),
            **({"proven_by": _by_kind({kind: records.get(kind) for kind in kinds})} if records else {}),
        }
        self._open_checkpoints(origin)
        self._rows = layout.rows_here(config.trainer.batch_size)

    def _move_aside(self) -> None:
        """The run that is there, which ``resume=never`` is to begin anew."""
        status = (self.folder.summary() or {"status": "not begun"})["status"]
        self.display.close()  # its log.txt goes with it
        self.display.warn(f"the earlier run here ({status}) is moved to {shown(self.folder.move_aside())}")
        self._supersedes = False

    def _origin(self, mesh: dict[str, int], pack: Sequence[str] | None) -> dict[str, Any]:
        """provenance.json: written at a first start, checked and amended later. config.yaml comes first: it makes the
        folder a run's."""
        import jax

        folder, data_sha256 = self.folder, self.data.sha256
        here = provenance() | {
            "device_kind": jax.devices()[0].device_kind,
            "device_count": jax.device_count(),
            "process_count": jax.process_count(),
            "mesh": mesh,
            "data_sha256": data_sha256,
            "corpus": corpus(self.config.data, self.data.corpus_size),
            "training_identity": keys.training_identity(xattn.config.hashed_values(self.config)),
            "pack": None if pack is None else list(pack),
        }
        before = folder.read_json(run_folder.PROVENANCE)
        if before is None:
            run_folder.write_atomically(folder / run_folder.CONFIG, xattn.config.save(self.config))
            overrides = xattn.config.save_overrides(self._job.overrides)
            run_folder.write_atomically(folder / run_folder.OVERRIDES, overrides)
            if self.data.tokenizer_json is not None:
                run_folder.write_atomically(folder / run_folder.TOKENIZER, self.data.tokenizer_json)
            origin = here
        else:
            if before["data_sha256"] != data_sha256:
                raise IntegrityError(self._other_data(before))
            self.data.check_tokenizer(folder.path)
            if self._before.get("committed_step") is None:  # nothing has come of that pack yet
                before = before | {"pack": here["pack"]}
            origin = before
            if changed := changes(before, here):
                self.display.warn(f"warning: changed since this run began: {', '.join(changed)}")
                again = {key: here[key] for key in (*changed, "started_at", "command")}
                origin = before | {"resumed_with": [*before.get("resumed_with", []), again]}
        if origin != folder.read_json(run_folder.PROVENANCE):
            run_folder.write_atomically(folder / run_folder.PROVENANCE, run_folder.to_json(origin, indent=2) + "\n")
        run_folder.write_summary(folder.path, self._summary)
        return origin

    def _other_data(self, before: Mapping[str, Any]) -> str:
        """What to say where the data are not those that the run began with."""
        here, then = self.data.sha256, before["data_sha256"]
        told = "the training data, or their tokenizer, are not those that this run began with"
        belongs = belongs_to(self.config.data, before, size=self.data.corpus_size, sha256=here)
        if belongs is None:
            hashes = f"(sha256 {here[:12]}…, then {then[:12]}…)"
            return f"{told} {hashes}; bring them back, or start over with resume=never"
        why, with_them = belongs
        hint = ", or give a text that is the same everywhere: data=text data.path=…" if "Python" in with_them else ""
        return f"{told}: {why}\nstart it with {with_them}, or start over with resume=never{hint}"

    def _open_checkpoints(self, origin: Mapping[str, Any]) -> None:
        from xattn.training.checkpoint import Checkpoints

        self._checkpoints = Checkpoints(
            self.folder / run_folder.CHECKPOINTS,
            belongs_to={
                "config": xattn.config.run_hash(self.config),
                "data_sha256": origin["data_sha256"],
                "versions": origin["versions"],
            },
            before_commit=lambda: self._metrics.sync(),
            on_commit=self._committed,
            say=self.display.warn,
        )

    def restore(self, shapes: TrainState, at_most: int | None) -> Restored | None:
        """The newest whole checkpoint, of no later step than ``at_most``, to which metrics.jsonl has all rows."""
        if steps := self._checkpoints.steps():  # the newest may have been renamed into place just before a kill
            self._summary["committed_step"] = steps[-1]
            run_folder.write_summary(self.folder.path, self._summary)  # before a broken one is moved aside
        with hosts.team().in_step():
            lost = self._steps_without_row(steps[-1] if steps else 0)
        self._lost = hosts.team().from_first(lost)
        bounds = [*([] if at_most is None else [at_most]), *(step - 1 for step in self._lost[:1])]
        restored = self._checkpoints.restore_state(shapes, at_most=min(bounds, default=None))
        with hosts.team().in_step():
            committed = self._summary["committed_step"]
            if restored is None and not bounds and committed is not None:
                raise IntegrityError(
                    f"{self._checkpoints.folder}: a checkpoint of step {committed} was there and is gone; bring it "
                    "back, or begin anew with resume=never"
                )
        return restored

    def _steps_without_row(self, until: int) -> list[int]:
        """Of the steps up to that one, those whose row should be in metrics.jsonl and is not."""
        there = read_rows(self.folder / run_folder.METRICS).lines if until else {}
        leaves_row = self.config.trainer.leaves_row
        return [step for step in range(1, until + 1) if leaves_row(step) and step not in there]

    def refuse_to_lose_rows(self) -> None:
        """Raises :class:`IntegrityError` where rows are lost that no checkpoint is old enough to make again."""
        with hosts.team().in_step():
            if self._lost:
                raise IntegrityError(
                    f"{shown(self.folder / run_folder.METRICS)}: the rows of steps {brief(self._lost)} are lost or "
                    "damaged, and no checkpoint is old enough to make them again\nput them back, from a copy or a "
                    'tracker; or write {"step": N} for each to give it up; or start over with resume=never'
                )

    def go_on_from(self, restored: Restored | None, state: TrainState) -> Member:
        """What the loop trains: the run as it was at the checkpoint, or ``state``, where it begins."""
        from xattn.training.loop import Member, Progress

        progress = Progress(self._begun(state) if restored is None else state)
        if restored is not None:
            progress.restore(restored.step, restored.tree, restored.progress)
            self._committed(restored.step)
            self.display.say(f"resumed     from step {restored.step}")
            if self._lost:
                self.display.warn(
                    f"warning: {shown(self.folder / run_folder.METRICS)}: the rows of steps {brief(self._lost)} are "
                    f"lost or damaged; they are made again from there, and later checkpoints are in checkpoints/.bad"
                )
        else:
            self._summary |= {"step": 0, "committed_step": None}
            run_folder.write_summary(self.folder.path, self._summary)
        self._checkpoints.set_back(progress.step)
        self._metrics = MetricsFile(self.folder / run_folder.METRICS, after=progress.step, say=self.display.warn)
        trackers: list[Tracker] = [self._metrics, self.display, *self._job.watch]
        if self._mirror is not None:
            trackers.append(self._mirror)
        batch = partial(self._batch, rows=self._rows)
        self._member = Member(progress, batch, self._checkpoints, trackers, self._job.prune, self._probes)
        return self._member

    def _begun(self, state: TrainState) -> TrainState:
        """A new state, with the weights of ``model.init_from`` where that is given."""
        from xattn.training.sharding import like

        weights = initial_weights(self.config)
        if weights is None:
            return state
        self.display.say(f"weights     of {weights.folder}")
        return state._replace(params=like(weights.params(), state.params))

    def describe(self, compiled: Programs, *, compile_seconds: float | None) -> None:
        """Notes what is known of the programs."""
        from xattn.training.programs import num_params

        params = num_params(self._member.progress.state)
        self.display.say(f"model       {params:,} parameters, {self.data.description}")
        self._summary |= {
            "num_params": params,
            "flops_per_step": compiled.flops_per_step,
            "compile_seconds": compile_seconds,
            "peak_memory_bytes": compiled.peak_memory_bytes,
            "packed_with": compiled.size,
        }

    # ---- how it goes on

    @property
    def is_training(self) -> bool:
        return self._member.active

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Shows the progress; in the end the last save is done, or raises what went wrong with it."""
        with self.display, self._checkpoints, Prefetch(self.data.batch) as self._batch:
            yield

    def _committed(self, step: int) -> None:
        self._summary |= {"step": step, "committed_step": step}
        run_folder.write_summary(self.folder.path, self._summary)

    def rolls_back(self, compiled: Programs) -> bool:
        """Whether an update that is not finite is answered by going back to the last checkpoint, without its batch.

        Where there is none yet it goes back to the beginning. The batches before it are seen as they were, so the
        result does not depend on which checkpoints there are.
        """
        from xattn.training.loop import Progress
        from xattn.training.programs import hyperparameters

        progress = self._member.progress
        halted_at = progress.halted_at
        if halted_at is None or self.config.trainer.nonfinite != "rollback":
            return False
        if len(progress.batches_left_out) >= MAX_ROLLBACKS:
            return False
        self._checkpoints.wait()
        restored = self.restore(progress.state, None)
        left_out = [*progress.batches_left_out, progress.batch_of(halted_at)]
        if restored is None:
            state = self._begun(compiled.init(hyperparameters(self.config)))
            progress = self._member.progress = Progress(state)
        else:
            progress.restore(restored.step, restored.tree, restored.progress)
        progress.batches_left_out = left_out
        self._metrics.rewind(progress.step)
        self._member.active = True
        self.display.warn(
            f"update {halted_at} is not finite: back to step {progress.step}, its batch is left out "
            f"({len(left_out)} of at most {MAX_ROLLBACKS} times)"
        )
        return True

    # ---- how it ends

    def conclude(self, compiled: Programs) -> None:
        """The result, in summary.json and on the screen."""
        from xattn.training.state_hash import state_sha256

        self._checkpoints.wait()
        self._metrics.close()
        self.display.end_progress()
        progress = self._member.progress
        self.code, status = self._outcome()
        summary = self._summary | {
            "status": status,
            "step": progress.step,
            "val_loss": progress.val_loss,
            "val_bpb": progress.val_bpb,
            "best_val_loss": progress.best_val_loss,
            "train_loss": progress.train_loss,
            **progress.measured,
            "tokens_per_second": progress.clock.tokens_per_second,
            "state_sha256": state_sha256(progress.state.params, progress.state.opt_state),
        }
        summary.pop("failures", None)
        if status != "preempted" and self.config.trainer.attention_stats_every is not None:
            self._draw_attention(compiled, progress)
        match status:
            case "done":
                self._keep_window_losses(compiled, progress)
                self._show_sample(compiled, progress.state)
                self._show_result(summary)
            case "preempted":
                self.display.say(f"stopped at step {progress.step}, and saved; the same command goes on from there")
            case "pruned":
                self.display.say(f"pruned at step {progress.step}, and saved")
            case _ if progress.halted_at is not None:
                self.display.warn(
                    f"diverged: the loss or gradient of update {progress.halted_at} is not finite, and not made"
                )
            case _:
                self.display.warn(f"diverged: the evaluation at step {progress.step} is not finite")
        summary["wall_seconds"] = self._before.get("wall_seconds", 0.0) + time.perf_counter() - self._start
        run_folder.write_summary(self.folder.path, summary)
        self._summary, self.is_concluded = summary, True
        self.display.say(f"run folder  {shown(self.folder.path)}")

    def _outcome(self) -> tuple[ExitCode, str]:
        progress = self._member.progress
        if progress.pruned:
            return ExitCode.DONE, "pruned"
        if progress.halted_at is None and progress.step < self.config.trainer.steps:
            return ExitCode.PREEMPTED, "preempted"
        if progress.halted_at is not None or progress.val_loss is None:
            return ExitCode.DIVERGED, "diverged"
        return ExitCode.DONE, "done"

    def _show_sample(self, compiled: Programs, state: TrainState) -> None:
        """A sample of text; none where tokens stand for none, as a task's do not."""
        if isinstance(self.data.tokenizer, IdTokenizer):
            return
        sample = _sample(compiled, state, self.data.tokenizer, self.config.seed)
        artifacts = self.folder / run_folder.ARTIFACTS
        artifacts.mkdir(exist_ok=True)
        run_folder.write_atomically(artifacts / run_folder.SAMPLE, sample)
        shown = printable(sample)
        hint = ", · for what is not printable" if shown.count("·") > sample.count("·") else ""
        self.display.say(f"\na sample at temperature {SAMPLE_TEMPERATURE}{hint}:")
        self.display.say_sample(f"{shown}\n")

    def _show_result(self, summary: dict[str, Any]) -> None:
        self.display.say(f"result      {result_line(summary)}")
        scored = self.data.scored_bytes()
        if scored is None:
            return
        others = [f"unigrams {unigram_bits_per_byte(scored):.4f}"]
        if len(scored) >= MIN_GZIP_BYTES:
            others.append(f"gzip {gzip_bits_per_byte(scored):.4f}")
        self.display.say(f"baselines   {', '.join(others)} bits/byte, of the same {len(scored):,} bytes")

    def _keep_window_losses(self, compiled: Programs, progress: Progress) -> None:
        """What the last evaluation found, window by window, by which a report tells how much hangs on the windows."""
        from xattn.training.loop import evaluate

        if progress.of_windows is None:  # the end alone was missing
            evaluate(compiled, progress, self.data.windows, self.data.bytes_per_token())
        assert progress.of_windows is not None
        file = io.BytesIO()
        np.save(file, progress.of_windows)
        artifacts = self.folder / run_folder.ARTIFACTS
        artifacts.mkdir(exist_ok=True)
        run_folder.write_atomically(artifacts / run_folder.WINDOW_LOSSES, file.getvalue())

    def _draw_attention(self, compiled: Programs, progress: Progress) -> None:
        from xattn.evaluation.attention import study_windows
        from xattn.evaluation.attention_maps import draw

        state = progress.state
        study = compiled.study(state.params, state.hyperparameters.model, study_windows(self.data.windows))
        (self.folder / run_folder.ARTIFACTS).mkdir(exist_ok=True)
        draw(study, self.folder / run_folder.ARTIFACTS / run_folder.ATTENTION_MAPS, step=progress.step)

    def note(self, text: str) -> None:
        """Writes to log.txt, if that can be done at all."""
        with contextlib.suppress(OSError):  # the disk may be what is full
            self.display.note(text)

    def refused(self, error: XattnError) -> None:
        """Notes an error that a person is told of otherwise."""
        if self.folder.is_ours():
            self.note(f"error: {error}")
        if self._has_begun and isinstance(error, BadInput):  # a step that does not fit in memory
            self._summary["status"] = self._before.get("status", "failed")
            run_folder.write_summary(self.folder.path, self._summary)
        self.code = error.exit_code

    def failed(self, error: Exception) -> None:
        """Counts failures of one source without a new step between them; the same place is not tried for ever."""
        before, step, here = self._before.get("failures"), self._summary["step"], provenance()
        again = before and before["step"] >= step and not changes(before, here)
        count = before["count"] + 1 if before and again else 1
        same = {key: here[key] for key in ("source_sha256", "versions", "registered") if key in here}
        self._summary |= {"status": "failed", "failures": {"count": count, "step": step} | same}
        if self.folder.is_ours() and not self._supersedes:  # before that nothing has begun
            run_folder.write_summary(self.folder.path, self._summary)
        self.display.warn(f"{type(error).__name__}: {error}".splitlines()[0])
        self.display.warn(f"the traceback is in {shown(self.folder / run_folder.LOG)}")

    def part_from_wandb(self) -> None:
        if self._mirror is not None:
            end_mirror(self._mirror, self.config, self._summary, self.code)

    def keep_what_is_asked(self) -> None:
        """Deletes the checkpoints that ``trainer.keep`` does not ask for, once the run has ended and says so itself."""
        if not self.is_concluded or self._summary["status"] not in ("done", "diverged"):
            return
        keep = self.config.trainer.keep
        try:
            keep_only(self.folder / run_folder.CHECKPOINTS, keep, why=f"trainer.keep={keep}")
        except OSError as error:  # the run is done all the same
            self.display.warn(f"warning: {self.folder / run_folder.CHECKPOINTS}: not all deleted: {error.strerror}")


def move_older_aside(config: Config, folder: Path, say: Callable[[str], None]) -> None:
    """For ``resume=never``: moves aside the same run as an older version made and named it."""
    if (older := xattn.config.older_folder(config, folder)) is not None:
        held = RunFolder(older)
        say(f"the earlier run of an older version is moved to {shown(held.move_aside())}")
        held.withdraw()
        held.release()


def _by_kind(values: Mapping[str, Any]) -> Any:
    """The value itself where all layers are of one kind, else kind → value."""
    return dict(values) if len(values) > 1 else values["backend"]


def _sample(compiled: Programs, state: TrainState, tokenizer: Tokenizer, seed: int) -> str:
    import jax

    from xattn.model.generation import Sampling, generate
    from xattn.training.sharding import on_one_device

    tokens = generate(
        compiled.model,
        on_one_device(state.params),
        on_one_device(state.hyperparameters.model),
        [tokenizer.start],
        num_tokens=SAMPLE_TOKENS,
        sampling=Sampling(SAMPLE_TEMPERATURE),
        key=jax.random.key(seed),
    )
    return tokenizer.decode(tokens)
