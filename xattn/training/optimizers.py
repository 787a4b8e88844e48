"""The optimizers, a class each: its numbers and its direction. Importing this module imports no jax."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, NonNegativeFloat, PositiveFloat

from xattn.section import Kinds, Section

if TYPE_CHECKING:
    import optax

Momentum = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    """An optimizer and its numbers: the group ``optimizer``.

    A subclass has a ``name`` of type ``Literal[…]``, its numbers as fields, and :meth:`direction`.
    """

    learning_rate: PositiveFloat
    """Peak learning rate; the schedule multiplies it by a factor between 0 and 1."""
    weight_decay: NonNegativeFloat
    """Decoupled weight decay, times the learning rate; for matrices and embeddings, never for scales and biases."""
    clip_norm: PositiveFloat | None
    """A gradient with a larger global norm is scaled down to this norm; null never clips."""
    name: str

    @abstractmethod
    def direction(self) -> optax.GradientTransformation:
        """Return the transformation from clipped gradients to the direction; decay and the learning rate follow it."""


class AdamW(Optimizer):
    """``optimizer=adamw`` (Loshchilov and Hutter, arXiv 1711.05101)."""

    name: Literal["adamw"]
    beta1: Momentum
    """Decay of the running mean of gradients."""
    beta2: Momentum
    """Decay of the running mean of squared gradients."""
    eps: PositiveFloat
    """Added to the root of the second moment."""

    def direction(self) -> optax.GradientTransformation:
        import optax

        return optax.scale_by_adam(self.beta1, self.beta2, self.eps)


class SGD(Optimizer):
    """``optimizer=sgd``: stochastic gradient descent with heavy-ball momentum."""

    name: Literal["sgd"]
    momentum: Momentum
    """Decay of the running sum of gradients."""

    def direction(self) -> optax.GradientTransformation:
        import optax

        return optax.trace(self.momentum)


class Lion(Optimizer):
    """``optimizer=lion`` (Chen et al., arXiv 2302.06675)."""

    name: Literal["lion"]
    beta1: Momentum
    """Weight of the momentum in the update's sign."""
    beta2: Momentum
    """Decay of the momentum."""

    def direction(self) -> optax.GradientTransformation:
        import optax

        return optax.scale_by_lion(self.beta1, self.beta2)


class Muon(Optimizer):
    """``optimizer=muon``: orthogonalised momentum on the layers' matrices, AdamW on everything else.

    learning_rate belongs to the matrices. Their update has root-mean-square entry ~0.2 like AdamW's (Liu et al., arXiv
    2502.16982, section 2.2), so one rate serves both.

    This is optax's ``scale_by_muon``, which differs from Keller Jordan's (github.com/KellerJordan/Muon, muon.py):

    - Newton–Schulz runs in the gradient's dtype, float32, instead of bfloat16; eps is 1e-8 instead of 1e-7. The five
      steps and their coefficients are the same.
    - Momentum and gradient are corrected for Adam's bias before Nesterov mixes them; it matters in the first updates.

    Our scale differs from both: 0.2 · √max(in, out) instead of √max(1, out/in). So their learning rates do not carry
    over. Our one rate also serves the other parameters (theirs: 0.02 and 3e-4). weight_decay is 0.1, on embeddings too,
    and none on vectors (theirs: 0). Gradients are clipped first (theirs are not). AdamW's eps is 1e-8 (theirs: 1e-10).
    """

    name: Literal["muon"]
    momentum: Momentum
    """Decay of the matrices' momentum before it is orthogonalised."""
    beta1: Momentum
    """AdamW's, for all other parameters."""
    beta2: Momentum
    """AdamW's, for all other parameters."""
    eps: PositiveFloat
    """AdamW's, for all other parameters."""

    def direction(self) -> optax.GradientTransformation:
        import jax
        import optax
        from optax import contrib

        from xattn.model.transformer import by_role

        def scaled(update: Any, _: Any) -> Any:
            return update * 0.2 * math.sqrt(max(update.shape[-2:]))

        # Layers are stacked: a matrix is (layer, in, out), and each layer is orthogonalised separately.
        axes = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        of_matrices = optax.chain(
            contrib.scale_by_muon(
                beta=self.momentum, weight_dimension_numbers=lambda params: jax.tree.map(lambda _: axes, params)
            ),
            optax.stateless_with_tree_map(scaled),
        )
        return optax.partition(
            {"muon": of_matrices, "adam": optax.scale_by_adam(self.beta1, self.beta2, self.eps)},
            lambda params: by_role(params, lambda role: "muon" if role == "matrix" else "adam"),
        )


optimizers = Kinds("optimizer", (AdamW, SGD, Lion, Muon))
OptimizerT = TypeVar("OptimizerT", bound=type[Optimizer])


def register_optimizer(kind: OptimizerT) -> OptimizerT:
    """Make a subclass of :class:`Optimizer` a choice of ``optimizer`` in this process; a decorator.

    Its fields become the keys ``optimizer.…``, and their defaults are what ``optimizer=NAME`` sets. Raises ValueError
    if the name is not valid, or if it is the package's own.
    """
    optimizers.register(kind)
    return kind
