"""The composition root: builds a run's parts from its config, hands them to the loop, and keeps its folder true.

Importing this module imports no jax; :func:`run` looks at the folder first, so that "already done" and "in use" are
answered at once.
"""

from __future__ import annotations

import dataclasses
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xattn.config
from xattn import run_folder
from xattn.config import Config
from xattn.data.baselines import gzip_bits_per_byte, scored_bytes, unigram_bits_per_byte
from xattn.data.batches import TrainingBatches, Windows, evaluation_windows
from xattn.data.corpus import Corpus, find_files, load_corpus
from xattn.errors import BadInput, ExitCode, XattnError
from xattn.run_folder import RunFolder
from xattn.tracking.display import Display
from xattn.tracking.wandb import WandbMirror, resolve_mode

if TYPE_CHECKING:
    from xattn.backend.dispatch import Choice
    from xattn.data.tokenizer import ByteTokenizer
    from xattn.model.transformer import LanguageModel, ModelHyperparameters
    from xattn.training.loop import Progress
    from xattn.training.programs import Programs

SAMPLE_TOKENS = 300
SAMPLE_TEMPERATURE = 0.8


def run(config: Config, path: Path, overrides: Sequence[str] = ()) -> ExitCode:
    """Trains the config's model in the folder ``path``, or shows the result that is there already.

    overrides: what the person typed, for overrides.yaml. Errors that a person can mend are raised as
    :class:`XattnError`; any other leaves its traceback in log.txt, a line on the screen, and ExitCode.ERROR.
    """
    folder = RunFolder(path)
    try:
        shown = _show_if_finished(config, folder)
        if shown is not None:
            return shown
        _make_room(config, folder)
        display = Display(folder / run_folder.LOG, config.trainer.steps)
        try:
            return _train(config, folder, overrides, display)
        except XattnError as error:
            display.note(f"error: {error}")
            raise
        except KeyboardInterrupt:
            _amend_summary(folder, status="preempted")
            display.say(f"interrupted; {_shown(folder.path)} keeps what there is")
            raise
        except Exception as error:  # the outermost rim around one run
            display.note(traceback.format_exc())
            _amend_summary(folder, status="failed")
            display.say(f"{type(error).__name__}: {error}".splitlines()[0])
            display.say(f"the traceback is in {_shown(folder / run_folder.LOG)}")
            return ExitCode.ERROR
        finally:
            display.close()
    finally:
        folder.release()


def _show_if_finished(config: Config, folder: RunFolder) -> ExitCode | None:
    summary = folder.summary() if folder.is_ours() else None
    if summary is None or config.resume == "never" or summary["status"] not in ("done", "diverged"):
        return None
    _refuse_other_config(config, folder)
    lines = [
        f"{summary['status']} already, at step {summary['step']}: {_result(summary)}",
        f"run folder  {_shown(folder.path)}",
        "resume=never trains it anew, and moves this folder aside",
    ]
    with (folder / run_folder.LOG).open("a", encoding="utf-8") as log:
        log.write("started again: the stored result was shown\n")
    print("\n".join(lines))
    return ExitCode.DONE if summary["status"] == "done" else ExitCode.DIVERGED


def _make_room(config: Config, folder: RunFolder) -> None:
    """Leaves the folder empty: a run that is there is moved aside, if it is of this config or resume=never says so."""
    if folder.is_empty():
        return
    if config.resume != "never":
        _refuse_other_config(config, folder)
    summary = folder.summary()
    status = "not begun" if summary is None else summary["status"]
    print(f"the earlier run here ({status}) is moved to {_shown(folder.move_aside())}")


def _refuse_other_config(config: Config, folder: RunFolder) -> None:
    there = xattn.config.load(folder / run_folder.CONFIG)
    differing = xattn.config.differences(there, config)
    if differing:
        shown = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in list(differing.items())[:3]]
        more = [f"  and {len(differing) - 3} more"] if len(differing) > 3 else []
        raise BadInput("\n".join([f"{folder.path}: holds a run of another config", *shown, *more]))


