"""One attempt at a run: builds its parts from the config, hands them to the loop, and keeps the run's folder true.

Importing this module imports no jax: what can be judged without it is told before it is loaded.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import xattn.config
from xattn import run_folder
from xattn.config import Config
from xattn.data.baselines import gzip_bits_per_byte, unigram_bits_per_byte
from xattn.data.corpus import find_files
from xattn.data.run_data import RunData, load_data
from xattn.data.tokenizer import Tokenizer
from xattn.device import ask_for_determinism, hush_libraries, keep_compiled_programs
from xattn.errors import BadInput, ExitCode, IntegrityError, XattnError, storage_error
from xattn.provenance import changes, provenance
from xattn.run_folder import RunFolder, result_line, shown
from xattn.tracking.display import Display
from xattn.tracking.tracker import MetricsFile, Tracker
from xattn.tracking.wandb import WandbMirror, resolve_mode

if TYPE_CHECKING:
    from xattn.backend.dispatch import Choice
    from xattn.training.checkpoint import Checkpoints
    from xattn.training.loop import Progress
    from xattn.training.programs import Programs

SAMPLE_TOKENS = 300
SAMPLE_TEMPERATURE = 0.8
MAX_FAILURES_IN_A_ROW = 3
MAX_ROLLBACKS = 3


class Attempt:
    """One attempt at a run, in a folder that this process holds.

    before: the summary that the attempt before this one left, empty at a first start. stop: asked at each step; True
    saves and leaves.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        display: Display,
        before: dict[str, Any],
        stop: Callable[[], bool],
    ):
        self._config, self._folder, self._display, self._before, self._stop = config, folder, display, before, stop
        self._start = time.perf_counter()
        self._summary = before | {"status": "running", "step": before.get("step", 0)}
        self._summary.setdefault("committed_step", None)
        self._mirror: WandbMirror | None = None

    def carry_out(self, overrides: Sequence[str]) -> ExitCode:
        code = ExitCode.ERROR
        try:
            self._refuse_after_failures()
            # What can be judged without jax is told before it is loaded.
            resolve_mode(self._config.tracking.wandb)
            with self._as_recorded():
                find_files(self._config.data)
            code = self._train(overrides)
        except XattnError as error:
            if self._folder.is_ours():
                self._try_to_note(f"error: {error}")
            code = error.exit_code
            raise
        except Exception as error:  # the outermost rim around one run
            self._try_to_note(traceback.format_exc())
            if (full := storage_error(error, self._folder.path)) is not None:
                code = full.exit_code
                raise full from error
            self._record_failure()
            self._display.warn(f"{type(error).__name__}: {error}".splitlines()[0])
            self._display.warn(f"the traceback is in {shown(self._folder / run_folder.LOG)}")
        finally:
            if self._mirror is not None:
                self._mirror.finish(self._summary, code)
        return code

    def _train(self, overrides: Sequence[str]) -> ExitCode:
        from xattn.training.checkpoint import Checkpoints
        from xattn.training.loop import Progress, train
        from xattn.training.memory import refuse_what_does_not_fit
        from xattn.training.programs import hyperparameters, num_params, programs
        from xattn.training.sharding import layout_of

        config, folder, display = self._config, self._folder, self._display
        hush_libraries(self._try_to_note)
        if config.trainer.deterministic:
            ask_for_determinism()
        keep_compiled_programs()
        layout = layout_of(config)
        choice = _choose_attention(config)
        with self._as_recorded():
            data = load_data(
                config.data,
                context_length=config.backend.context_length,
                batch_size=config.trainer.batch_size,
                windows=config.evaluation.windows,
                seed=config.seed,
            )
        origin = self._origin(overrides, data.sha256, layout.sizes)
        display.say(f"run folder  {shown(folder.path)}")
        display.say(f"attention   {config.backend.activation}, computed by {choice.name}")
        if layout.mesh is not None:
            display.say(f"devices     {layout}")
        for passed_over, reason in choice.passed_over.items():
            display.note(f"            not by {passed_over}: {reason}")
        self._mirror = self._wandb_mirror(origin["wandb_id"])
        checkpoints = Checkpoints(
            folder / run_folder.CHECKPOINTS,
            belongs_to={
                "config": xattn.config.run_hash(config),
                "data_sha256": origin["data_sha256"],
                "versions": origin["versions"],
            },
            on_commit=self._committed,
            say=display.warn,
        )
        with display, checkpoints:
            compiled, compiled_now = programs(config, data.tokenizer.vocab_size, segments=data.has_segments)
            refuse_what_does_not_fit(compiled.peak_memory_bytes, config)
            progress = Progress(compiled.init(hyperparameters(config)))
            self._resume(progress, checkpoints)
            self._summary |= {
                "num_params": num_params(progress.state),
                "flops_per_step": compiled.flops_per_step,
                "implementation": choice.name,
                "passed_over": choice.passed_over,
                "compile_seconds": compiled.compile_seconds if compiled_now else None,
                "peak_memory_bytes": compiled.peak_memory_bytes,
                "packed_with": 1,
            }
            display.say(f"model       {self._summary['num_params']:,} parameters, {data.description}")
            metrics = MetricsFile(folder / run_folder.METRICS, after=progress.step)
            trackers: list[Tracker] = [metrics, display, *([self._mirror] if self._mirror else [])]
            bytes_per_token = data.bytes_per_token()
            while True:
                train(
                    compiled,
                    progress,
                    data.batch,
                    data.windows,
                    checkpoints,
                    trackers,
                    config.trainer,
                    bytes_per_token=bytes_per_token,
                    stop=self._stop,
                )
                if not self._rolls_back(progress, checkpoints):
                    break
                metrics.rewind(progress.step)
            metrics.close()
        return self._conclude(progress, compiled, data)

    def _try_to_note(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the disk may be what is full
            self._display.note(text)

    # ---- how it begins

    def _refuse_after_failures(self) -> None:
        failures = self._before.get("failures")
        if failures and failures["count"] >= MAX_FAILURES_IN_A_ROW and not changes(failures, provenance()):
            raise XattnError(
                f"{shown(self._folder.path)}: failed {failures['count']} times in a row at step {failures['step']}, "
                f"with this same source; see its {run_folder.LOG}. Change the source, or begin anew with resume=never"
            )

    @contextlib.contextmanager
    def _as_recorded(self) -> Iterator[None]:
        """Data that a first start would refuse are not the person's mistake where the run has begun with other data."""
        try:
            yield
        except BadInput as error:
            if self._folder.read_json(run_folder.PROVENANCE) is None:
                raise
            raise IntegrityError(f"the training data are not those that this run began with: {error}") from error

    def _origin(self, overrides: Sequence[str], data_sha256: str, mesh: dict[str, int]) -> dict[str, Any]:
        """provenance.json: written at a first start, checked and amended later. config.yaml comes first: it makes the
        folder a run's."""
        import jax

        folder = self._folder
        here = provenance() | {
            "device_kind": jax.devices()[0].device_kind,
            "device_count": jax.device_count(),
            "process_count": jax.process_count(),
            "mesh": mesh,
            "data_sha256": data_sha256,
        }
        before = folder.read_json(run_folder.PROVENANCE)
        if before is None:
            run_folder.write_atomically(folder / run_folder.CONFIG, xattn.config.save(self._config))
            run_folder.write_atomically(folder / run_folder.OVERRIDES, xattn.config.save_overrides(overrides))
            origin = here
        else:
            if before["data_sha256"] != data_sha256:
                raise IntegrityError(
                    f"the training data are not those that this run began with (sha256 {data_sha256[:12]}…, then "
                    f"{before['data_sha256'][:12]}…); bring them back, or begin anew with resume=never"
                )
            origin = before
            if changed := changes(before, here):
                self._display.warn(f"warning: changed since this run began: {', '.join(changed)}")
                again = {key: here[key] for key in (*changed, "started_at", "command")}
                origin = before | {"resumed_with": [*before.get("resumed_with", []), again]}
        if origin is not before:
            run_folder.write_atomically(folder / run_folder.PROVENANCE, run_folder.to_json(origin, indent=2) + "\n")
        run_folder.write_summary(folder.path, self._summary)
        return origin

    def _wandb_mirror(self, run_id: str) -> WandbMirror | None:
        config, folder = self._config, self._folder
        mode = resolve_mode(config.tracking.wandb)
        if mode == "disabled":
            return None
        return WandbMirror(
            config.tracking.wandb,
            mode=mode,
            run_id=run_id,
            name=folder.path.name,
            group=config.study,
            values=xattn.config.tracked_values(config),
            folder=folder.path,
            say=self._display.say,
        )

    def _resume(self, progress: Progress, checkpoints: Checkpoints) -> None:
        if steps := checkpoints.steps():  # the newest may have been renamed into place just before a kill
            self._committed(steps[-1])
        restored = checkpoints.restore_state(progress.state)
        if restored is not None:
            progress.restore(restored.step, restored.tree, restored.progress)
            self._committed(restored.step)
            self._display.say(f"resumed     from step {restored.step}")
        elif self._summary["committed_step"] is not None:
            raise IntegrityError(
                f"{checkpoints.folder}: a checkpoint of step {self._summary['committed_step']} was there and is gone; "
                "bring it back, or begin anew with resume=never"
            )

    # ---- how it goes on

    def _committed(self, step: int) -> None:
        self._summary |= {"step": step, "committed_step": step}
        run_folder.write_summary(self._folder.path, self._summary)

    def _rolls_back(self, progress: Progress, checkpoints: Checkpoints) -> bool:
        """Whether an update that is not finite is answered by going back to the last checkpoint, without its batch.

        The batches before it are seen as they were, so the result does not depend on which checkpoints there are.
        """
        halted_at = progress.halted_at
        if halted_at is None or self._config.trainer.nonfinite != "rollback":
            return False
        if len(progress.batches_left_out) >= MAX_ROLLBACKS:
            return False
        checkpoints.wait()
        restored = checkpoints.restore_state(progress.state)
        if restored is None:
            self._display.warn("no checkpoint to roll back to yet")
            return False
        left_out = [*progress.batches_left_out, progress.batch_of(halted_at)]
        progress.restore(restored.step, restored.tree, restored.progress)
        progress.batches_left_out = left_out
        self._display.warn(
            f"update {halted_at} is not finite: back to step {restored.step}, its batch is left out "
            f"({len(left_out)} of at most {MAX_ROLLBACKS} times)"
        )
        return True

    # ---- how it ends

    def _conclude(self, progress: Progress, compiled: Programs, data: RunData) -> ExitCode:
        from xattn.training.state_hash import state_sha256

        display, config = self._display, self._config
        ended = progress.halted_at is not None or progress.step == config.trainer.steps
        if not ended:
            code = ExitCode.PREEMPTED
        elif progress.halted_at is not None or progress.val_loss is None:
            code = ExitCode.DIVERGED
        else:
            code = ExitCode.DONE
        summary = self._summary | {
            "status": code.name.lower(),
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
        if ended and config.trainer.attention_stats_every is not None:
            self._draw_attention(compiled, progress, data)
        match code:
            case ExitCode.DONE:
                self._show_result(summary, data, _sample(compiled, progress, data.tokenizer, config.seed))
            case ExitCode.PREEMPTED:
                display.say(f"stopped at step {progress.step}, and saved; the same command goes on from there")
            case ExitCode.DIVERGED if progress.halted_at is not None:
                display.warn(
                    f"diverged: the loss or gradient of update {progress.halted_at} is not finite, and not made"
                )
            case _:
                display.warn(f"diverged: the evaluation at step {progress.step} is not finite")
        summary["wall_seconds"] = self._before.get("wall_seconds", 0.0) + time.perf_counter() - self._start
        run_folder.write_summary(self._folder.path, summary)
        self._summary = summary
        display.say(f"run folder  {shown(self._folder.path)}")
        return code

    def _show_result(self, summary: dict[str, Any], data: RunData, sample: str) -> None:
        artifacts = self._folder / run_folder.ARTIFACTS
        artifacts.mkdir(exist_ok=True)
        run_folder.write_atomically(artifacts / "sample.txt", sample)
        scored = data.scored_bytes()
        self._display.say(f"\na sample at temperature {SAMPLE_TEMPERATURE}:\n{_printable(sample)}\n")
        self._display.say(f"result      {result_line(summary)}")
        if scored is None:
            return
        self._display.say(
            f"baselines   unigram entropy {unigram_bits_per_byte(scored):.4f}, gzip {gzip_bits_per_byte(scored):.4f} "
            f"bits/byte, of the same {len(scored):,} bytes"
        )

    def _draw_attention(self, compiled: Programs, progress: Progress, data: RunData) -> None:
        from xattn.evaluation.attention import study_windows
        from xattn.evaluation.attention_maps import draw

        state = progress.state
        study = compiled.study(state.params, state.hyperparameters.model, study_windows(data.windows))
        (self._folder / run_folder.ARTIFACTS).mkdir(exist_ok=True)
        draw(study, self._folder / run_folder.ARTIFACTS / "attention_maps.png", step=progress.step)

    def _record_failure(self) -> None:
        """Counts failures without a new step between them; a run that fails at the same place is not tried for ever."""
        before, step = self._before.get("failures"), self._summary["step"]
        count = before["count"] + 1 if before and before["step"] >= step else 1
        same = {key: provenance()[key] for key in ("source_sha256", "versions")}
        self._summary |= {"status": "failed", "failures": {"count": count, "step": step} | same}
        if self._folder.is_ours():  # before that nothing has begun
            run_folder.write_summary(self._folder.path, self._summary)


def _choose_attention(config: Config) -> Choice:
    """What the dispatch table says to the attention of one training batch."""
    from xattn.backend import dispatch

    model, backend = config.model, config.backend
    call = dispatch.Call(
        activation=backend.activation,
        dtype=model.dtype,
        batch=config.trainer.batch_size,
        num_heads=model.num_heads,
        num_kv_heads=model.kv_heads,
        sequence=backend.context_length,
        head_dim_qk=model.head_dim,
        head_dim_v=model.head_dim,
        window=backend.window,
    )
    try:
        return dispatch.choose(call, backend.implementation)
    except ValueError as error:
        raise BadInput(f"backend.implementation: {error}") from error


def _sample(compiled: Programs, progress: Progress, tokenizer: Tokenizer, seed: int) -> str:
    import jax

    from xattn.model.generation import Sampling, generate
    from xattn.training.sharding import on_one_device

    state = progress.state
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


def _printable(text: str) -> str:
    """A byte-level model writes control characters too; a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
