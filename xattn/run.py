"""The composition root: builds a run's parts from its config, hands them to the loop, and keeps its folder true.

Importing this module imports no jax; :func:`run` looks at the folder first, so that "already done" and "in use" are
answered at once.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xattn.config
from xattn import run_folder
from xattn.config import Config
from xattn.data.baselines import gzip_bits_per_byte, scored_bytes, unigram_bits_per_byte
from xattn.data.batches import TrainingBatches, Windows, evaluation_windows
from xattn.data.corpus import Corpus, find_files, load_corpus
from xattn.data.tokenizer import ByteTokenizer
from xattn.errors import BadInput, ExitCode, IntegrityError, XattnError, storage_error
from xattn.provenance import changes, provenance
from xattn.run_folder import RunFolder
from xattn.signals import Interruption, interruption
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


def run(config: Config, path: Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> ExitCode:
    """Trains the config's model in the folder ``path``: begins, goes on with, or shows what is there already.

    overrides: what the person typed, for overrides.yaml. quiet: on the screen only what went wrong. Errors that a
    person can mend are raised as :class:`XattnError`; any other leaves its traceback in log.txt, a line on the screen,
    and ExitCode.ERROR.
    """
    folder = RunFolder(path)
    try:
        with interruption() as asked:
            summary = _look(config, folder)
            if summary is not None and summary["status"] in ("done", "diverged"):
                return _show(summary, folder, quiet=quiet)
            display = Display(folder / run_folder.LOG, config.trainer.steps, quiet=quiet)
            try:
                return _Run(config, folder, display, asked, summary or {}).carry_out(overrides)
            finally:
                display.close()
    except BadInput:
        if not folder.is_ours() and folder.path.name == xattn.config.run_name(config):
            folder.withdraw()  # we named it, and no run has begun in it
        raise
    finally:
        folder.release()


def _look(config: Config, folder: RunFolder) -> dict[str, Any] | None:
    """The summary of the run that is in the folder, None where none has begun. ``resume=never`` moves it aside."""
    if not folder.is_ours():
        return None
    if config.resume == "never":
        status = (folder.summary() or {"status": "not begun"})["status"]
        print(f"the earlier run here ({status}) is moved to {_shown(folder.move_aside())}")
        return None
    differing = xattn.config.differences(xattn.config.load(folder / run_folder.CONFIG), config)
    if differing:
        shown = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in list(differing.items())[:3]]
        more = [f"  and {len(differing) - 3} more"] if len(differing) > 3 else []
        raise BadInput("\n".join([f"{folder.path}: holds a run of another config", *shown, *more]))
    return folder.summary()


def _show(summary: dict[str, Any], folder: RunFolder, *, quiet: bool) -> ExitCode:
    changed = changes(folder.read_json(run_folder.PROVENANCE), provenance())
    since = f" (since then changed: {', '.join(changed)})" if changed else ""
    if not quiet:
        print(f"{summary['status']} already, at step {summary['step']}: {_result(summary)}{since}")
        print(f"run folder  {_shown(folder.path)}")
        print("resume=never trains it anew, and moves this folder aside")
    with (folder / run_folder.LOG).open("a", encoding="utf-8") as log:
        log.write("started again: the stored result was shown\n")
    return ExitCode.DONE if summary["status"] == "done" else ExitCode.DIVERGED


class _Run:
    """One attempt at a run, in a folder that this process holds.

    before: the summary that the attempt before this one left, empty at a first start.
    """

    def __init__(
        self, config: Config, folder: RunFolder, display: Display, asked: Interruption, before: dict[str, Any]
    ):
        self._config, self._folder, self._display, self._asked, self._before = config, folder, display, asked, before
        self._start = time.perf_counter()
        self._summary = before | {"status": "running", "step": before.get("step", 0)}
        self._summary.setdefault("committed_step", None)
        self._mirror: WandbMirror | None = None

    def carry_out(self, overrides: Sequence[str]) -> ExitCode:
        code = ExitCode.ERROR
        try:
            self._refuse_after_failures()
            # What can be judged without jax is told before it is loaded.
            find_files(self._config.data)
            resolve_mode(self._config.tracking.wandb)
            code = self._train(overrides)
        except XattnError as error:
            if self._folder.is_ours():
                self._display.note(f"error: {error}")
            code = error.exit_code
            raise
        except Exception as error:  # the outermost rim around one run
            self._display.note(traceback.format_exc())
            if (full := storage_error(error, self._folder.path)) is not None:
                code = full.exit_code
                raise full from error
            self._record_failure()
            self._display.warn(f"{type(error).__name__}: {error}".splitlines()[0])
            self._display.warn(f"the traceback is in {_shown(self._folder / run_folder.LOG)}")
        finally:
            if self._mirror is not None:
                self._mirror.finish(self._summary, code)
        return code

    def _train(self, overrides: Sequence[str]) -> ExitCode:
        from xattn.training.checkpoint import Checkpoints
        from xattn.training.loop import Progress, train
        from xattn.training.programs import hyperparameters, num_params, programs

        config, folder, display = self._config, self._folder, self._display
        if config.trainer.deterministic:
            _ask_for_determinism()
        _keep_compiled_programs()
        choice = _choose_attention(config)
        text = _Text.of(config)
        origin = self._origin(overrides, text.corpus.sha256)
        display.say(f"run folder  {_shown(folder.path)}")
        display.say(f"attention   {config.backend.activation}, computed by {choice.name}")
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
            tokenizer = ByteTokenizer()
            compiled, compiled_now = programs(config, tokenizer.vocab_size)
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
            size = f"{self._summary['num_params']:,} parameters, {len(text.corpus.train):,} bytes of training text"
            display.say(f"model       {size}")
            metrics = MetricsFile(folder / run_folder.METRICS, after=progress.step)
            trackers: list[Tracker] = [metrics, display, *([self._mirror] if self._mirror else [])]
            while True:
                train(
                    compiled,
                    progress,
                    text.batch,
                    text.windows,
                    checkpoints,
                    trackers,
                    config.trainer,
                    bytes_per_token=tokenizer.bytes_per_token,
                    stop=lambda: self._asked.requested,
                )
                if not self._rolls_back(progress, checkpoints):
                    break
                metrics.rewind(progress.step)
            metrics.close()
        return self._conclude(progress, compiled, tokenizer, text)

    # ---- how it begins

    def _refuse_after_failures(self) -> None:
        failures = self._before.get("failures")
        if failures and failures["count"] >= MAX_FAILURES_IN_A_ROW and not changes(failures, provenance()):
            raise XattnError(
                f"{_shown(self._folder.path)}: failed {failures['count']} times in a row at step {failures['step']}, "
                f"with this same source; see its {run_folder.LOG}. Change the source, or begin anew with resume=never"
            )

    def _origin(self, overrides: Sequence[str], data_sha256: str) -> dict[str, Any]:
        """provenance.json: written at a first start, checked and amended later. config.yaml comes first: it makes the
        folder a run's."""
        import jax

        folder = self._folder
        here = provenance() | {
            "device_kind": jax.devices()[0].device_kind,
            "device_count": jax.device_count(),
            "process_count": jax.process_count(),
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
        restored = checkpoints.restore_state(progress.state)
        if restored is not None:
            progress.restore(restored.step, restored.tree, restored.progress)
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
        """Whether an update that is not finite is answered by going back to the last checkpoint, past its batch."""
        halted_at = progress.halted_at
        if halted_at is None or self._config.trainer.nonfinite != "rollback" or progress.rollbacks >= MAX_ROLLBACKS:
            return False
        checkpoints.wait()
        restored = checkpoints.restore_state(progress.state)
        if restored is None:
            self._display.warn("no checkpoint to roll back to yet")
            return False
        rollbacks, left_out = progress.rollbacks + 1, progress.batches_left_out + halted_at - restored.step
        progress.restore(restored.step, restored.tree, restored.progress)
        progress.rollbacks, progress.batches_left_out = rollbacks, left_out
        self._display.warn(
            f"update {halted_at} is not finite: back to step {restored.step}, past the batches up to it "
            f"({rollbacks} of at most {MAX_ROLLBACKS} times)"
        )
        return True

    # ---- how it ends

    def _conclude(self, progress: Progress, compiled: Programs, tokenizer: ByteTokenizer, text: _Text) -> ExitCode:
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
            "tokens_per_second": progress.clock.tokens_per_second,
            "state_sha256": state_sha256(progress.state.params, progress.state.opt_state),
        }
        summary.pop("failures", None)
        match code:
            case ExitCode.DONE:
                self._show_result(summary, text.windows, _sample(compiled, progress, tokenizer, config.seed))
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
        display.say(f"run folder  {_shown(self._folder.path)}")
        return code

    def _show_result(self, summary: dict[str, Any], windows: Sequence[Windows], sample: str) -> None:
        artifacts = self._folder / run_folder.ARTIFACTS
        artifacts.mkdir(exist_ok=True)
        run_folder.write_atomically(artifacts / "sample.txt", sample)
        scored = scored_bytes(windows)
        self._display.say(f"\na sample at temperature {SAMPLE_TEMPERATURE}:\n{_printable(sample)}\n")
        self._display.say(f"result      {_result(summary)}")
        self._display.say(
            f"baselines   unigram entropy {unigram_bits_per_byte(scored):.4f}, gzip {gzip_bits_per_byte(scored):.4f} "
            f"bits/byte, of the same {len(scored):,} bytes"
        )

    def _record_failure(self) -> None:
        """Counts failures without a new step between them; a run that fails at the same place is not tried for ever."""
        before, step = self._before.get("failures"), self._summary["step"]
        count = before["count"] + 1 if before and before["step"] >= step else 1
        same = {key: provenance()[key] for key in ("source_sha256", "versions")}
        self._summary |= {"status": "failed", "failures": {"count": count, "step": step} | same}
        run_folder.write_summary(self._folder.path, self._summary)


