"""The config section ``sweep``, and what a tuner searches and how. Importing this module imports no jax."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from xattn.errors import did_you_mean
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


# The result's numbers in summary.json, and the prefixes of those that exist only under some configs.
OBJECTIVES = (
    *("val_loss", "val_bpb", "best_val_loss", "train_loss"),
    *("tokens_per_second", "wall_seconds", "peak_memory_bytes", "num_params", "flops_per_step"),
)
MEASURED = ("probe/", "attention/")
# Objectives that are known at each evaluation of a running trial → the column of its row.
IN_ROWS = {"val_loss": "val_loss", "best_val_loss": "val_loss", "val_bpb": "val_bpb"}


class Tuning(Section):
    """The settings of ``hydra/sweeper=optuna``: see conf/hydra/sweeper/optuna.yaml."""

    n_trials: PositiveInt
    objective: str
    """``auto`` is the loss by which all points of the space can be compared (:mod:`xattn.metrics`)."""
    direction: Literal["minimize", "maximize"]
    sampler: Literal["tpe", "random", "grid", "cmaes"]
    pruner: Literal["none", "median", "hyperband"]
    at_once: PositiveInt
    seed: NonNegativeInt

    @field_validator("objective")
    @classmethod
    def _is_a_number_of_the_summary(cls, value: str) -> str:
        if value not in ("auto", *OBJECTIVES) and not value.startswith(MEASURED):
            meant = did_you_mean(value, OBJECTIVES)
            raise ValueError(f"auto, or one of {', '.join(OBJECTIVES)}, {'…, '.join(MEASURED)}…{meant}")
        return value

    @model_validator(mode="after")
    def _prunes_by_what_is_measured(self) -> Tuning:
        known = ("auto", *IN_ROWS)
        if self.pruner != "none" and self.objective not in known and not self.objective.startswith(MEASURED):
            raise ValueError(
                f"hydra.sweeper.pruner = {self.pruner}: {self.objective} is not known before the end; use pruner none, "
                f"or one of {', '.join(IN_ROWS)}, {'…, '.join(MEASURED)}… as objective"
            )
        return self


class Dimension(Section):
    """The values that a key may take: one of ``choices``, or a number from low to high (an integer if both are)."""

    choices: list[str] | None = None
    low: int | float = 0
    high: int | float = 0
    log: bool = False