def _train(config: Config, folder: RunFolder, overrides: Sequence[str], display: Display) -> ExitCode:
    start = time.perf_counter()
    find_files(config.data)  # a path that is not there is told before jax is loaded

    from xattn.data.tokenizer import ByteTokenizer
    from xattn.tracking.tracker import MetricsFile, Tracker
    from xattn.training.checkpoint import Checkpoints
    from xattn.training.loop import Progress, train
    from xattn.training.programs import hyperparameters, num_params, programs

    _keep_compiled_programs()
    choice = _choose_attention(config)
    text = _Text.of(config)
    origin = _write_origin(config, folder, overrides, text.corpus.sha256)
    display.say(f"run folder  {_shown(folder.path)}")
    display.say(f"attention   {config.backend.activation}, computed by {choice.name}")
    for passed_over, reason in choice.passed_over.items():
        display.note(f"            not by {passed_over}: {reason}")
    mirror = _wandb_mirror(config, folder, origin["wandb_id"], display)
    metrics_file = MetricsFile(folder / run_folder.METRICS)
    trackers: list[Tracker] = [metrics_file, display, *([mirror] if mirror else [])]
    summary: dict[str, Any] = {}
    code = ExitCode.ERROR
    try:
        with display:
            tokenizer = ByteTokenizer()
            compiled, compiled_now = programs(config, tokenizer.vocab_size)
            progress = Progress(compiled.init(hyperparameters(config)))
            facts = {
                "num_params": num_params(progress.state),
                "flops_per_step": compiled.flops_per_step,
                "implementation": choice.name,
                "passed_over": choice.passed_over,
                "compile_seconds": compiled.compile_seconds if compiled_now else None,
                "peak_memory_bytes": compiled.peak_memory_bytes,
                "packed_with": 1,
            }
            size = f"{facts['num_params']:,} parameters, {len(text.corpus.train):,} bytes of training text"
            display.say(f"model       {size}")
            checkpoints = Checkpoints(folder / run_folder.CHECKPOINTS)
            try:
                train(
                    compiled,
                    progress,
                    text.batch,
                    text.windows,
                    checkpoints,
                    trackers,
                    config.trainer,
                    bytes_per_token=tokenizer.bytes_per_token,
                )
            finally:
                checkpoints.close()
        code = ExitCode.DIVERGED if progress.halted_at is not None or progress.val_loss is None else ExitCode.DONE
        summary = {"status": code.name.lower(), **_measured(progress), **facts}
        if code == ExitCode.DONE:
            _show_result(summary, text.windows, _sample(compiled, progress, tokenizer, config.seed), folder, display)
        elif progress.halted_at is not None:
            display.say(f"diverged: the loss or gradient of update {progress.halted_at} is not finite; it was not made")
        else:
            display.say(f"diverged: the evaluation at step {progress.step} is not finite")
        summary["wall_seconds"] = time.perf_counter() - start
        run_folder.write_summary(folder.path, summary)
    finally:
        metrics_file.close()
        if mirror is not None:
            mirror.finish(summary, code)
    display.say(f"run folder  {_shown(folder.path)}")
    return code


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


def _write_origin(config: Config, folder: RunFolder, overrides: Sequence[str], data_sha256: str) -> dict[str, Any]:
    """Writes what is known before the first step; config.yaml, which makes the folder a run's, comes last."""
    import jax

    from xattn.provenance import provenance

    origin = provenance(
        data_sha256=data_sha256,
        device_kind=jax.devices()[0].device_kind,
        device_count=jax.device_count(),
        process_count=jax.process_count(),
    )
    run_folder.write_atomically(folder / run_folder.OVERRIDES, xattn.config.save_overrides(overrides))
    run_folder.write_atomically(folder / run_folder.PROVENANCE, run_folder.to_json(origin, indent=2) + "\n")
    run_folder.write_summary(folder.path, {"status": "running", "step": 0, "committed_step": None})
    run_folder.write_atomically(folder / run_folder.CONFIG, xattn.config.save(config))
    return origin


