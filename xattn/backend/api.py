"""The one entry: check the arguments, choose an implementation, call it."""

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
    """Attention with rotary positions and a choice of the function from logits to weights.

    With R rotating the pair (2i, 2i + 1) at position t by t · theta^(−2i/d), i < d/2, of the first
    d = 2 · round(rotary_fraction · DHQK / 2) channels, f the pre-activation, g the logit scale, M the mask, ℓ the log
    decay, i the input gate and z the sink::

        A_ts = g · ⟨R f(q_t), R f(k_s)⟩ / √DHQK
        E_ts = Σ_{s<r≤t} ℓ_r + log i_s,  0 without decay and gate
        P_ts = M_ts · exp(A_ts + E_ts) / ([exp(z)] + Σ_u M_tu exp(A_tu + E_tu))    softmax
        P_ts = M_ts · σ(A_ts + b + E_ts),  b = −log n                              sigmoid (arXiv 2409.04431)
        P_ts = M_ts · exp(E_ts) · A_ts                                             none
        out_t = Σ_s P_ts v_s

    In any activation of your own that is pointwise E is added to the logit, as in sigmoid.

    Rotation, logits and weights are float32; q and k are rounded to qkv_dtype after the pre-activation and after the
    rotation. Shape letters: B batch, NH heads, S sequence, DHQK query/key head width, DHV value head width.

    Args:
        queries: four axes, or three for one head; keys and values then too.
        keys: NKV divides NH, and query head h reads key/value head ⌊h · NKV / NH⌋.
        values: as many heads as the keys.
        attention_mask: True = attend. None is causal.
        qkv_dtype: float32, bfloat16 or float16, to which all three are cast. None is the dtype of the queries, and
            then all three must have it.
        activation_function: a row of :mod:`xattn.backend.activations`; the package has the three above.
        qk_pre_activation_function: none, or swish: x · σ(x). silu is another name of swish.
        theta: RoPE's wavelength base, a positive number or a traced scalar.
        context_length: the n of sigmoid's bias and of other pointwise activations; None is S.
        sigmoid_bias: a number, a scalar or one for each head, in place of −log n; only where a bias is taken.
        segment_ids: tokens of different segments don't attend to each other.
        window: a token t attends to t − window < s ≤ t only. It narrows a given mask as it narrows the causal one.
        log_decay: ℓ ≤ 0, one for each key/value head and token, used in float32 and not below −100. With it a key
            s > t is never attended to, whatever mask is given. FoX (arXiv 2503.02130) has it under softmax, gated
            linear attention and Mamba-2 under none.
        log_input_gate: log i, one for each key/value head and token, used in float32.
        rotary_fraction: the share of the channels that RoPE rotates, from 0 (none of them) to 1.
        logit_scale: g, a positive number or a traced scalar.
        sink: z, a number, a scalar or one for each head; only under softmax. None is no such term; 0 is softmax "off by
            one", 1 + Σ.
        implementation: a name of ``dispatch.names()``.

    Returns:
        The output in qkv_dtype, with the axes of the queries. A row that may attend to nothing is 0.

    Raises:
        ValueError: an unknown choice, shapes or dtypes that don't fit, an odd DHQK, a number out of range, a positive
            decay (where its values are known, outside of jit), a sink or a bias that the activation does not take, or a
            named implementation that cannot serve this call.
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
