"""Fused kernels for NVIDIA Hopper, a row of the dispatch table. Importing this package does not import jax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xattn.backend.hopper.sizes import ACTIVATIONS, Tiles

if TYPE_CHECKING:
    from xattn.backend.spec import AttentionSpec, Keys, Output, Queries, Values


def hopper(q: Queries, k: Keys, v: Values, spec: AttentionSpec, tiles: Tiles | None = None) -> Output:
    """Compute :func:`xattn.backend.reference.reference` for causal sigmoid and ``none`` on a Hopper GPU.

    The dtype must be bfloat16 or float16, and DHQK = DHV must be 64 or 128. XLA fuses pre-activation and RoPE into one
    pass over q and k before the kernels. The bias is a traced array and has a gradient. **Not yet run on a GPU**:
    docs/kernels.md lists what was verified without one.
    """
    assert spec.activation.name in ACTIVATIONS
    assert spec.mask is None
    assert spec.segment_ids is None
    assert spec.window is None
    assert spec.log_decay is spec.log_input_gate is None
    import jax.numpy as jnp

    from xattn.backend.hopper.fused import fused  # imports Pallas, which nothing else needs
    from xattn.backend.hopper.kernels import Meaning
    from xattn.backend.spec import prepare

    q, k = prepare(q, k, spec)
    bias = jnp.zeros(q.shape[1], jnp.float32) if spec.bias is None else spec.bias
    meaning = Meaning(sigmoid=spec.activation.takes_bias, causal=True)
    return fused(q, k, v, jnp.broadcast_to(bias, q.shape[:2]), meaning, tiles or Tiles())
