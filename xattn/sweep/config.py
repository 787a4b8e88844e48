"""The config section ``sweep``. Importing this module imports no jax."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from xattn.section import Section


class SweepConfig(Section):
    """The group ``sweep``: it changes how fast runs are made, and nothing that they compute."""

    pack: Literal["auto", "off"] | PositiveInt
    """Number of runs that train together as one program, if they differ only in numbers; ``auto`` packs small models
    on a GPU, and never packs on a CPU.
    """
    workers: Literal["auto"] | PositiveInt
    """Number of processes that share the runs of ``-m``; ``auto`` is one per GPU. Without GPUs it is one per core,
    pinned to it, if ``trainer.threads`` is 1, and otherwise one process.
    """
    half_width: PositiveFloat | None
    """Seeds are added until each arm's difference from the baseline is known to within ± this value, in the metric's
    unit; null trains only the seeds that are given.
    """
    budget_minutes: PositiveFloat | None
    """With half_width: after the first seeds, no seed starts if it would end more than this many minutes after the
    command started; null sets no limit.
    """
    pilot_seeds: Annotated[int, Field(ge=4)] | None
    """With half_width: the number of first seeds. Their spread decides how many are needed. Null means 8, and more for
    several arms.
    """

    @model_validator(mode="after")
    def _is_of_seeds_on_demand(self) -> SweepConfig:
        if self.half_width is None and not (self.budget_minutes is None and self.pilot_seeds is None):
            raise ValueError("sweep.budget_minutes and sweep.pilot_seeds need sweep.half_width, which is null")
        return self

    @field_validator("pack", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads an unquoted off as False
