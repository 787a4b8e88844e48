"""The files of a run's checkpoints: which steps there are, which is best, and how one is deleted.

:mod:`xattn.training.checkpoint` writes and reads what is in them. Importing this module imports no jax.
"""

from __future__ import annotations

import json
import math
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from xattn.errors import IntegrityError

PARAMS, TRAINING = "params", "training"  # the parts of a checkpoint: what a model is, what a run needs besides
MANIFEST, SEAL = "manifest.json", "manifest.sha256"
BAD = ".bad"
TEMPORARY, DELETING = ".tmp-", ".deleting-"


def steps_in(folder: Path) -> list[int]:
    """The steps that have a folder in ``checkpoints/``, checked or not, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def by_loss(folder: Path) -> list[int]:
    """The steps in ``checkpoints/``, the best first: by val_loss, of equal ones the later first. Steps without a
    val_loss or a readable manifest come last."""
    return sorted(steps_in(folder), key=lambda step: (_val_loss(folder / str(step)), -step))


def best_evaluated(folder: Path) -> int | None:
    """The step in ``checkpoints/`` with the lowest val_loss; None where no checkpoint has one."""
    for step in by_loss(folder)[:1]:
        return step if math.isfinite(_val_loss(folder / str(step))) else None
    return None


def checked_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder. Raises :class:`IntegrityError` where it is not as it was written."""
    try:
        text, seal = (folder / MANIFEST).read_bytes(), (folder / SEAL).read_bytes()
    except OSError as error:
        raise IntegrityError(f"{Path(error.filename or folder).name}: {error.strerror}") from error
    if sha256(text).hexdigest().encode() != seal:
        raise IntegrityError(f"{MANIFEST} is not as it was written")
    manifest: dict[str, Any] = json.loads(text)
    if str(manifest["step"]) != folder.name:
        raise IntegrityError(f"{MANIFEST} is of step {manifest['step']}")
    return manifest


def delete(folder: Path) -> None:
    """Deletes a checkpoint. It is renamed first: a deletion cut short leaves nothing that looks like a step."""
    shutil.rmtree(folder.rename(folder.with_name(f"{DELETING}{folder.name}")))


def clear_half_done(folder: Path) -> None:
    """Deletes what a save or a deletion that was cut short has left in ``checkpoints/``: that was never, or is no
    longer, a checkpoint."""
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.startswith((TEMPORARY, DELETING)):
                shutil.rmtree(entry)


def _val_loss(folder: Path) -> float:
    try:
        loss = checked_manifest(folder)["val_loss"]
    except IntegrityError:
        return math.inf
    return math.inf if loss is None else loss
