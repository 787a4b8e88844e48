"""The one entry: check the arguments, choose an implementation, call it."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Bool, Float, Int

from xattn.backend import dispatch
from xattn.backend.arguments import Bias, checked_arrays, checked_spec
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
    implementation: str = "auto",
) -> Float[Array, "B *NH S DHV"]:
    """Attention with rotary positions and a choice of the function from logits to weights.

    With R rotating the pair (2i, 2i + 1) at position t by t · theta^(−2i/DHQK), g the pre-activation, and M the mask::

        A_ts = ⟨R g(q_t), R g(k_s)⟩ / √DHQK
        P_ts = M_ts · exp(A_ts) / Σ_s' M_ts' exp(A_ts')    softmax
        P_ts = M_ts · σ(A_ts + b),  b = −log n             sigmoid (arXiv 2409.04431)
        P_ts = M_ts · A_ts                                 none
        out_t = Σ_s P_ts v_s

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
        implementation: a name of ``dispatch.names()``.

    Returns:
        The output in qkv_dtype, with the axes of the queries. A row that may attend to nothing is 0.

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
