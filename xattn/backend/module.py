"""The seed's backend as a flax.linen module, a drop-in for xlstm-jax's class of the same name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from xattn.backend.api import attention
from xattn.backend.config import Activation, QKPreActivation


@dataclass
class mLSTMBackendAttentionConfig:
    """What :class:`mLSTMBackendAttention` computes. Not frozen: the model sets the context length after the fact.

    context_length: the n of sigmoid's bias −log n; −1 is unset, and n is then the sequence length of the call.
    activation_function: from attention logits to weights: softmax, sigmoid or none.
    qk_pre_activation_function: applied to queries and keys before RoPE: none or swish (silu).
    theta: RoPE's wavelength base.
    """

    context_length: int = -1
    activation_function: Activation = "softmax"
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
    ) -> jax.Array:
        """Attend causally, by the configured choices.

        Args:
            q: queries (B, NH, S, DHQK), or (B, S, DHQK).
            k: keys, likewise.
            v: values (B, NH, S, DHV), or (B, S, DHV).
            i: input gates of an mLSTM; taken and not applied.
            f: forget gates of an mLSTM; taken and not applied.
            c_initial: must be None.
            n_initial: must be None.
            m_initial: must be None.
            return_last_states: must be False.

        Returns:
            (B, NH, S, DHV), or (B, S, DHV), in the dtype of q, k and v.

        Raises:
            ValueError: an initial state is given or the last one asked for; and whatever
                :func:`xattn.backend.api.attention` raises.
        """
        del i, f
        states = {"c_initial": c_initial, "n_initial": n_initial, "m_initial": m_initial}
        if given := [name for name, state in states.items() if state is not None]:
            raise ValueError(f"attention does not support an initial state, got {', '.join(given)}")
        if return_last_states:
            raise ValueError("attention does not support return_last_states")
        return attention(
            q,
            k,
            v,
            activation_function=self.config.activation_function,
            qk_pre_activation_function=self.config.qk_pre_activation_function,
            theta=self.config.theta,
            context_length=None if self.config.context_length == -1 else self.config.context_length,
        )
