"""What a call of attention means: one object that every implementation takes after q, k and v.

Shape letters: B batch, NH heads, NKV key/value heads, S sequence, DHQK query/key head width, DHV value head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from xattn.backend.activations import Activation
from xattn.backend.config import QKPreActivation
from xattn.backend.rope import rotary_tables, rotate


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

    theta: jax.Array
    """() float32."""
    bias: jax.Array | None
    """(NH,) float32, added to the logits; None where the activation takes none."""
    mask: jax.Array | None
    """(S, S) bool, True = attend; None is causal."""
    segment_ids: jax.Array | None
    """(B, S) integers; a token attends within its own segment."""
    activation: Activation
    qk_pre_activation: QKPreActivation
    window: int | None
    """A token t attends to t − window < s ≤ t; None is no limit."""
    n: int
    """The sequence length of training, which a pointwise activation may depend on."""


def pre_activate(x: jax.Array, spec: AttentionSpec) -> jax.Array:
    """x or x · σ(x), in x's dtype."""
    return jax.nn.silu(x) if spec.qk_pre_activation == "swish" else x


def prepare(q: jax.Array, k: jax.Array, spec: AttentionSpec, first: jax.Array | int = 0) -> tuple[jax.Array, jax.Array]:
    """Pre-activation and RoPE at S positions from the first on: steps 1 and 2 of the mathematics, in the dtype of q and
    k."""
    sin, cos = rotary_tables(first + jnp.arange(q.shape[-2]), q.shape[-1], spec.theta)
    return rotate(pre_activate(q, spec), sin, cos), rotate(pre_activate(k, spec), sin, cos)


def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum of two arrays of one dtype, accumulated in float32 and returned in it.

    float32 is multiplied as float32 on every device, where XLA by itself rounds it to TF32 on a GPU and to bfloat16 on
    a TPU: who wants that speed says so with the dtype.
    """
    precision = None
    if jax.default_backend() == "cpu":
        # On some products of bfloat16 with several batch axes XLA:CPU fails, with "Unsupported element type for
        # DotThunk" (jax 0.10.2 and 0.12.0).
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    elif x.dtype == jnp.float32:
        precision = jax.lax.Precision.HIGHEST
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)
