"""What a person chooses about tracking. Importing this module imports no jax."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from xattn.section import Section


class WandbConfig(Section):
    """Weights & Biases, a mirror of metrics.jsonl.

    mode: ``auto`` is what the installed wandb would do, but ``offline`` where it has no API key; ``disabled`` never
        loads it.
    project, entity: where the runs go; entity null means the account's own.
    """

    mode: Literal["auto", "online", "offline", "disabled"]
    project: str = Field(min_length=1)
    entity: str | None


class TrackingConfig(Section):
    """The group ``tracking``."""

    wandb: WandbConfig
