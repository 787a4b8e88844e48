"""The swept numbers that a model takes at each call, and the attention spec of a layer with those numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from xattn.backend import activations
from xattn.backend.arguments import checked_spec
from xattn.backend.spec import AttentionSpec
from xattn.model.config import BackendConfig


class LayerHyperparameters(NamedTuple):
    """The swept numbers that a layer takes at each call: float32 scalars, or Python floats."""

    theta: jax.Array | float
    """RoPE's wavelength base."""
    sigmoid_bias: jax.Array | float
    """Added to the logits if the activation takes a bias; ignored if the bias is learned."""
    logit_scale: jax.Array | float = 1.0
    """Factor on the logits, in addition to 1/√DHQK."""


ModelHyperparameters = LayerHyperparameters | Mapping[str, LayerHyperparameters]
"""The numbers for a model with one kind of layer, or kind → numbers for its layers."""


def layer_hyperparameters(hyperparameters: ModelHyperparameters, kind: str) -> LayerHyperparameters:
    """Return the numbers for layers of that kind."""
    return hyperparameters if isinstance(hyperparameters, LayerHyperparameters) else hyperparameters[kind]


def with_sigmoid_bias(hyperparameters: ModelHyperparameters, biases: Mapping[str, Any]) -> ModelHyperparameters:
    """Replace the bias of some kinds of layer. ``biases`` maps a kind to a scalar."""

    def changed(kind: str, each: LayerHyperparameters) -> LayerHyperparameters:
        return each._replace(sigmoid_bias=biases[kind]) if kind in biases else each

    if isinstance(hyperparameters, LayerHyperparameters):
        return changed("backend", hyperparameters)
    return {kind: changed(kind, each) for kind, each in hyperparameters.items()}


def layer_spec(layers: BackendConfig, *, sigmoid_bias: Any, **call: Any) -> AttentionSpec:
    """Return the attention spec of layers of one kind.

    ``call`` has the arguments of :func:`xattn.backend.arguments.checked_spec` that the config does not determine: theta
    and logit_scale, which come from the train state like sigmoid_bias, and those of the heads and tokens. The bias is
    ignored if the activation takes none. No segment id may come back after another: ids of a batch count up, and
    callers check those of users.
    """
    takes_bias = activations.activation(layers.activation).takes_bias
    return checked_spec(
        activation_function=layers.activation,
        qk_pre_activation_function=layers.qk_pre_activation,
        context_length=layers.context_length,
        sigmoid_bias=sigmoid_bias if takes_bias else None,
        segments_are_runs=True,
        window=layers.window,
        rotary_fraction=layers.rotary_fraction,
        **call,
    )
