"""The user's choices about tracking. Importing this module imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from xattn.section import EachOnce, Section

ArtifactName = Literal["checkpoint", "report"]
_Tag = Annotated[str, Field(min_length=1, max_length=64)]  # wandb's own limits


class WandbConfig(Section):
    """Weights & Biases, a mirror of metrics.jsonl.

    If project, entity, tags, notes or job_type is null, wandb's own settings apply: WANDB_PROJECT, WANDB_ENTITY,
    WANDB_TAGS, WANDB_NOTES, WANDB_JOB_TYPE and its settings files.
    """

    mode: Literal["auto", "online", "offline", "disabled"]
    """``auto`` follows the installed wandb, but is offline without an API key; ``disabled`` never loads wandb."""
    project: Annotated[str, Field(min_length=1)] | None
    """Project of the runs; null takes WANDB_PROJECT, or ``xattn``."""
    entity: str | None
    """Account or team of the runs; null takes WANDB_ENTITY, or the account's default."""
    tags: Annotated[tuple[_Tag, ...], Field(strict=False)] | None
    """Tags of the runs, [a, b]; null takes WANDB_TAGS."""
    notes: str | None
    """Notes of the runs; null takes WANDB_NOTES."""
    job_type: str | None
    """Job type of the runs; null takes WANDB_JOB_TYPE."""
    system_metrics: bool
    """Whether wandb samples the machine's CPU, memory and GPUs."""
    console: bool
    """Whether the lines of the run's log.txt are sent as wandb's console log."""
    artifacts: Annotated[tuple[ArtifactName, ...], EachOnce] = Field(strict=False)
    """``checkpoint`` uploads the best checkpoint at the end of a run, as a folder that ``xattn.load`` opens. ``report``
    uploads the folder that ``xattn report`` writes for the run's study.
    """


class TrackingConfig(Section):
    """The group ``tracking``."""

    wandb: WandbConfig
