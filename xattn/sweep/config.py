"""What a person chooses about how a sweep runs. Importing this module imports no jax."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from xattn.section import Section


class SweepConfig(Section):
    """The group ``sweep``. It changes how fast runs are made and nothing of what they compute."""

    pack: Literal["auto", "off"] | PositiveInt
    """Number of runs, differing in numbers alone, that train as one program; ``auto`` packs small models on a GPU,
    never on a CPU.
    """
    workers: Literal["auto"] | PositiveInt
    """Number of processes that share the runs of ``-m``; ``auto`` is one per GPU. Without GPUs it is one per core,
    pinned to it, if ``trainer.threads`` is 1, and otherwise a single one.
    """
    half_width: PositiveFloat | None
    """Seeds are added until each arm's difference to the baseline is known to ± this, in the metric's unit; null makes
    the seeds that were typed.
    """
    budget_minutes: PositiveFloat | None
    """With half_width: after the first seeds, no seed begins that would end later than this many minutes after the
    command; null sets no limit.
    """
    pilot_seeds: Annotated[int, Field(ge=4)] | None
    """With half_width: the first seeds, whose spread says how many are needed; null means 8, and more for several arms.
    """

    @model_validator(mode="after")
    def _is_of_seeds_on_demand(self) -> SweepConfig:
        if self.half_width is None and not (self.budget_minutes is None and self.pilot_seeds is None):
            raise ValueError("sweep.budget_minutes and sweep.pilot_seeds are of sweep.half_width, which is null")
        return self

    @field_validator("pack", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # as YAML reads an off without quotes
