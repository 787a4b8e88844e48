"""What a tuner searches, and how: its settings, the dimensions of its space, and optuna's objects for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeInt, PositiveInt, field_validator, model_validator

from xattn.config import Config
from xattn.errors import BadInput, did_you_mean
from xattn.section import Section

if TYPE_CHECKING:
    import optuna

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


def sampler(tuning: Tuning, *, drawn: int) -> optuna.samplers.BaseSampler:
    import optuna

    seed = tuning.seed + drawn  # so that a resumed search does not draw its first points again
    match tuning.sampler:
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, constant_liar=tuning.at_once > 1)
        case "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        case _:
            return optuna.samplers.RandomSampler(seed=seed)


def pruner(tuning: Tuning, base: Config) -> optuna.pruners.BasePruner:
    import optuna

    match tuning.pruner:
        case "median":
            return optuna.pruners.MedianPruner()
        case "hyperband":
            trainer = base.trainer
            return optuna.pruners.HyperbandPruner(min_resource=trainer.eval_every, max_resource=trainer.steps)
        case _:
            return optuna.pruners.NopPruner()


def distribution(key: str, dimension: Dimension) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.choices is not None:
        return CategoricalDistribution(dimension.choices)
    try:
        if isinstance(dimension.low, int) and isinstance(dimension.high, int):
            return IntDistribution(dimension.low, dimension.high, log=dimension.log)
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    except ValueError as error:
        raise BadInput(f"{key}: from {dimension.low} to {dimension.high}: {error}") from error
