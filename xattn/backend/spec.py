"""The meaning of an attention call: one object that every implementation takes after q, k and v."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from xattn.backend import xla_cpu
from xattn.backend.activations import Activation, QKPreActivation
from xattn.backend.rope import rotary_tables, rotate

# The arrays of every implementation, as :func:`xattn.backend.reference.reference` takes them.
Queries = Float[Array, "B NH S DHQK"]
Keys = Float[Array, "B NKV S DHQK"]
Values = Float[Array, "B NKV S DHV"]
Output = Float[Array, "B NH S DHV"]
_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The meaning of a call, checked and in canonical form (see :func:`xattn.backend.api.attention`).

    It is a pytree. Fields that are arrays may be traced.
    """

    theta: Float32[Array, ""]
    logit_scale: Float32[Array, ""]
    """Factor on the logits, in addition to 1/√DHQK."""
    bias: Float32[Array, " NH"] | None
    """Added to the logits; None if the activation takes no bias."""
    sink: Float32[Array, " NH"] | None
    """A logit that takes weight but has no value; None means no sink. Only a normalised activation has one."""
    mask: Bool[Array, "S S"] | None
    """True means attend; None means causal."""
    segment_ids: Int[Array, "B S"] | None
    """A token attends only within its own segment."""
    log_decay: Float32[Array, "B NKV S"] | None
    """ℓ, from −100 to 0. Token t sees s through D_ts = Σ_{r=s+1..t} ℓ_r. A decay also makes the mask causal."""
    log_input_gate: Float32[Array, "B NKV S"] | None
    """log i: how much of a token is written."""
    activation: Activation = field(metadata=_STATIC)
    qk_pre_activation: QKPreActivation = field(metadata=_STATIC)
    rotary_fraction: float = field(metadata=_STATIC)
    """Share of the channels that RoPE rotates."""
    window: int | None = field(metadata=_STATIC)
    """Token t attends to t − window < s ≤ t; None means no limit."""
    n: int = field(metadata=_STATIC)
    """The sequence length of training, which a pointwise activation may depend on."""
    segments_are_runs: bool = field(default=False, metadata=_STATIC)
    """Whether each segment is known to be one run of tokens, so that no id comes back after another."""

    @property
    def has_terms(self) -> bool:
        """Whether logits have a term E_ts, from a decay or an input gate."""
        return self.log_decay is not None or self.log_input_gate is not None

    @property
    def is_causal(self) -> bool:
        """Whether no query attends to a later key."""
        return self.mask is None or self.window is not None or self.log_decay is not None


def pre_activate(x: Float[Array, "*shape"], spec: AttentionSpec) -> Float[Array, "*shape"]:
    """Return x or x · σ(x), in x's dtype."""
    return jax.nn.silu(x) if spec.qk_pre_activation == "swish" else x


def prepare(q: Queries, k: Keys, spec: AttentionSpec, first: Array | int = 0) -> tuple[Queries, Keys]:
    """Return g · R f(q) and R f(k), each in its own dtype.

    g is the logit scale, f the pre-activation and R the rotation at the S positions from ``first`` on.
    """
    sin, cos = spec_tables(first + jnp.arange(q.shape[-2]), q.shape[-1], spec)
    return rotate(pre_activate(q, spec), sin, cos, spec.logit_scale), rotate(pre_activate(k, spec), sin, cos)


def spec_tables(
    positions: Int[Array, "*shape"], width: int, spec: AttentionSpec
) -> tuple[Float32[Array, "*shape pairs"], Float32[Array, "*shape pairs"]]:
    """Return sine and cosine for the rotated channels: the first 2 · round(rotary_fraction · DHQK / 2)."""
    return rotary_tables(positions, 2 * round(spec.rotary_fraction * width / 2), spec.theta)


def product(subscripts: str, x: Float[Array, ...], y: Float[Array, ...]) -> Float32[Array, ...]:
    """Return the einsum of two arrays of one dtype, accumulated in float32.

    float32 stays float32 on every device. XLA's default would round it to TF32 on a GPU and to bfloat16 on a TPU; pass
    bfloat16 to get that speed.
    """
    if xla_cpu.is_used():
        return xla_cpu.product(subscripts, x, y)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)
