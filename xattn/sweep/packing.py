"""Which runs train as one program, and how many. Importing this module imports no jax."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import xattn.config
from xattn.config import Config
from xattn.errors import BadInput
from xattn.model.size import matmul_flops_per_token
from xattn.runs import run_folder
from xattn.runs.job import Job
from xattn.system.device import compute_with, first_look
from xattn.training.attention_choice import choose_attention

# The launch cost of one layer's kernels in a training step, and the arithmetic rate of a packed step of a small model.
# Fitted to 4 layers of width 128 on an H100 (S 64, B 12: 0.59 ms a step alone, 1.85 ms for 16 runs, 6.9 ms for 64).
_LAUNCH_SECONDS_PER_LAYER = 0.12e-3
_FLOPS_PER_SECOND = 38e12
_MOST = 64
_WORTH_IT = 1.5  # auto packs only for at least this factor of throughput


def take_pack(queue: deque[Job], jobs: Sequence[Job]) -> list[Job]:
    """Remove from the queue the next runs to start together, and return them. ``jobs`` are all jobs of the study.

    If the first run has trained in a pack that is still whole, return that pack in its order, including members that
    have finished and are no longer queued. Otherwise return the run and as many fresh ones as are worth packing.
    """
    first = queue.popleft()
    pack = _begun_pack(first, jobs) or [first]
    if len(pack) == 1 and _is_fresh(first) and (size := pack_size(first.config)) > 1:
        key = xattn.config.pack_key(first.config)
        like = [job for job in queue if xattn.config.pack_key(job.config) == key and _is_fresh(job)]
        pack += [job for job in like if not run_folder.is_held(job.folder)][: size - 1]
    for job in pack[:]:
        if job in queue:
            queue.remove(job)
    return pack


def _begun_pack(job: Job, jobs: Sequence[Job]) -> list[Job]:
    """Return the pack that the run trained in; empty if a member is not in the study or has left the pack since."""
    names = _names(job)
    by_folder = {other.folder.absolute(): other for other in jobs}
    folders = [job.folder.absolute().parent / name for name in names]
    if job.config.sweep.pack == "off" or not all(folder in by_folder for folder in folders):
        return []
    pack = [by_folder[folder] for folder in folders]
    return pack if all(is_finished(other) or _names(other) == names for other in pack) else []


def _names(job: Job) -> list[str]:
    """Return the folder names of the run's pack; empty if it ever trained alone or has no checkpoint."""
    origin = run_folder.read_provenance(job.folder) or {}
    alone_since = any("pack" in change for change in origin.get("resumed_with", []))
    return [] if alone_since or _is_fresh(job) else origin.get("pack") or []


def _is_fresh(job: Job) -> bool:
    """Return whether the run has no checkpoint."""
    return summary_of(job).get("committed_step") is None


def summary_of(job: Job) -> dict[str, Any]:
    """Return the run's summary; empty if it is missing or unreadable (the run will then be refused for it)."""
    return run_folder.read_or_empty(job.folder / run_folder.SUMMARY)


def is_finished(job: Job) -> bool:
    """Return whether the run has its result already. ``resume=never`` asks for a new one."""
    if job.config.resume == "never":
        return False
    return summary_of(job).get("status") in ("done", "diverged")


def pack_size(config: Config) -> int:
    """Return how many runs of this config's program to train as one.

    ``auto`` models a step of n runs on a GPU as a + n·w: the launches of one program, and the arithmetic of n runs. It
    takes the first power of two with n·w ≥ 4a, which has four fifths of the gain, but at most 64. It packs only if the
    whole gain, 1 + a/w times the throughput, is worth it. A pack that does not fit in memory is halved once its program
    is compiled (see :func:`xattn.sweep.study.start`).
    """
    one_device = all(size == 1 for size in config.parallel.axes().values())
    if config.sweep.pack == "off" or config.trainer.nonfinite == "rollback" or not one_device:
        return 1  # a run that rolls back is at another step than its pack
    try:
        compute_with(config.trainer.threads)
        first_look()
        import jax

        if config.sweep.pack == "auto" and jax.default_backend() != "gpu":
            return 1
        from xattn.backend import dispatch

        if not all(dispatch.row(choice.name).vmaps for choice in choose_attention(config, context=1).values()):
            return 1
    except BadInput:
        return 1  # reported when the run starts; the others continue
    return _paying(config) if config.sweep.pack == "auto" else config.sweep.pack


def _paying(config: Config) -> int:
    flops = matmul_flops_per_token(config.model, config.backend, vocab_size=256)
    work = 3 * flops * config.trainer.batch_size * config.backend.context_length / _FLOPS_PER_SECOND
    launches = _LAUNCH_SECONDS_PER_LAYER * config.model.num_layers
    if 1 + launches / work < _WORTH_IT:
        return 1
    return min(_MOST, 2 ** math.ceil(math.log2(max(1.0, 4 * launches / work))))
