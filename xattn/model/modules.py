"""The modules shared by all parts of a layer: norms and matrices."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from xattn.model.config import ModelConfig
from xattn.model.functions import layer_norm, projection, rms_norm


class Norm(nn.Module):
    """RMSNorm or LayerNorm with a scale and no bias, over the last axis."""

    kind: Literal["rmsnorm", "layernorm"]
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return (rms_norm if self.kind == "rmsnorm" else layer_norm)(x, scale, self.epsilon)


def norm(config: ModelConfig, name: str) -> Norm:
    """Return the kind of norm that ``model.norm`` selects."""
    return Norm(config.norm, config.norm_eps, name=name)


def dense(config: ModelConfig, features: int, name: str, *, residual: bool = False) -> nn.Dense:
    """Return a matrix in the config's dtype. ``residual`` means that its product is added to the residual stream."""
    variance = 1.0 / (2 * config.num_layers) if residual else 1.0
    init = nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal")
    return _dense(config, features, name, jnp.dtype(config.dtype), init)


def gate(config: ModelConfig, features: int, name: str, *, bias: Any = None) -> nn.Dense:
    """Return a gate before its activation: W x in the config's dtype, or W x + b in float32; W starts at 0.

    ``bias`` is the initial b, one number for all features or one for each; None means no b.
    """
    # The log of a forget gate near 1 is near 0, and bfloat16 would keep only two digits of it.
    dtype = jnp.dtype(config.dtype if bias is None else "float32")
    return _dense(config, features, name, dtype, nn.initializers.zeros, bias)


def _dense(
    config: ModelConfig,
    features: int,
    name: str,
    dtype: jnp.dtype,
    kernel_init: nn.initializers.Initializer,
    bias: Any = None,
) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=bias is not None,
        dtype=dtype,
        precision=config.matmul_precision,
        kernel_init=kernel_init,
        bias_init=nn.initializers.zeros if bias is None else nn.initializers.constant(bias),
        dot_general=projection,
        name=name,
    )
