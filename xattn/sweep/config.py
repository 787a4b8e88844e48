"""What a person chooses about how a sweep runs. Importing this module imports no jax."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from xattn.section import Section


class SweepConfig(Section):
    """The group ``sweep``. It changes how fast runs are made and nothing of what they compute.

    pack: how many runs that differ in numbers alone train as one program; ``auto`` packs small models on a GPU, never
        on a CPU.
    workers: how many processes share the runs of ``-m``; ``auto`` is one for each GPU. Without GPUs it is one for each
        core, and kept to it, where ``trainer.threads`` is 1, and else a single one.
    half_width: seeds are added until each arm's difference to the baseline is known to ± so much, in the metric's unit
        (:mod:`xattn.sweep.seeds`); null: the seeds that were typed.
    budget_minutes: no seed after the first eight is begun that would end later than so long after the command began;
        null: no limit.
    pilot_seeds: the first seeds, whose spread says how many are needed; null: 8, and more for several arms.
    """

    pack: Literal["auto", "off"] | PositiveInt
    workers: Literal["auto"] | PositiveInt
    half_width: PositiveFloat | None
    budget_minutes: PositiveFloat | None
    pilot_seeds: Annotated[int, Field(ge=4)] | None

    @model_validator(mode="after")
    def _is_of_seeds_on_demand(self) -> SweepConfig:
        if self.half_width is None and not (self.budget_minutes is None and self.pilot_seeds is None):
            raise ValueError("sweep.budget_minutes and sweep.pilot_seeds are of sweep.half_width, which is null")
        return self

    @field_validator("pack", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # as YAML reads an off without quotes
