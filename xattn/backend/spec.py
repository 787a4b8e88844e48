"""What a call of attention means: one object that every implementation takes after q, k and v."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from xattn.backend.activations import Activation, QKPreActivation
from xattn.backend.rope import rotary_tables, rotate

# The arrays of every implementation, as :func:`xattn.backend.reference.reference` takes them.
Queries = Float[Array, "B NH S DHQK"]
Keys = Float[Array, "B NKV S DHQK"]
Values = Float[Array, "B NKV S DHV"]
Output = Float[Array, "B NH S DHV"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("theta", "bias", "mask", "segment_ids"),
    meta_fields=("activation", "qk_pre_activation", "window", "n"),
)
@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The meaning of a call, checked and in one spelling (see :func:`xattn.backend.api.attention`).

    A pytree: the fields that are arrays may be traced; the others shape the program.
    """

    theta: Float32[Array, ""]
    bias: Float32[Array, " NH"] | None
    """Added to the logits; None where the activation takes none."""
    mask: Bool[Array, "S S"] | None
    """True = attend; None is causal."""
    segment_ids: Int[Array, "B S"] | None
    """A token attends within its own segment."""
    activation: Activation
    qk_pre_activation: QKPreActivation
    window: int | None
    """A token t attends to t − window < s ≤ t; None is no limit."""
    n: int
    """The sequence length of training, which a pointwise activation may depend on."""


def pre_activate(x: Float[Array, "*shape"], spec: AttentionSpec) -> Float[Array, "*shape"]:
    """x or x · σ(x), in x's dtype."""
    return jax.nn.silu(x) if spec.qk_pre_activation == "swish" else x


def prepare(q: Queries, k: Keys, spec: AttentionSpec, first: Array | int = 0) -> tuple[Queries, Keys]:
    """R g(q) and R g(k), pre-activation and RoPE, at the S positions from ``first`` on; each keeps its dtype."""
    sin, cos = rotary_tables(first + jnp.arange(q.shape[-2]), q.shape[-1], spec.theta)
    return rotate(pre_activate(q, spec), sin, cos), rotate(pre_activate(k, spec), sin, cos)


def product(subscripts: str, x: Float[Array, ...], y: Float[Array, ...]) -> Float32[Array, ...]:
    """The einsum of two arrays of one dtype, accumulated in float32.

    float32 is multiplied as float32 on every device. XLA's default rounds it to TF32 on a GPU and to bfloat16 on a TPU;
    to get that speed, pass bfloat16.
    """
    precision = None
    if jax.default_backend() == "cpu":
        # XLA:CPU fails on some bfloat16 products with several batch axes: "Unsupported element type for DotThunk"
        # (jax 0.10.2 and 0.12.0).
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    elif x.dtype == jnp.float32:
        precision = jax.lax.Precision.HIGHEST
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)
