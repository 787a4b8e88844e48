"""Checkpoints that are known to be whole: written by orbax, sealed by a manifest, and trusted only after a check.

``checkpoints/<step>/`` holds ``params/`` (what makes a model), ``training/`` (what else a run needs), ``manifest.json``
and ``manifest.sha256``. The manifest has the SHA-256 of every file, the dtype, shape and SHA-256 of every leaf, and
what the checkpoint belongs to. Everything is written under a temporary name and renamed at the end, so a step exists
whole or not at all. orbax alone silently restores a flipped bit, silently casts dtypes, and takes an empty folder for a
step; the manifest catches these.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import keystr, tree_leaves_with_path

from xattn.errors import IntegrityError, storage_error
from xattn.runs.run_folder import fsync
from xattn.system.hosts import team
from xattn.training import kept
from xattn.training.kept import BAD, MANIFEST, PARAMS, SEAL, TEMPORARY, TRAINING, Which, checked_manifest, file_digest
from xattn.training.programs import TrainState
from xattn.training.sharding import from_first, like, to_host

KEPT = 2  # newest checkpoints to keep, besides the best
_NUMBERS = "hyperparameters"  # the field of TrainState to which later versions add leaves


class Restored(NamedTuple):
    """A checkpoint that passed the check."""

    step: int
    tree: Any
    """The part that was asked for."""
    progress: dict[str, Any]
    """What the run saved with it."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: ``checkpoints/`` of the run folder.
        belongs_to: Identity of the run (config, data, versions), written into each manifest.
        before_commit: Called in the saving thread before a checkpoint gets its final name.
        on_commit: Called in the saving thread with each step whose checkpoint is committed.
        say: Called with a message about each broken checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        *,
        belongs_to: Mapping[str, Any] | None = None,
        before_commit: Callable[[], None] = lambda: None,
        on_commit: Callable[[int], None] = lambda step: None,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.folder = folder
        self._belongs_to = dict(belongs_to or {})
        self._before_commit = before_commit
        self._on_commit = on_commit
        self._say = say
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        alone = ocp.options.MultiprocessingOptions(  # only the first process reads and writes
            primary_host=team().index, active_processes={team().index}, barrier_sync_key_prefix=f"process{team().index}"
        )
        self._orbax = ocp.Checkpointer(
            ocp.StandardCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
        )

    # ---- saving

    def save(self, step: int, state: TrainState, progress: Mapping[str, Any], *, val_loss: float | None) -> None:
        """Copy the state to the host and write it in a thread. Waits first for the previous save.

        progress: JSON values that are restored with the checkpoint. val_loss: of these parameters; None if it was not
        measured or is not finite, and then they are never the best. All processes must call this; only the first one
        writes. Raises :class:`StorageError` if the previous save ran out of space.
        """
        self.wait()
        host: TrainState = to_host(state)
        if not team().is_first:
            return
        parts = {
            PARAMS: host.params,
            TRAINING: {name: value for name, value in host._asdict().items() if name != "params"},
        }
        self._saving = self._worker.submit(self._write, step, parts, dict(progress), val_loss)

    def wait(self) -> None:
        """Wait for the save under way. Raises what it raised."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Wait for the save under way. Raises what it raised."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._orbax.close()

    def _write(self, step: int, parts: dict[str, Any], progress: dict[str, Any], val_loss: float | None) -> None:
        final, temporary = self.folder / str(step), self.folder / f"{TEMPORARY}{step}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            for name, tree in parts.items():
                self._orbax.save(temporary / name, args=ocp.args.StandardSave(tree))
            manifest = {
                "step": step,
                "progress": progress,
                "val_loss": val_loss,
                "belongs_to": self._belongs_to,
                "leaves": {name: _leaf_digests(tree) for name, tree in parts.items()},
                "files": {
                    str(file.relative_to(temporary)): file_digest(file)
                    for file in sorted(temporary.rglob("*"))
                    if file.is_file()
                },
            }
            text = json.dumps(manifest, indent=1, allow_nan=False).encode()
            (temporary / MANIFEST).write_bytes(text)
            (temporary / SEAL).write_bytes(sha256(text).hexdigest().encode())
            for path in [*temporary.rglob("*"), temporary]:  # folders too, at every depth: they hold the names
                fsync(path)
            self._before_commit()
            if final.exists():  # the run resumed from an older step and reached this one again
                kept.delete(final)
            temporary.rename(final)
            fsync(self.folder)
        except Exception as error:  # orbax wraps file system errors in errors of many kinds
            raise storage_error(error, final) or error from error
        self._on_commit(step)
        for old in set(self.steps()[:-KEPT]) - {*kept.by_loss(self.folder)[:1]}:
            kept.delete(self.folder / str(old))

    # ---- restoring

    def steps(self) -> list[int]:
        """Return the steps that have a folder, checked or not, ascending."""
        return kept.steps_in(self.folder)

    def restore_state(self, shapes: TrainState, *, at_most: int | None = None) -> Restored | None:
        """Return the newest :class:`TrainState` that passes the check, up to step ``at_most``; None if there are no
        steps.

        Leaves are placed on the devices like those of ``shapes``, wherever they were when saved. Hyperparameters that
        an older version did not have are taken from ``shapes``. All processes must call this; only the first one reads.
        Steps that fail are reported and moved to ``checkpoints/.bad/``. Raises :class:`IntegrityError` if all fail.
        """
        with team().in_step():
            found = self._newest_whole(shapes, at_most) if team().is_first else None
        known = team().from_first(found and (found.step, found.progress))
        if known is None:
            return None
        step, progress = known
        return Restored(step, like(from_first(found and found.tree, shapes), shapes), progress)

    def _newest_whole(self, shapes: TrainState, at_most: int | None) -> Restored | None:
        """Return the newest intact checkpoint, as a tree of host arrays."""
        kept.clear_half_done(self.folder)
        steps = [step for step in self.steps() if at_most is None or step <= at_most]
        for step in reversed(steps):
            try:
                params, progress = self._read(step, PARAMS, shapes.params)
                rest = {name: value for name, value in shapes._asdict().items() if name != "params"}
                training, _ = self._read(step, TRAINING, rest)
            except IntegrityError as error:
                self._say(f"checkpoint {step} is broken ({error}); moved to {self._move_aside(step)}")
                continue
            return Restored(step, TrainState(params=params, **training), progress)
        if steps:
            raise IntegrityError(f"{self.folder}: none of the checkpoints {steps} is intact")
        return None

    def set_back(self, step: int) -> None:
        """Move later steps to ``checkpoints/.bad/``: the run continues from this step and reaches them again."""
        for later in self.steps():
            if later > step:
                self._move_aside(later)

    def restore_params(self, which: Which, shapes: Any) -> Restored:
        """Return the parameters of the newest intact checkpoint, or of the intact one with the lowest val_loss.

        Nothing is moved: reading a run leaves it as it is. Raises :class:`IntegrityError` if there is none, and
        :class:`NotKept` if it was deleted on purpose.
        """
        kept.refuse_what_was_deleted(self.folder, which)
        order = reversed(self.steps()) if which == "last" else iter(kept.by_loss(self.folder))
        for step in order:
            try:
                params, progress = self._read(step, PARAMS, shapes)
            except IntegrityError as error:
                self._say(f"checkpoint {step} is broken ({error}); trying the next one")
                continue
            return Restored(step, jax.device_put(params), progress)
        raise IntegrityError(f"{self.folder}: holds no intact checkpoint")

    def _read(self, step: int, part: str, shapes: Any) -> tuple[Any, dict[str, Any]]:
        folder = self.folder / str(step)
        manifest = checked_manifest(folder)
        # Check shapes and dtypes first, then the files, and last the leaves that orbax restores from them.
        expected = {keystr(path): (str(leaf.dtype), list(leaf.shape)) for path, leaf in tree_leaves_with_path(shapes)}
        there = {name: (leaf["dtype"], leaf["shape"]) for name, leaf in manifest["leaves"][part].items()}
        new = {name for name in expected.keys() - there.keys() if name.startswith(f"['{_NUMBERS}']")}
        if odd := sorted(
            name for name in expected.keys() | there.keys() if name not in new and expected.get(name) != there.get(name)
        ):
            raise IntegrityError(f"{part} do not fit this model, for example {odd[0]}")
        for name, digest in manifest["files"].items():
            if name.startswith(f"{part}/") and file_digest(folder / name) != digest:
                raise IntegrityError(f"{name} was changed or damaged")
        tree = _restored(self._orbax, folder / part, shapes, new)
        if {name: leaf for name, leaf in _leaf_digests(tree).items() if name not in new} != manifest["leaves"][part]:
            raise IntegrityError(f"the restored {part} differ from what was saved")
        return tree, manifest["progress"]

    def _move_aside(self, step: int) -> Path:
        target = self.folder / BAD / f"{step}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
        target.parent.mkdir(exist_ok=True)
        return (self.folder / str(step)).rename(target)


def _restored(orbax: ocp.Checkpointer, folder: Path, shapes: Any, new: set[str]) -> Any:
    """Return the tree in a folder as NumPy arrays; it lacks the hyperparameters ``new``, which come from shapes."""
    targets = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    if not new:
        return orbax.restore(folder, args=ocp.args.StandardRestore(targets))

    def keys(path: tuple[Any, ...]) -> tuple[str, ...]:
        return tuple(str(key.name if isinstance(key, jax.tree_util.GetAttrKey) else key.key) for key in path)

    numbers = {_NUMBERS: shapes[_NUMBERS]}
    known = [
        (keys(path), np.empty(leaf.shape, leaf.dtype))
        for path, leaf in tree_leaves_with_path(numbers)
        if keystr(path) not in new
    ]
    targets |= unflatten_dict(dict(known))  # orbax saves a NamedTuple under the names of its fields
    tree = orbax.restore(folder, args=ocp.args.StandardRestore(targets))
    found = flatten_dict({_NUMBERS: tree[_NUMBERS]})
    whole = jax.tree_util.tree_map_with_path(
        lambda path, leaf: found[keys(path)] if keys(path) in found else np.asarray(leaf), numbers
    )
    return tree | whole


def _leaf_digests(tree: Any) -> dict[str, dict[str, Any]]:
    digests = {}
    for path, leaf in tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        content = sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        digests[keystr(path)] = {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": content}
    return digests
