"""Fused kernels for NVIDIA Hopper: a row of the dispatch table. Importing this package imports no jax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xattn.backend.hopper.tuning import ACTIVATIONS, Tuning

if TYPE_CHECKING:
    from xattn.backend.spec import AttentionSpec, Keys, Output, Queries, Values


def hopper(q: Queries, k: Keys, v: Values, spec: AttentionSpec, tuning: Tuning | None = None) -> Output:
    """:func:`xattn.backend.reference.reference` for causal sigmoid and ``none`` on a Hopper GPU.

    It takes bfloat16 or float16, and DHQK = DHV in 64, 128. Pre-activation and RoPE come before it, as XLA fuses them
    into one pass over q and k. The bias is an array of the program, with its gradient. **Never run on a GPU so far**:
    docs/kernels.md says what was proven without one.
    """
    assert spec.activation.name in ACTIVATIONS
    assert spec.mask is None
    assert spec.segment_ids is None
    assert spec.window is None
    assert spec.log_decay is spec.log_input_gate is None
    import jax.numpy as jnp

    from xattn.backend.hopper.fused import fused  # imports Pallas, which nobody else needs
    from xattn.backend.hopper.kernels import Meaning
    from xattn.backend.spec import prepare

    q, k = prepare(q, k, spec)
    bias = jnp.zeros(q.shape[1], jnp.float32) if spec.bias is None else spec.bias
    meaning = Meaning(sigmoid=spec.activation.takes_bias, causal=True)
    return fused(q, k, v, jnp.broadcast_to(bias, q.shape[:2]), meaning, tuning or Tuning())
