"""Optimizers and schedules from optax, with the swept numbers as arrays.

A Python float in a jitted optimizer is part of the program; here the peak learning rate, decay and clip are arguments
of the step, so that changing them compiles nothing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from xattn.model.transformer import parameter_role
from xattn.training.config import AdamWConfig, LionConfig, MuonConfig, OptimizerConfig, ScheduleConfig, SGDConfig

# The root mean square of an entry of Muon's update, AdamW's own (Liu et al., arXiv 2502.16982, section 2.2).
_MUON_RMS = 0.2
# Layers are stacked: a matrix is (layer, in, out), and each layer's is orthogonalised on its own.
_MATRIX_AXES = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


class OptimizerHyperparameters(NamedTuple):
    """Swept numbers, float32 scalars. clip_norm is +inf where nothing is clipped."""

    learning_rate: jax.Array | float
    weight_decay: jax.Array | float
    clip_norm: jax.Array | float


def learning_rate_factor(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """The factor on the peak learning rate of update number ``count``, counted from 0, of a run of ``steps``.

    With w = ⌊warmup_fraction · steps⌋ it rises linearly from 1/(w + 1) at 0 to 1 at w, and is 1 or decays from there.
    A decay reaches final_fraction one update after the last.
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


def optimizer(config: OptimizerConfig, hyperparameters: OptimizerHyperparameters) -> optax.GradientTransformation:
    """clip by global norm → the optimizer's direction → decay of matrices and embeddings → −learning rate.

    The learning rate is that of the next update, the schedule's factor included. The state's structure and initial
    values do not depend on the hyperparameters.
    """
    return optax.chain(
        _clip(hyperparameters.clip_norm),
        _direction(config),
        optax.add_decayed_weights(hyperparameters.weight_decay, mask=_decayed),
        optax.scale_by_learning_rate(hyperparameters.learning_rate),
    )


def global_norm(tree: Any) -> jax.Array:
    """√ of the sum of the squares of all entries, a float32 scalar. On a CPU each leaf's is a product with itself, for
    which XLA takes less time there than for squares and their sum: at 262,144 numbers a third."""
    if jax.default_backend() != "cpu":
        return optax.tree.norm(tree)

    def squares(leaf: jax.Array) -> jax.Array:
        axes = tuple(range(leaf.ndim))
        return jax.lax.dot_general(leaf, leaf, ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST)

    return jnp.sqrt(sum(squares(leaf) for leaf in jax.tree.leaves(tree)))


def _clip(clip_norm: jax.Array | float) -> optax.GradientTransformation:
    """Updates of a larger global norm are scaled down to it."""

    def scaled(updates: Any) -> Any:
        factor = jnp.minimum(1.0, clip_norm / global_norm(updates))
        return jax.tree.map(lambda leaf: leaf * factor, updates)

    return optax.stateless(lambda updates, _: scaled(updates))


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    match config:
        case AdamWConfig():
            return optax.scale_by_adam(config.beta1, config.beta2, config.eps)
        case SGDConfig():
            return optax.trace(config.momentum)
        case LionConfig():
            return optax.scale_by_lion(config.beta1, config.beta2)
        case MuonConfig():
            return optax.partition(
                {"muon": _muon(config), "adam": optax.scale_by_adam(config.beta1, config.beta2, config.eps)},
                lambda params: _by_role(params, lambda role: "muon" if role == "matrix" else "adam"),
            )


def _muon(config: MuonConfig) -> optax.GradientTransformation:
    def axes(params: Any) -> Any:
        return jax.tree.map(lambda _: _MATRIX_AXES, params)

    def scaled(update: Any, _: Any) -> Any:
        return update * _MUON_RMS * math.sqrt(max(update.shape[-2:]))

    return optax.chain(
        contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=axes),
        optax.stateless_with_tree_map(scaled),
    )


def _decayed(params: Any) -> Any:
    return _by_role(params, lambda role: role != "vector")


def _by_role(params: Any, choose: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: choose(parameter_role(path)), params)
