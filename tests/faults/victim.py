"""Runs train.py with faults planted at named points: ``python -m tests.faults.victim POINT… -- OVERRIDES…``.

The product has no hooks for this: a point patches one function of this process. Points that kill do it by SIGKILL from
within, so that nothing is cleaned up. A point is a name and its arguments, joined by colons: ``step:7``.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def patch(
    owner: Any,
    name: str,
    *,
    before: Callable[..., Any] = lambda *args, **kwargs: None,
    after: Callable[..., Any] = lambda *args, **kwargs: None,
) -> None:
    """Lets ``before`` and ``after`` see the arguments of each call of ``owner.name``."""
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        result = original(*args, **kwargs)
        after(*args, **kwargs)
        return result

    setattr(owner, name, patched)


def _die_when(condition: Callable[..., bool], times: int = 1) -> Callable[..., None]:
    """Dies at the ``times``-th call in which the condition holds."""
    left = [times]

    def look(*args: Any, **kwargs: Any) -> None:
        if condition(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                die()

    return look


def _replace_step(change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Changes the compiled step of every program."""
    from xattn.training import programs as module

    original = module.programs

    def patched(*args: Any, **kwargs: Any) -> Any:
        compiled, now = original(*args, **kwargs)
        return compiled._replace(step=change(compiled.step)), now

    module.programs = patched  # type: ignore[assignment]


