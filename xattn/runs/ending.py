"""How a run ends: its result in summary.json and on the screen, a sample of text, and pictures of its attention."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xattn.data.baselines import MIN_GZIP_BYTES, gzip_bits_per_byte, unigram_bits_per_byte
from xattn.data.run_data import RunData
from xattn.data.tokenizer import IdTokenizer, Tokenizer
from xattn.errors import ExitCode
from xattn.evaluation.attention import statistics_batch
from xattn.evaluation.attention_maps import draw
from xattn.model.generation import Sampling, TrainedModel, generate
from xattn.runs import run_folder
from xattn.runs.record import Run
from xattn.runs.run_folder import result_line
from xattn.system.screen import UNPRINTABLE, printable
from xattn.training.loop import Progress, evaluate
from xattn.training.programs import Programs, TrainState
from xattn.training.sharding import on_one_device
from xattn.training.state_hash import state_sha256

SAMPLE_TOKENS = 300
SAMPLE_TEMPERATURE = 0.8


def conclude(run: Run, data: RunData, compiled: Programs, progress: Progress) -> None:
    """Record the run's result, and show it."""
    run.display.progress.stop()
    code, status = outcome(progress, steps=run.config.trainer.steps)
    results = {
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
    if status != "preempted" and run.config.trainer.attention_stats_every is not None:
        state, batch = progress.state, statistics_batch(data.held_out)
        found = compiled.attention_statistics(state.params, state.hyperparameters.model, batch)
        draw(found, _artifact(run, run_folder.ATTENTION_MAPS), step=progress.step)
    match status:
        case "done":
            _keep_sequence_losses(run, data, compiled, progress)
            show_sample(run, data.tokenizer, compiled, progress.state)
            show_result(run, data, results)
        case "preempted":
            run.display.say(f"stopped at step {progress.step} and saved; the same command continues from there")
        case "pruned":
            run.display.say(f"pruned at step {progress.step} and saved")
        case _ if progress.halted_at is not None:
            run.display.warn(
                f"diverged: the loss or gradient of update {progress.halted_at} is not finite; it was not applied"
            )
        case _:
            run.display.warn(f"diverged: the evaluation at step {progress.step} is not finite")
    run.conclude(code, results)


def outcome(progress: Progress, *, steps: int) -> tuple[ExitCode, str]:
    """Return the exit code and the status of a run that trains no further."""
    if progress.pruned:
        return ExitCode.DONE, "pruned"
    if progress.halted_at is None and progress.step < steps:
        return ExitCode.PREEMPTED, "preempted"
    if progress.halted_at is not None or progress.val_loss is None:
        return ExitCode.DIVERGED, "diverged"
    return ExitCode.DONE, "done"


def show_sample(run: Run, tokenizer: Tokenizer, compiled: Programs, state: TrainState) -> None:
    """Show a sample and keep it, if tokens are text; a task's tokens are not."""
    if isinstance(tokenizer, IdTokenizer):
        return
    sample = _sample(compiled, state, tokenizer, run.config.seed)
    run_folder.write_atomically(_artifact(run, run_folder.SAMPLE), sample)
    shown = printable(sample)
    hint = f" ({UNPRINTABLE})" if shown.count("·") > sample.count("·") else ""
    run.display.say(f"\na sample at temperature {SAMPLE_TEMPERATURE}{hint}:")
    run.display.say_sample(f"{shown}\n")


def _sample(compiled: Programs, state: TrainState, tokenizer: Tokenizer, seed: int) -> str:
    tokens = generate(
        TrainedModel(compiled.model, on_one_device(state.params), on_one_device(state.hyperparameters.model)),
        [tokenizer.start],
        num_tokens=SAMPLE_TOKENS,
        sampling=Sampling(SAMPLE_TEMPERATURE),
        key=jax.random.key(seed),
    )
    return tokenizer.decode(tokens)


def show_result(run: Run, data: RunData, results: dict[str, Any]) -> None:
    """Show the loss, and beside it baselines that need no model."""
    run.display.say(f"result      {result_line(results)}")
    scored = data.scored_bytes()
    if scored is None:
        return
    others = [f"unigrams {unigram_bits_per_byte(scored):.4f}"]
    if len(scored) >= MIN_GZIP_BYTES:
        others.append(f"gzip {gzip_bits_per_byte(scored):.4f}")
    run.display.say(f"baselines   {', '.join(others)} bits/byte on the same {len(scored):,} bytes")


def _keep_sequence_losses(run: Run, data: RunData, compiled: Programs, progress: Progress) -> None:
    """Keep each held-out sequence's loss, from which a report computes the error that the choice of sequences adds."""
    if progress.of_sequences is None:  # only the end of the run was missing
        evaluate(compiled, progress, data.held_out, data.bytes_per_token())
    assert progress.of_sequences is not None
    file = io.BytesIO()
    np.save(file, progress.of_sequences)
    run_folder.write_atomically(_artifact(run, run_folder.SEQUENCE_LOSSES), file.getvalue())


def _artifact(run: Run, name: str) -> Path:
    """Return the path of that file in the run's folder of artifacts; create the folder."""
    (run.folder / run_folder.ARTIFACTS).mkdir(exist_ok=True)
    return run.folder / run_folder.ARTIFACTS / name
