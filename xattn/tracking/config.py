"""What a person chooses about tracking. Importing this module imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from xattn.section import Section

ArtifactName = Literal["checkpoint", "report"]
_Tag = Annotated[str, Field(min_length=1, max_length=64)]  # wandb's own limits
_Tags = Annotated[tuple[_Tag, ...], Field(strict=False)]


class WandbConfig(Section):
    """Weights & Biases, a mirror of metrics.jsonl.

    mode: ``auto`` is what the installed wandb would do, but ``offline`` where it has no API key; ``disabled`` never
        loads it.
    project, entity, tags, notes, job_type: where the runs go and how they are labelled. Where one is null, wandb's own
        settings count: WANDB_PROJECT, WANDB_ENTITY, WANDB_TAGS, WANDB_NOTES, WANDB_JOB_TYPE and its settings files.
        Without these the project is ``xattn`` and the entity the account's own.
    system_metrics: whether wandb samples the machine's CPU, memory and GPUs.
    console: whether the lines of the run's log.txt are sent as wandb's console log.
    artifacts: ``checkpoint`` uploads the best checkpoint at the end of a run, as a folder that ``xattn.load`` opens;
        ``report`` uploads the folder that ``xattn report`` writes for the run's study.
    """

    mode: Literal["auto", "online", "offline", "disabled"]
    project: Annotated[str, Field(min_length=1)] | None
    entity: str | None
    tags: _Tags | None
    notes: str | None
    job_type: str | None
    system_metrics: bool
    console: bool
    artifacts: tuple[ArtifactName, ...] = Field(strict=False)

    @field_validator("artifacts")
    @classmethod
    def _each_once(cls, artifacts: tuple[ArtifactName, ...]) -> tuple[ArtifactName, ...]:
        return tuple(sorted(set(artifacts)))


class TrackingConfig(Section):
    """The group ``tracking``."""

    wandb: WandbConfig
