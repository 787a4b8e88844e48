"""Softmax by cuDNN's fused kernels, through ``jax.nn.dot_product_attention``."""

from __future__ import annotations

import math

import jax

from xattn.backend.spec import AttentionSpec, Keys, Output, Queries, Values, prepare


def cudnn(q: Queries, k: Keys, v: Values, spec: AttentionSpec) -> Output:
    """Compute :func:`xattn.backend.reference.reference` for causal softmax in bfloat16 or float16, on a CUDA device.

    XLA applies pre-activation and RoPE before the kernels. In released JAX, vmap of its gradient fails (jax issue
    38495).
    """
    assert spec.activation.name == "softmax"
    assert spec.mask is None
    assert spec.segment_ids is None
    assert spec.log_decay is spec.log_input_gate is spec.sink is None
    q, k = prepare(q, k, spec)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # to (B, S, NH, ·)
    window = None if spec.window is None else (spec.window - 1, 0)
    scale = 1 / math.sqrt(q.shape[-1])
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=window, implementation="cudnn"
    )
    return out.swapaxes(1, 2)
