"""The files of a run's checkpoints: which steps exist, which is best, and what is deleted once a run has ended.

:mod:`xattn.training.checkpoint` writes and reads their content. Importing this module imports no jax.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from xattn.errors import IntegrityError, NotKept
from xattn.runs.run_folder import read_json, to_json, write_atomically

Keep = Literal["best_and_last", "last", "parameters", "nothing"]
Which = Literal["last", "best"]
PARAMS, TRAINING = "params", "training"  # the parts of a checkpoint: what makes a model, what else a run needs
MANIFEST, SEAL = "manifest.json", "manifest.sha256"
BAD = ".bad"
DELETED = "deleted.json"  # which checkpoints were the last and the best before some were deleted, and why they were
TEMPORARY, DELETING = ".tmp-", ".deleting-"


def steps_in(folder: Path) -> list[int]:
    """Return the steps that have a folder in ``checkpoints/``, checked or not, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def by_loss(folder: Path) -> list[int]:
    """Return the steps in ``checkpoints/`` by val_loss, best first; of equal ones the later first. Steps without a
    val_loss or a readable manifest come last."""
    return sorted(steps_in(folder), key=lambda step: (_val_loss(folder / str(step)), -step))


def best_evaluated(folder: Path) -> int | None:
    """Return the step in ``checkpoints/`` with the lowest val_loss; None if no checkpoint has one."""
    return next((step for step in by_loss(folder) if math.isfinite(_val_loss(folder / str(step)))), None)


def checked_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest in a checkpoint's folder. Raises :class:`IntegrityError` if it is not as it was written."""
    try:
        text, seal = (folder / MANIFEST).read_bytes(), (folder / SEAL).read_bytes()
    except OSError as error:
        raise IntegrityError(f"{Path(error.filename or folder).name}: {error.strerror}") from error
    if sha256(text).hexdigest().encode() != seal:
        raise IntegrityError(f"{MANIFEST} was changed or damaged")
    manifest: dict[str, Any] = json.loads(text)
    if str(manifest["step"]) != folder.name:
        raise IntegrityError(f"{MANIFEST} is for step {manifest['step']}")
    return manifest


def file_digest(file: Path) -> str:
    """Return the file's SHA-256. Raises :class:`IntegrityError` if it cannot be read."""
    try:
        return sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise IntegrityError(f"{file.name}: {error.strerror}") from error


def delete(folder: Path) -> None:
    """Delete a checkpoint or a part of one. Renames it first, so a killed deletion leaves nothing that looks whole."""
    name = folder.name if folder.name.isdigit() else f"{folder.parent.name}-{folder.name}"
    checkpoints = folder.parent if folder.name.isdigit() else folder.parent.parent
    shutil.rmtree(folder.rename(checkpoints / f"{DELETING}{name}"))


def clear_half_done(folder: Path) -> None:
    """Delete the remains of interrupted saves and deletions in ``checkpoints/``, which are not checkpoints."""
    for entry in half_done(folder):
        shutil.rmtree(entry)


def half_done(folder: Path) -> list[Path]:
    """Return what :func:`clear_half_done` deletes."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [entry for entry in entries if entry.name.startswith((TEMPORARY, DELETING))]


# ---- once a run has ended --------------------------------------------------------------------------------------------


def superfluous(folder: Path, keep: Keep) -> list[Path]:
    """Return what ``keep`` does not need in the ``checkpoints/`` of a finished run: folders of steps, then of parts.

    ``best_and_last`` needs everything, ``last`` the newest checkpoint, and ``parameters`` the parameters of the newest
    and the best. For these two, only checkpoints whose files are as they were written count; without one, nothing is
    superfluous.
    """
    steps = steps_in(folder)
    if keep == "best_and_last" or not steps:
        return []
    if keep == "nothing":
        return [folder / str(step) for step in steps]
    parts = (PARAMS,) if keep == "parameters" else (PARAMS, TRAINING)
    wanted = {_first_whole(folder, reversed(steps), parts)}
    if keep == "parameters":
        wanted.add(_first_whole(folder, by_loss(folder), parts))
    if None in wanted:
        return []
    whole = [folder / str(step) for step in steps if step not in wanted]
    if keep == "parameters":
        whole += [part for step in steps if step in wanted and (part := folder / str(step) / TRAINING).is_dir()]
    return whole


def keep_only(folder: Path, keep: Keep, *, why: str) -> list[Path]:
    """Delete what is :func:`superfluous`, and return it. ``why`` is kept for :func:`refuse_what_was_deleted`.

    That record is written first, and whole steps are deleted before parts. After a kill in between, the folder still
    holds everything that ``keep`` needs, and says why the rest may be gone. The same call again finishes the deletion.
    """
    if keep == "best_and_last":
        return []
    clear_half_done(folder)
    doomed = superfluous(folder, keep)
    if doomed:
        before = read_json(folder / DELETED)
        if before is None:
            newest, best = steps_in(folder)[::-1], by_loss(folder)
            whole = {"last": _first_whole(folder, newest, (PARAMS,)), "best": _first_whole(folder, best, (PARAMS,))}
            record = {"last": whole["last"] or newest[0], "best": whole["best"] or best[0], "why": [why]}
        else:
            record = before | {"why": list(dict.fromkeys([*before["why"], why]))}
        write_atomically(folder / DELETED, to_json(record, indent=2) + "\n")
    for path in doomed:
        delete(path)
    return doomed


def refuse_what_was_deleted(folder: Path, which: Which) -> None:
    """Raise :class:`NotKept` if the last or the best checkpoint was deleted on purpose: no other may replace it."""
    record = read_json(folder / DELETED)
    if record is None or record[which] in (steps := steps_in(folder)):
        return
    other = "last" if which == "best" else "best"
    hint = (
        f"its {other} checkpoint still exists (checkpoint={other})"
        if record[other] in steps
        else ("its losses are in summary.json; to train it again, give resume=never and another trainer.keep")
    )
    raise NotKept(
        f"{folder.parent}: the parameters of its {which} checkpoint, of step {record[which]}, were deleted "
        f"({', then '.join(record['why'])}); {hint}"
    )


def _first_whole(folder: Path, steps: Iterable[int], parts: Sequence[str]) -> int | None:
    """Return the first of these steps at which the files of ``parts`` are as they were written."""
    for step in steps:
        with contextlib.suppress(IntegrityError):
            files = checked_manifest(folder / str(step))["files"]
            own = {name: digest for name, digest in files.items() if name.startswith(tuple(f"{p}/" for p in parts))}
            if all(file_digest(folder / str(step) / name) == digest for name, digest in own.items()):
                return step
    return None


def _val_loss(folder: Path) -> float:
    try:
        loss = checked_manifest(folder)["val_loss"]
    except IntegrityError:
        return math.inf
    return math.inf if loss is None else loss
