"""The swept numbers that a model reads at each call, and what attention means in a layer that has read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int

from xattn.backend import activations
from xattn.backend.arguments import checked_spec
from xattn.backend.spec import AttentionSpec
from xattn.model.config import BackendConfig


class LayerHyperparameters(NamedTuple):
    """The swept numbers that a layer reads at each call: float32 scalars, or Python floats."""

    theta: jax.Array | float
    """RoPE's wavelength base."""
    sigmoid_bias: jax.Array | float
    """Added to the logits of an activation that takes a bias; not read where the bias is learned."""
    logit_scale: jax.Array | float = 1.0
    """A factor on the logits besides 1/√DHQK."""


ModelHyperparameters = LayerHyperparameters | Mapping[str, LayerHyperparameters]
"""Those of a model with one kind of layer, or kind → those of its layers."""


def layer_hyperparameters(hyperparameters: ModelHyperparameters, kind: str) -> LayerHyperparameters:
    """What the layers of that kind read."""
    return hyperparameters if isinstance(hyperparameters, LayerHyperparameters) else hyperparameters[kind]


def with_sigmoid_bias(hyperparameters: ModelHyperparameters, biases: Mapping[str, Any]) -> ModelHyperparameters:
    """The same with another bias in the kinds that are given: kind → scalar."""

    def changed(kind: str, each: LayerHyperparameters) -> LayerHyperparameters:
        return each._replace(sigmoid_bias=biases[kind]) if kind in biases else each

    if isinstance(hyperparameters, LayerHyperparameters):
        return changed("backend", hyperparameters)
    return {kind: changed(kind, each) for kind, each in hyperparameters.items()}


def layer_spec(
    layers: BackendConfig,
    *,
    num_heads: int,
    theta: Any,
    sigmoid_bias: Any,
    logit_scale: Any,
    length: int = 1,
    batch: int = 1,
    segment_ids: Int[Array, "B S"] | None = None,
    **of_tokens: Any,
) -> AttentionSpec:
    """What attention means in layers of one kind.

    theta, sigmoid_bias and logit_scale are the train state's numbers, not the config's. The bias is ignored under an
    activation that takes none. length, batch: S and B of the segment_ids, of which none comes back after another (the
    windows' count up; callers check a user's). of_tokens: num_kv_heads, log_decay, log_input_gate and sink, as
    :func:`xattn.backend.arguments.checked_spec` takes them.
    """
    takes_bias = activations.activation(layers.activation).takes_bias
    return checked_spec(
        num_heads=num_heads,
        length=length,
        batch=batch,
        activation_function=layers.activation,
        qk_pre_activation_function=layers.qk_pre_activation,
        theta=theta,
        context_length=layers.context_length,
        sigmoid_bias=sigmoid_bias if takes_bias else None,
        segment_ids=segment_ids,
        segments_are_runs=True,
        window=layers.window,
        rotary_fraction=layers.rotary_fraction,
        logit_scale=logit_scale,
        **of_tokens,
    )
