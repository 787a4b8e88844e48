"""A run's mirror in wandb: the same whether it is kept during training or rebuilt later from the run folder.

Importing this module imports neither jax nor wandb.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xattn.config
from xattn.config import Config
from xattn.runs import run_folder
from xattn.tracking.tracker import read_rows
from xattn.tracking.wandb import WandbMirror
from xattn.training.kept import MANIFEST, PARAMS, SEAL, best_evaluated

# The keys of provenance.json that a result depends on; host, command and folders stay private.
_PROVENANCE = ("git_commit", "git_dirty", "source_sha256", "registered", "versions", "data_sha256", "training_identity")


def mirror_of(
    config: Config,
    folder: Path,
    origin: Mapping[str, Any],
    *,
    say: Callable[[str], None],
    from_the_start: bool = False,
) -> WandbMirror:
    """Start the mirror of the run in ``folder``; origin is its provenance.json."""
    provenance = {key: origin[key] for key in _PROVENANCE if key in origin}
    values = config.model_dump(mode="json") | {"hash": xattn.config.run_hash(config), "provenance": provenance}
    run = {"id": origin["wandb_id"], "group": config.study, "config": values}
    return WandbMirror(config.tracking.wandb, folder, run, say=say, from_the_start=from_the_start)


def send_rows(mirror: WandbMirror, config: Config, folder: Path) -> None:
    """Send every whole row of the run's metrics.jsonl; ``tokens`` is added to rows of older versions."""
    tokens_per_step = config.trainer.batch_size * config.backend.context_length
    for step, line in read_rows(folder / run_folder.METRICS).lines.items():
        mirror.log({"tokens": step * tokens_per_step} | json.loads(line))


def end_mirror(
    mirror: WandbMirror, config: Config, summary: Mapping[str, Any], exit_code: int, *, for_ever: bool = False
) -> None:
    """End the mirror with the summary and, if tracking.wandb.artifacts asks, the best checkpoint of a finished run."""
    wanted = "checkpoint" in config.tracking.wandb.artifacts and summary["status"] == "done"
    files = _best_checkpoint(mirror.folder) if wanted else {}
    if wanted and not files:
        mirror.say("wandb: no evaluated checkpoint is left to upload")
    mirror.finish(summary, exit_code, model=files, for_ever=for_ever)


def _best_checkpoint(folder: Path) -> dict[str, Path]:
    """Return name → file for what :func:`xattn.load` needs to load the best parameters, and nothing more."""
    checkpoints = folder / run_folder.CHECKPOINTS
    best = best_evaluated(checkpoints)
    if best is None:
        return {}
    checkpoint = checkpoints / str(best)
    names = (run_folder.CONFIG, run_folder.PROVENANCE, run_folder.SUMMARY, run_folder.TOKENIZER)
    files = [*(folder / name for name in names), checkpoint / MANIFEST, checkpoint / SEAL]
    files += sorted((checkpoint / PARAMS).rglob("*"))
    return {str(file.relative_to(folder)): file for file in files if file.is_file()}