def _wandb_mirror(config: Config, folder: RunFolder, run_id: str, display: Display) -> WandbMirror | None:
    mode = resolve_mode(config.tracking.wandb)
    if mode == "disabled":
        return None
    return WandbMirror(
        config.tracking.wandb,
        mode=mode,
        run_id=run_id,
        name=folder.path.name,
        group=config.study,
        values=config.model_dump(mode="json") | {"hash": xattn.config.run_hash(config)},
        folder=folder.path,
        say=display.say,
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


def _show_result(
    summary: dict[str, Any], windows: Sequence[Windows], sample: str, folder: RunFolder, display: Display
) -> None:
    scored = scored_bytes(windows)
    (folder / run_folder.ARTIFACTS).mkdir(exist_ok=True)
    run_folder.write_atomically(folder / run_folder.ARTIFACTS / "sample.txt", sample)
    display.say(f"\na sample at temperature {SAMPLE_TEMPERATURE}:\n{sample}\n")
    display.say(f"result      {_result(summary)}")
    display.say(
        f"baselines   unigram entropy {unigram_bits_per_byte(scored):.4f}, gzip {gzip_bits_per_byte(scored):.4f} "
        f"bits/byte, of the same {len(scored):,} bytes"
    )


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


def _shown(path: Path) -> str:
    """The path as a person would type it from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _measured(progress: Progress) -> dict[str, Any]:
    from xattn.training.state_hash import state_sha256

    return {
        "step": progress.step,
        "committed_step": progress.committed_step,
        "val_loss": progress.val_loss,
        "val_bpb": progress.val_bpb,
        "best_val_loss": progress.best_val_loss,
        "train_loss": progress.train_loss,
        "tokens_per_second": progress.clock.tokens_per_second,
        "state_sha256": state_sha256(progress.state.params, progress.state.opt_state),
    }


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


def _amend_summary(folder: RunFolder, *, status: str) -> None:
    summary = folder.summary()
    if summary is not None:
        run_folder.write_summary(folder.path, summary | {"status": status})


# ---- a finished run, from Python -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """What a notebook needs of a run.

    ``model.apply({"params": params}, tokens, hyperparameters)`` gives the logits of int (B, S) tokens; ``step`` is that
    of the checkpoint.
    """

    path: Path
    config: Config
    summary: dict[str, Any]
    model: LanguageModel
    params: Any
    hyperparameters: ModelHyperparameters
    tokenizer: ByteTokenizer
    step: int

    def generate(self, prompt: str, *, max_tokens: int = 200, temperature: float = 0.8, seed: int = 0) -> str:
        """Continues a prompt of at least one character; temperature 0 takes the likeliest token each time."""
        import jax
        import jax.numpy as jnp

        from xattn.model.generation import generate

        if not prompt:
            raise ValueError("prompt: at least one character is needed")
        tokens = generate(
            self.model,
            self.params,
            self.hyperparameters,
            jnp.asarray(self.tokenizer.encode(prompt)),
            num_tokens=max_tokens,
            temperature=temperature,
            key=jax.random.key(seed),
        )
        return self.tokenizer.decode(jax.device_get(tokens))


def load(path: str | Path, *, checkpoint: Literal["last", "best"] = "last") -> LoadedRun:
    """Opens a run's folder. Raises :class:`BadInput` where it is not a run's or holds no checkpoint."""
    import jax
    import jax.numpy as jnp

    from xattn.data.tokenizer import ByteTokenizer
    from xattn.model.transformer import LanguageModel
    from xattn.training.checkpoint import Checkpoints
    from xattn.training.programs import hyperparameters

    path = Path(path).absolute()
    if not (path / run_folder.CONFIG).is_file():
        raise BadInput(f"{path}: not a run folder, it holds no config.yaml")
    summary = run_folder.read_summary(path)
    if summary is None:
        raise BadInput(f"{path}: not a run folder, it holds no summary.json")
    config = xattn.config.load(path / run_folder.CONFIG)
    tokenizer = ByteTokenizer()
    model = LanguageModel(config.model, config.backend, tokenizer.vocab_size)
    hyper = hyperparameters(config).model
    tokens = jax.ShapeDtypeStruct((1, config.backend.context_length), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, hyper)["params"]
    checkpoints = Checkpoints(path / run_folder.CHECKPOINTS)
    try:
        step, params = checkpoints.restore_params(checkpoint, shapes)
    finally:
        checkpoints.close()
    return LoadedRun(path, config, summary, model, params, hyper, tokenizer, step)