def _around_step(around: Callable[[int, Callable[[], Any]], Any]) -> None:
    """Puts ``around(update, call)`` around each call of the compiled step."""
    import numpy as np

    def change(step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(state: Any, tokens: Any) -> Any:
            return around(int(np.max(state.step)) + 1, lambda: step(state, tokens))  # of a pack: of who is furthest

        return wrapped

    _replace_step(change)


# ---- points that kill ------------------------------------------------------------------------------------------------


def kill_replace(name: str, times: str = "1") -> None:
    """Before the temporary file of that name replaces the file."""
    patch(Path, "replace", before=_die_when(lambda self, target: Path(target).name == name, int(times)))


def kill_replaced(name: str, times: str = "1") -> None:
    patch(Path, "replace", after=_die_when(lambda self, target: Path(target).name == name, int(times)))


def kill_rename(name: str, times: str = "1") -> None:
    """Before something gets that name."""
    patch(Path, "rename", before=_die_when(lambda self, target: Path(target).name == name, int(times)))


def kill_renamed(name: str, times: str = "1") -> None:
    patch(Path, "rename", after=_die_when(lambda self, target: Path(target).name == name, int(times)))


def power_cut(step: str) -> None:
    """As that step's checkpoint has its name: of metrics.jsonl there is only what was synced."""
    synced: dict[int, int] = {}  # inode → bytes

    def note(descriptor: int) -> None:
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size

    def cut(self: Path, target: Path) -> None:
        if Path(target).name == step:
            metrics = Path(target).parent.parent / "metrics.jsonl"
            os.truncate(metrics, synced.get(metrics.stat().st_ino, 0))
            die()

    patch(os, "fsync", before=note)
    patch(Path, "rename", after=cut)


def kill_locked() -> None:
    """The moment that the run folder is held."""
    from xattn.runs.run_folder import RunFolder

    patch(RunFolder, "__init__", after=_die_when(lambda *a: True))


def kill_data() -> None:
    import xattn.runs.opening

    patch(xattn.runs.opening, "load_data", before=_die_when(lambda *a, **k: True))


def kill_compile() -> None:
    """Before the first compile."""
    from xattn.training import programs

    patch(programs, "programs", before=_die_when(lambda *a, **k: True))


def kill_in_compile() -> None:
    """While XLA is at it: from another thread."""
    from jax.stages import Lowered

    def soon(*args: Any, **kwargs: Any) -> None:
        threading.Timer(0.02, die).start()

    patch(Lowered, "compile", before=soon, after=lambda *a, **k: time.sleep(60))


def kill_restored() -> None:
    from xattn.training.checkpoint import Checkpoints

    patch(Checkpoints, "restore_state", after=_die_when(lambda *a, **k: True))


def kill_step(update: str) -> None:
    """After that update, before its row."""

    def around(number: int, call: Callable[[], Any]) -> Any:
        import jax

        result = jax.block_until_ready(call())
        if number == int(update):
            die()
        return result

    _around_step(around)


def kill_log(step: str) -> None:
    from xattn.tracking.tracker import MetricsFile

    patch(MetricsFile, "log", before=_die_when(lambda self, row: row["step"] == int(step)))


def kill_torn_log(step: str) -> None:
    """With half of that step's row in the file."""
    from xattn.runs.run_folder import to_json
    from xattn.tracking.tracker import MetricsFile

    def tear(self: Any, row: Mapping[str, Any]) -> None:
        if row["step"] == int(step):
            text = to_json(row)
            self._file.write(text[: len(text) // 2])
            self._file.flush()
            die()

    patch(MetricsFile, "log", before=tear)


def kill_logged(step: str) -> None:
    from xattn.tracking.tracker import MetricsFile

    patch(MetricsFile, "log", after=_die_when(lambda self, row: row["step"] == int(step)))


def kill_evaluation(times: str = "1") -> None:
    from xattn.training import loop

    patch(loop, "held_out_loss", after=_die_when(lambda *a, **k: True, int(times)))


def kill_save(times: str = "1") -> None:
    """Inside the save: the leaves are written, the manifest is not."""
    from xattn.training import checkpoint

    patch(checkpoint, "_leaf_digests", before=_die_when(lambda tree: True, int(times)))


def kill_half_manifest() -> None:
    def half(self: Path, content: bytes) -> None:
        if self.name == "manifest.json":
            with self.open("wb") as file:
                file.write(content[: len(content) // 2])
            die()

    patch(Path, "write_bytes", before=half)


def kill_deleting() -> None:
    """While an old step is deleted: one of its files is gone, the others are there."""

    def half(path: Path, *args: Any, **kwargs: Any) -> None:
        if Path(path).name.startswith(".deleting-"):
            next(file for file in Path(path).rglob("*") if file.is_file()).unlink()
            die()

    patch(shutil, "rmtree", before=half)


def kill_sample() -> None:
    """After the last save, before the summary says that the run is done."""
    import xattn.runs.ending

    patch(xattn.runs.ending, "_sample", before=_die_when(lambda *a: True))


def kill_wandb_finish() -> None:
    from xattn.tracking.wandb import WandbMirror

    patch(WandbMirror, "finish", before=_die_when(lambda *a, **k: True))


# ---- other faults ----------------------------------------------------------------------------------------------------


def pace(milliseconds: str) -> None:
    """Each update takes so much longer, so that there is time to do something to it."""

    def around(number: int, call: Callable[[], Any]) -> Any:
        time.sleep(int(milliseconds) / 1000)
        return call()

    _around_step(around)


def slow_save(milliseconds: str) -> None:
    from xattn.training import checkpoint

    patch(checkpoint, "_leaf_digests", before=lambda tree: time.sleep(int(milliseconds) / 1000))


def slow_finish(milliseconds: str) -> None:
    import xattn.runs.ending

    patch(xattn.runs.ending, "_sample", before=lambda *a: time.sleep(int(milliseconds) / 1000))


def error(update: str) -> None:
    """An error of our own, in that update."""

    def around(number: int, call: Callable[[], Any]) -> Any:
        if number == int(update):
            raise RuntimeError("planted")
        return call()

    _around_step(around)


def error_in_data() -> None:
    """An error of our own before the folder has its config."""
    import xattn.runs.opening

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("planted")

    patch(xattn.runs.opening, "load_data", before=fail)


def limit_file_size(size: str, update: str = "0") -> None:
    """No file may grow beyond that (EFBIG), from the start or from that update on."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))

    def around(number: int, call: Callable[[], Any]) -> Any:
        if number == int(update):
            limit()
        return call()

    if update == "0":
        limit()
    else:
        _around_step(around)


def shard_bytes(size: str) -> None:
    """Every corpus is kept in the cache, in shards that are read from about so many bytes."""
    from xattn.data import corpus, documents

    corpus.IN_MEMORY_BYTES = 0
    corpus.PIECE_BYTES = documents.PIECE_BYTES = int(size)


def slow_shard(milliseconds: str) -> None:
    """Each shard of tokens takes so much longer."""
    from xattn.data import cache

    patch(cache, "_write", before=lambda *a: time.sleep(int(milliseconds) / 1000))


def first_on_path(folder: str) -> None:
    """The folder's modules come before all others, and before those that the fork server has imported."""
    sys.path.insert(0, folder)
    names = {file.stem for file in Path(folder).glob("*.py")}
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        del sys.modules[name]


def bad_batch(*updates: str) -> None:
    """The batches of these updates, in an untouched run's counting, make the loss NaN, whenever they are read."""
    import jax.numpy as jnp

    from xattn.data.batches import TrainingBatches

    read = TrainingBatches.__call__

    def marked(self: Any, step: int, *rows: slice) -> Any:
        batch = read(self, step, *rows)
        if str(step + 1) in updates:
            batch.tokens[0, 0] = 255  # no byte of UTF-8
        return batch

    TrainingBatches.__call__ = marked  # type: ignore[method-assign]
    _poison_step(lambda hyper, batch, key: jnp.any(batch.tokens == 255), "loss", "nan")


def nonfinite(what: str, value: str, *updates: str) -> None:
    """The loss, or the first leaf of the gradient, has that value in these updates: inside the compiled step."""
    import jax
    import jax.numpy as jnp

    def is_one_of_them(hyper: Any, batch: Any, key: Any) -> Any:
        base = jax.random.fold_in(jax.random.key(hyper.seed), 1)  # the step is told by its dropout key
        keys = [jax.random.key_data(jax.random.fold_in(base, int(update) - 1)) for update in updates]
        return jnp.any(jnp.stack([jnp.all(each == jax.random.key_data(key)) for each in keys]))

    _poison_step(is_one_of_them, what, value)


def _poison_step(when: Callable[[Any, Any, Any], Any], what: str, value: str) -> None:
    """``when`` is asked inside the compiled step: of its hyperparameters, batch and dropout key."""
    import jax
    import jax.numpy as jnp

    from xattn.training import programs

    original = programs.loss_and_gradient

    def poisoned(summed_loss: Any, params: Any, batch: Any, key: Any, *, parts: int) -> Any:
        loss, gradient = original(summed_loss, params, batch, key, parts=parts)
        (hyper,) = summed_loss.args
        now = when(hyper, batch, key)
        if what == "loss":
            return jnp.where(now, jnp.float32(float(value)), loss), gradient
        leaves, structure = jax.tree.flatten(gradient)
        leaves[0] = jnp.where(now, jnp.float32(float(value)), leaves[0])
        return loss, jax.tree.unflatten(structure, leaves)

    programs.loss_and_gradient = poisoned


def nonfinite_evaluation(*times: str) -> None:
    """Of these evaluations of this process the result is NaN."""
    from xattn.evaluation.loss import HeldOutLoss
    from xattn.training import loop

    original, count = loop.held_out_loss, [0]

    def patched(*args: Any, **kwargs: Any) -> HeldOutLoss:
        count[0] += 1
        result = original(*args, **kwargs)
        return result._replace(val_loss=float("nan"), val_bpb=float("nan")) if str(count[0]) in times else result

    loop.held_out_loss = patched


def ignored(name: str) -> None:
    """That signal is ignored before the process begins, as by nohup."""
    signal.signal(getattr(signal, name), signal.SIG_IGN)


def standing(name: str) -> None:
    """As submitit's: a handler that stands before ours, queues the job again, and leaves with 255."""

    def handler(number: int, frame: Any) -> None:
        Path("queued-again").touch()
        sys.exit(-1)

    signal.signal(getattr(signal, name), handler)


def no_locks() -> None:
    """As on Lustre without ``-o flock``."""
    import errno
    import fcntl

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fcntl.flock = flock  # type: ignore[assignment]


def clock_back() -> None:
    """The wall clock goes back by a day every time that somebody looks at it."""
    now, looks = time.time, [0]

    def earlier() -> float:
        looks[0] += 1
        return now() - 86400 * looks[0]

    time.time = earlier


def patience(seconds: str) -> None:
    """How long the end of a run waits for wandb."""
    from xattn.tracking import wandb

    wandb._FINISH_SECONDS = float(seconds)  # type: ignore[assignment]


# ---- mutations: the product broken on purpose, so that the checkers can be checked -----------------------------------


def mutate_rename() -> None:
    """A checkpoint gets its name first and its content later."""
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if not self.name.startswith(".tmp-"):
            return original(self, target)
        for file in sorted(file for file in self.rglob("*") if file.is_file()):
            copy = Path(target) / file.relative_to(self)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
            time.sleep(0.05)
        return Path(target)

    Path.rename = rename  # type: ignore[method-assign]


def mutate_step() -> None:
    """A run that is resumed counts on from the step before."""
    from xattn.training.loop import Progress

    def one_less(self: Any, step: int, *args: Any) -> None:
        self.step = step - 1

    patch(Progress, "restore", after=one_less)


def mutate_optimizer_state() -> None:
    """It begins anew at each resume."""
    import jax

    from xattn.training.loop import Progress

    def forget(self: Any, *args: Any) -> None:
        self.state = self.state._replace(opt_state=jax.tree.map(lambda leaf: 0 * leaf, self.state.opt_state))

    patch(Progress, "restore", after=forget)


def mutate_batch() -> None:
    """What a step reads depends on how many this process has made."""
    from xattn.data.batches import TrainingBatches

    original, first = TrainingBatches.__call__, dict[Any, int]()

    def patched(self: Any, step: int, *rows: slice) -> Any:
        return original(self, step - first.setdefault(self, step), *rows)

    TrainingBatches.__call__ = patched  # type: ignore[method-assign]


def mutate_rng() -> None:
    """The dropout of a run that is resumed is another one: its seed is shifted by the step that it goes on from."""
    from xattn.training.loop import Progress

    shift = [0]

    def restored(self: Any, step: int, *args: Any) -> None:
        shift[0] = step

    patch(Progress, "restore", after=restored)

    def seeded(state: Any, by: int) -> Any:
        hyper = state.hyperparameters
        return state._replace(hyperparameters=hyper._replace(seed=hyper.seed + by))

    def shifted(step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def call(state: Any, tokens: Any) -> Any:
            new, metrics = step(seeded(state, shift[0]), tokens)
            return seeded(new, -shift[0]), metrics

        return call

    _replace_step(shifted)


POINTS: dict[str, Callable[..., None]] = {
    "replace": kill_replace,
    "replaced": kill_replaced,
    "rename": kill_rename,
    "renamed": kill_renamed,
    "power-cut": power_cut,
    "locked": kill_locked,
    "data": kill_data,
    "compile": kill_compile,
    "in-compile": kill_in_compile,
    "restored": kill_restored,
    "step": kill_step,
    "log": kill_log,
    "torn-log": kill_torn_log,
    "logged": kill_logged,
    "evaluation": kill_evaluation,
    "save": kill_save,
    "half-manifest": kill_half_manifest,
    "deleting": kill_deleting,
    "sample": kill_sample,
    "wandb-finish": kill_wandb_finish,
    "pace": pace,
    "slow-save": slow_save,
    "slow-finish": slow_finish,
    "error": error,
    "error-in-data": error_in_data,
    "limit-file-size": limit_file_size,
    "path": first_on_path,
    "shard-bytes": shard_bytes,
    "slow-shard": slow_shard,
    "bad-batch": bad_batch,
    "nonfinite": nonfinite,
    "nonfinite-evaluation": nonfinite_evaluation,
    "ignored": ignored,
    "standing": standing,
    "no-locks": no_locks,
    "clock-back": clock_back,
    "patience": patience,
    "mutate-rename": mutate_rename,
    "mutate-step": mutate_step,
    "mutate-optimizer-state": mutate_optimizer_state,
    "mutate-batch": mutate_batch,
    "mutate-rng": mutate_rng,
}


def plant(points: Sequence[str]) -> None:
    """Plant the faults in this process."""
    for point in points:
        name, *arguments = point.split(":")
        POINTS[name](*arguments)


if __name__ == "__main__":
    separator = sys.argv.index("--")
    sys.path.insert(0, str(ROOT))
    plant(sys.argv[1:separator])
    sys.argv = [str(ROOT / "train.py"), *sys.argv[separator + 1 :]]
    runpy.run_path(sys.argv[0], run_name="__main__")
