"""Optimizers and schedules from optax, with the swept numbers as arrays.

A Python float in a jitted optimizer is part of the program. Here the peak learning rate, decay and clip are arguments
of the step, so changing them compiles nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from xattn.backend import xla_cpu
from xattn.model.transformer import by_role
from xattn.training.config import ScheduleConfig
from xattn.training.optimizers import Optimizer


class OptimizerHyperparameters(NamedTuple):
    """Swept numbers, float32 scalars. clip_norm is +inf if nothing is clipped."""

    learning_rate: jax.Array | float
    weight_decay: jax.Array | float
    clip_norm: jax.Array | float


def learning_rate_factor(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """Return the factor on the peak learning rate of update ``count``, counted from 0, in a run of ``steps``.

    With w = ⌊warmup_fraction · steps⌋ it rises linearly from 1/(w + 1) at 0 to 1 at w, and stays 1 or decays from
    there. A decay reaches final_fraction one update after the last.
    """
    warmup = int(config.warmup_fraction * steps)
    rest = max(steps - warmup, 1)
    pieces: list[tuple[int, optax.Schedule]] = []  # (first update, schedule counted from it)
    if warmup:
        pieces.append((0, optax.linear_schedule(1 / (warmup + 1), 1.0, warmup)))
    match config.name:
        case "constant":
            pieces.append((warmup, optax.constant_schedule(1.0)))
        case "linear":
            pieces.append((warmup, optax.linear_schedule(1.0, config.final_fraction, rest)))
        case "cosine":
            pieces.append((warmup, optax.cosine_decay_schedule(1.0, rest, config.final_fraction)))
        case "wsd":
            decay = max(round(config.decay_fraction * steps), 1)
            pieces.append((warmup, optax.constant_schedule(1.0)))
            pieces.append((steps - decay, optax.linear_schedule(1.0, config.final_fraction, decay)))
    return optax.join_schedules([schedule for _, schedule in pieces], [first for first, _ in pieces[1:]])


def optimizer(config: Optimizer, hyperparameters: OptimizerHyperparameters) -> optax.GradientTransformation:
    """Chain: clip by global norm → the optimizer's direction → decay of matrices and embeddings → −learning rate.

    The learning rate is that of the next update, including the schedule's factor. The state's structure and initial
    values do not depend on the hyperparameters.
    """
    return optax.chain(
        _clip(hyperparameters.clip_norm),
        config.direction(),
        optax.add_decayed_weights(
            hyperparameters.weight_decay, mask=lambda params: by_role(params, lambda role: role != "vector")
        ),
        optax.scale_by_learning_rate(hyperparameters.learning_rate),
    )


def global_norm(tree: Any) -> jax.Array:
    """Return √ of the sum of the squares of all entries, a float32 scalar."""
    return xla_cpu.norm(tree) if xla_cpu.is_used() else optax.tree.norm(tree)


def _clip(clip_norm: jax.Array | float) -> optax.GradientTransformation:
    """Scale updates of a larger global norm down to clip_norm."""

    def scaled(updates: Any) -> Any:
        factor = jnp.minimum(1.0, clip_norm / global_norm(updates))
        return jax.tree.map(lambda leaf: leaf * factor, updates)

    return optax.stateless(lambda updates, _: scaled(updates))
