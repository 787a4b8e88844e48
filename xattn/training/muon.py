"""The direction of ``optimizer=muon``; :class:`xattn.training.optimizers.Muon` describes it."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from optax import contrib

from xattn.model.transformer import by_role

# The root mean square of the update's entries, the same as AdamW's (Liu et al., arXiv 2502.16982, section 2.2).
_RMS = 0.2
# Layers are stacked: a matrix is (layer, in, out), and each layer is orthogonalised separately.
_MATRIX_AXES = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def muon(momentum: float, *, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Orthogonalise the momentum of the layers' matrices; ``adam`` gives the direction of everything else."""

    def axes(params: Any) -> Any:
        return jax.tree.map(lambda _: _MATRIX_AXES, params)

    def scaled(update: Any, _: Any) -> Any:
        return update * _RMS * math.sqrt(max(update.shape[-2:]))

    of_matrices = optax.chain(
        contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=axes),
        optax.stateless_with_tree_map(scaled),
    )
    return optax.partition(
        {"muon": of_matrices, "adam": adam},
        lambda params: by_role(params, lambda role: "muon" if role == "matrix" else "adam"),
    )
