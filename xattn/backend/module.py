"""The seed's backend as a flax.linen module, a drop-in for xlstm-jax's class of the same name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from xattn.backend import dispatch
from xattn.backend.arguments import checked_arrays, checked_spec
from xattn.backend.config import QKPreActivation
from xattn.backend.linear import linear_with_state


@dataclass
class mLSTMBackendAttentionConfig:
    """What :class:`mLSTMBackendAttention` computes. Not frozen: the model sets the context length after the fact.

    context_length: the n of sigmoid's bias −log n; −1 is unset, and n is then the sequence length of the call.
    activation_function: from attention logits to weights: softmax, sigmoid or none.
    qk_pre_activation_function: applied to queries and keys before RoPE: none or swish (silu).
    theta: RoPE's wavelength base.
    """

    context_length: int = -1
    activation_function: str = "softmax"
    qk_pre_activation_function: QKPreActivation = "none"
    theta: float = 10000.0

    def assign_model_config_params(self, model_config: Any) -> None:
        """Take the context length from the model's config."""
        self.context_length = model_config.context_length


class mLSTMBackendAttention(nn.Module):
    """Causal attention behind the interface of an mLSTM backend; no parameters."""

    config: mLSTMBackendAttentionConfig
    config_class = mLSTMBackendAttentionConfig

    @property
    def can_vmap_over_heads(self) -> bool:
        """True: no head sees another, and (B, S, D) is taken as well as (B, NH, S, D)."""
        return True

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        i: jax.Array | None = None,
        f: jax.Array | None = None,
        c_initial: jax.Array | None = None,
        n_initial: jax.Array | None = None,
        m_initial: jax.Array | None = None,
        return_last_states: bool = False,
    ) -> jax.Array | tuple[jax.Array, tuple[jax.Array, None, None]]:
        """Attend causally, by the configured choices.

        Without a normaliser (``none``) attention is a recurrence with the state c = Σ_s R(s − S) k_s v_sᵀ / √DHQK over
        the S tokens seen. It can be asked for, and given to the next call, whose positions count from 0 again: two
        halves equal the whole at any cut. Softmax and sigmoid have no such state.

        Args:
            q: queries (B, NH, S, DHQK), or (B, S, DHQK).
            k: keys, likewise.
            v: values (B, NH, S, DHV), or (B, S, DHV).
            i: input gates of an mLSTM; taken and not applied.
            f: forget gates of an mLSTM; taken and not applied.
            c_initial: under ``none`` a state (B, NH, DHQK, DHV), or (B, DHQK, DHV), used in float32; else None.
            n_initial: must be None: there is no normaliser.
            m_initial: must be None: there is no running maximum.
            return_last_states: under ``none``, return the state too; else must be False.

        Returns:
            out (B, NH, S, DHV), or (B, S, DHV), in the dtype of q, k and v; with return_last_states
            ``(out, (c, None, None))``, c float32.

        Raises:
            ValueError: a state that cannot be honoured, or one of the wrong shape; and whatever
                :func:`xattn.backend.api.attention` raises.
        """
        del i, f
        for name, state in (("n_initial", n_initial), ("m_initial", m_initial)):
            if state is not None:
                raise ValueError(f"attention has no such state: {name} must be None, got shape {state.shape}")
        config = self.config
        one_head = q.ndim == 3
        q, k, v = checked_arrays(q, k, v)
        spec = checked_spec(
            num_heads=q.shape[1],
            length=q.shape[2],
            activation_function=config.activation_function,
            qk_pre_activation_function=config.qk_pre_activation_function,
            theta=config.theta,
            context_length=None if config.context_length == -1 else config.context_length,
        )
        if c_initial is None and not return_last_states:
            out = dispatch.compute(q, k, v, spec)
            return out[:, 0] if one_head else out
        if not spec.activation.is_linear:
            given = "return_last_states" if c_initial is None else "c_initial"
            raise ValueError(f"{given} needs activation_function 'none': {spec.activation.name!r} has no state")
        if c_initial is not None:
            shape = (*k.shape[:1], *(() if one_head else k.shape[1:2]), k.shape[-1], v.shape[-1])
            if c_initial.shape != shape:
                raise ValueError(f"c_initial must have shape (B, NH, DHQK, DHV) = {shape}, got {c_initial.shape}")
            c_initial = c_initial[:, None] if one_head else c_initial
        out, state = linear_with_state(q, k, v, spec, c_initial)
        if one_head:
            out, state = out[:, 0], state[:, 0]
        return (out, (state, None, None)) if return_last_states else out
