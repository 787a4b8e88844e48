"""The one entry: check the arguments, choose an implementation, call it."""

from __future__ import annotations

from typing import Any

import jax

from xattn.backend import dispatch
from xattn.backend.arguments import checked_arrays, checked_spec
from xattn.backend.rope import Theta


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    attention_mask: jax.Array | None = None,
    qkv_dtype: Any = None,
    activation_function: str = "softmax",
    qk_pre_activation_function: str = "none",
    theta: Theta = 10000.0,
    *,
    context_length: int | None = None,
    sigmoid_bias: float | jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Attention with rotary positions and a choice of the function from logits to weights.

    With R rotating the pair (2i, 2i + 1) at position t by t · theta^(−2i/DHQK), g the pre-activation, and M the mask::

        A_ts = ⟨R g(q_t), R g(k_s)⟩ / √DHQK
        P_ts = M_ts · exp(A_ts) / Σ_s' M_ts' exp(A_ts')    softmax
        P_ts = M_ts · σ(A_ts + b),  b = −log n             sigmoid (arXiv 2409.04431)
        P_ts = M_ts · A_ts                                 none
        out_t = Σ_s P_ts v_s

    Shape letters: B batch, NH heads, S sequence, DHQK query/key head width, DHV value head width. Rotation, logits and
    weights are float32; q and k are rounded to qkv_dtype after the pre-activation and after the rotation.

    Args:
        queries: (B, NH, S, DHQK), or (B, S, DHQK) for one head.
        keys: (B, NKV, S, DHQK); NKV divides NH, and query head h reads key/value head ⌊h · NKV / NH⌋.
        values: (B, NKV, S, DHV).
        attention_mask: bool (S, S), True = attend. None is causal.
        qkv_dtype: float32, bfloat16 or float16, to which all three are cast. None is the dtype of the queries, and
            then all three must have it.
        activation_function: softmax, sigmoid or none.
        qk_pre_activation_function: none, or swish: x · σ(x). silu is another name of swish.
        theta: RoPE's wavelength base, a positive number or a traced scalar.
        context_length: the n of sigmoid's bias; None is S.
        sigmoid_bias: a number, a scalar or (NH,) array, in place of −log n; only under sigmoid.
        segment_ids: integers (B, S); tokens of different segments don't attend to each other.
        window: a token t attends to t − window < s ≤ t only. It narrows a given mask as it narrows the causal one.
        implementation: a name of ``dispatch.names()``.

    Returns:
        (B, NH, S, DHV), or (B, S, DHV) for three axes, in qkv_dtype. A row that may attend to nothing is 0.

    Raises:
        ValueError: an unknown choice, shapes or dtypes that don't fit, an odd DHQK, a number out of range, or a named
            implementation that cannot serve this call.
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
    )
    out = dispatch.compute(q, k, v, spec, implementation)
    return out if queries.ndim == 4 else out[:, 0]