@dataclasses.dataclass(frozen=True)
class _Text:
    """The run's data: what it trains on, and what it is evaluated on."""

    corpus: Corpus
    batch: TrainingBatches
    windows: list[Windows]

    @classmethod
    def of(cls, config: Config) -> _Text:
        context_length, batch_size = config.backend.context_length, config.trainer.batch_size
        corpus = load_corpus(config.data, context_length)
        return cls(
            corpus,
            TrainingBatches(corpus.train, context_length=context_length, batch_size=batch_size, seed=config.seed),
            evaluation_windows(
                corpus.validation,
                context_length=context_length,
                batch_size=batch_size,
                windows=config.evaluation.windows,
            ),
        )


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


def _ask_for_determinism() -> None:
    """XLA reads its flags when a device is first used: later it is too late, which only a GPU minds."""
    too_late = "jax" in sys.modules
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_gpu_deterministic_ops" in flags:
        return
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    import jax

    if too_late and jax.default_backend() != "cpu":
        raise BadInput("trainer.deterministic = True: this process has used the GPU without it; start it by itself")


def _keep_compiled_programs() -> None:
    """Lets processes share compiled programs through the user's cache folder, or does nothing where that is closed."""
    import jax

    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = Path(base) / "xattn" / "programs"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(cache, os.W_OK) or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _sample(compiled: Programs, progress: Progress, tokenizer: ByteTokenizer, seed: int) -> str:
    import jax
    import jax.numpy as jnp

    from xattn.model.generation import generate

    state = progress.state
    tokens = generate(
        compiled.model,
        state.params,
        state.hyperparameters.model,
        jnp.asarray(tokenizer.encode("\n")),
        num_tokens=SAMPLE_TOKENS,
        temperature=SAMPLE_TEMPERATURE,
        key=jax.random.key(seed),
    )
    return tokenizer.decode(jax.device_get(tokens))


def _result(summary: dict[str, Any]) -> str:
    if summary["val_loss"] is None:
        return "no finite val_loss"
    return f"val_loss {summary['val_loss']:.4f} nats/token = {summary['val_bpb']:.4f} bits/byte"


def _printable(text: str) -> str:
    """A byte-level model writes control characters too; a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _shown(path: Path) -> str:
    """The path as a person would type it from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
