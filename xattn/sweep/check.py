"""What is wrong with a run of a sweep that its config alone does not show: told before the first run starts.

A run that has begun is left to its own start, which tells changed data from bad ones. Importing this module imports no
jax.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import xattn.config
from xattn.attempt import Job
from xattn.config import Config
from xattn.data import corpus
from xattn.device import ask_for_determinism, first_look
from xattn.errors import BadInput
from xattn.pack import choose_attention
from xattn.run_folder import read_provenance
from xattn.tracking.wandb import refuse_without_key
from xattn.training.llama import initial_weights


def check_data(jobs: Sequence[Job]) -> None:
    """Raises :class:`BadInput` where the files of a run are unusable at a glance, or wandb has no key for it.

    :class:`IntegrityError` where the weights it starts from have changed since its config was made.
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
    """Raises :class:`BadInput` where this process's devices cannot have the mesh or the attention of a run."""
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
        raise BadInput(f"of {len(jobs)} runs none is started: {error}") from error
