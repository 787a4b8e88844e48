"""What a person chooses about how a sweep runs. Importing this module imports no jax."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveInt, field_validator

from xattn.section import Section


class SweepConfig(Section):
    """The group ``sweep``. It changes how fast runs are made and nothing of what they compute.

    pack: how many runs that differ in numbers alone train as one program; ``auto`` packs small models on a GPU, never
        on a CPU.
    workers: how many processes share the runs of ``-m``; ``auto`` is one for each GPU, and one without GPUs.
    """

    pack: Literal["auto", "off"] | PositiveInt
    workers: Literal["auto"] | PositiveInt

    @field_validator("pack", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # as YAML reads an off without quotes
