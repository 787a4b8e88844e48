"""Fused kernels for NVIDIA Hopper: a row of the dispatch table. Importing this package imports no jax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xattn.backend.hopper.tuning import Tuning

if TYPE_CHECKING:
    import jax

    from xattn.backend.spec import AttentionSpec


def hopper(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec, tuning: Tuning | None = None) -> jax.Array:
    """:func:`xattn.backend.reference.reference` for causal sigmoid and ``none`` in bfloat16 or float16, DHQK = DHV in
    64, 128, on a Hopper GPU (compute capability 9.0).

    Pre-activation and RoPE come before it, as XLA fuses them into one pass over q and k. The bias is an array of the
    program, with its gradient. **Never run on a GPU so far**: docs/kernels.md says what was proven without one.
    """
    assert spec.activation.name in ("sigmoid", "none")
    assert spec.mask is None
    assert spec.segment_ids is None
    assert spec.window is None
    import jax.numpy as jnp

    from xattn.backend.hopper.fused import fused  # imports Pallas, which nobody else needs
    from xattn.backend.hopper.kernels import Meaning
    from xattn.backend.spec import prepare

    q, k = prepare(q, k, spec)
    bias = jnp.zeros(q.shape[1], jnp.float32) if spec.bias is None else spec.bias
    meaning = Meaning(sigmoid=spec.activation.takes_bias, causal=True)
    return fused(q, k, v, jnp.broadcast_to(bias, q.shape[:2]), meaning, tuning or Tuning())
