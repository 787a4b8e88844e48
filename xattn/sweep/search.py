"""What a tuner searches, and how: its settings, and the dimensions of its space."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, field_validator, model_validator

from xattn.errors import did_you_mean
from xattn.section import Section

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
