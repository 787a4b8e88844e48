"""Checks before the first run of a sweep starts, for what a run's config alone does not show.

A run that has already begun is skipped here: its own start can distinguish changed data from bad data. Importing this
module imports no jax.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import xattn.config
from xattn.config import Config
from xattn.data import corpus
from xattn.errors import BadInput
from xattn.runs.job import Job
from xattn.runs.run_folder import read_provenance
from xattn.system.device import ask_for_determinism, first_look
from xattn.system.screen import counted
from xattn.tracking.wandb import refuse_without_key
from xattn.training.attention_choice import choose_attention
from xattn.training.llama import initial_weights


def check_data(jobs: Sequence[Job]) -> None:
    """Raise :class:`BadInput` if the files of a run are unusable at a glance, or if wandb has no key for it.

    Raise :class:`IntegrityError` if the weights that a run starts from have changed since its config was made.
    """
    configs = _fresh(jobs)
    with _none_is_started(jobs):
        for config in {config.data.model_dump_json(): config for config in configs}.values():
            corpus.check(config.data)
        for config in {config.tracking.wandb.model_dump_json(): config for config in configs}.values():
            refuse_without_key(config.tracking.wandb)
        for config in {f"{config.model}{config.backend}": config for config in configs}.values():
            initial_weights(config)


def check_devices(jobs: Sequence[Job]) -> None:
    """Raise :class:`BadInput` if this process's devices cannot provide the mesh or the attention of a run."""
    configs = _fresh(jobs)
    if not configs:
        return
    with _none_is_started(jobs):
        if any(config.trainer.deterministic for config in configs):
            ask_for_determinism()  # before the first look at a device
        first_look()
        from xattn.training.sharding import layout_of

        for config in {xattn.config.pack_key(config): config for config in configs}.values():
            sizes = layout_of(config).sizes
            choose_attention(config, context=sizes["context"], devices=math.prod(sizes.values()))


def _fresh(jobs: Sequence[Job]) -> list[Config]:
    return [job.config for job in jobs if job.config.resume == "never" or read_provenance(job.folder) is None]


@contextlib.contextmanager
def _none_is_started(jobs: Sequence[Job]) -> Iterator[None]:
    try:
        yield
    except BadInput as error:
        raise BadInput(f"nothing was started ({counted(len(jobs), 'run')}): {error}") from error
