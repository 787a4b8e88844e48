"""The single entry point: check the arguments, choose an implementation, call it."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Bool, Float, Int

from xattn.backend import dispatch
from xattn.backend.arguments import Bias, Sink, checked_arrays, checked_spec
from xattn.backend.rope import Theta


def attention(
    queries: Float[Array, "B *NH S DHQK"],
    keys: Float[Array, "B *NKV S DHQK"],
    values: Float[Array, "B *NKV S DHV"],
    attention_mask: Bool[Array, "S S"] | None = None,
    qkv_dtype: Any = None,
    activation_function: str = "softmax",
    qk_pre_activation_function: str = "none",
    theta: Theta = 10000.0,
    *,
    context_length: int | None = None,
    sigmoid_bias: Bias = None,
    segment_ids: Int[Array, "B S"] | None = None,
    window: int | None = None,
    log_decay: Float[Array, "B *NKV S"] | None = None,
    log_input_gate: Float[Array, "B *NKV S"] | None = None,
    rotary_fraction: float = 1.0,
    logit_scale: float | Float[Array, ""] = 1.0,
    sink: Sink = None,
    implementation: str = "auto",
) -> Float[Array, "B *NH S DHV"]:
    """Compute attention with rotary positions and a chosen function from logits to weights.

    R rotates the channel pair (2i, 2i + 1) at position t by t · theta^(−2i/d), for i < d/2, where
    d = 2 · round(rotary_fraction · DHQK / 2); the other channels are unchanged. f is the pre-activation, g the logit
    scale, M the mask, ℓ the log decay, i the input gate and z the sink::

        A_ts = g · ⟨R f(q_t), R f(k_s)⟩ / √DHQK
        E_ts = Σ_{s<r≤t} ℓ_r + log i_s,  0 without decay and gate
        P_ts = M_ts · exp(A_ts + E_ts) / ([exp(z)] + Σ_u M_tu exp(A_tu + E_tu))    softmax
        P_ts = M_ts · σ(A_ts + b + E_ts),  b = −log n                              sigmoid (arXiv 2409.04431)
        P_ts = M_ts · exp(E_ts) · A_ts                                             none
        out_t = Σ_s P_ts v_s

    For a registered pointwise activation, E is added to the logit, as for sigmoid.

    Rotation, logits and weights are float32. q and k are rounded to qkv_dtype after the pre-activation and again after
    the rotation. Shapes: B batch, NH heads, S sequence, DHQK query/key head width, DHV value head width.

    Args:
        queries: four axes, or three for a single head; keys and values must have as many.
        keys: NKV divides NH. Query head h reads key/value head ⌊h · NKV / NH⌋.
        values: must have as many heads as the keys.
        attention_mask: True means attend. None means causal.
        qkv_dtype: float32, bfloat16 or float16; all three arrays are cast to it. None means the queries' dtype, which
            all three must then have.
        activation_function: a row of :mod:`xattn.backend.activations`; the package has the three above.
        qk_pre_activation_function: none, or swish: x · σ(x). silu is an alias for swish.
        theta: RoPE's wavelength base, a positive number or a traced scalar.
        context_length: the n of sigmoid's bias and of other pointwise activations; None means S.
        sigmoid_bias: replaces −log n, with one number or one per head; only for an activation that takes a bias.
        segment_ids: tokens of different segments don't attend to each other.
        window: token t attends only to t − window < s ≤ t. The window narrows a given mask as well as the causal one.
        log_decay: ℓ ≤ 0, one per key/value head and token, used in float32 and clipped to at least −100. With a decay
            no token attends to a later one, whatever the mask. Softmax with a decay is FoX (arXiv 2503.02130); gated
            linear attention and Mamba-2 use a decay with none.
        log_input_gate: log i, one per key/value head and token, used in float32.
        rotary_fraction: share of the channels that RoPE rotates, from 0 (none) to 1 (all).
        logit_scale: g, a positive number or a traced scalar.
        sink: z, one number or one per head; softmax only. None means no such term; 0 is softmax "off by one", 1 + Σ.
        implementation: one of ``dispatch.names()``.

    Returns:
        The output in qkv_dtype, with the axes of the queries. A row that may attend to nothing is 0.

    Raises:
        ValueError: a choice is unknown, shapes or dtypes don't fit, DHQK is odd, a number is out of range, a decay is
            positive (checked if its values are known, outside of jit), the activation does not take the sink or bias
            given, or the named implementation cannot serve this call.
    """
    q, k, v = checked_arrays(queries, keys, values, qkv_dtype)
    spec = checked_spec(
        batch=q.shape[0],
        num_heads=q.shape[1],
        length=q.shape[2],
        activation_function=activation_function,
        qk_pre_activation_function=qk_pre_activation_function,
        theta=theta,
        attention_mask=attention_mask,
        context_length=context_length,
        sigmoid_bias=sigmoid_bias,
        segment_ids=segment_ids,
        window=window,
        num_kv_heads=k.shape[1],
        log_decay=log_decay,
        log_input_gate=log_input_gate,
        rotary_fraction=rotary_fraction,
        logit_scale=logit_scale,
        sink=sink,
    )
    out = dispatch.compute(q, k, v, spec, implementation)
    return out if queries.ndim == 4 else out[:, 0]
