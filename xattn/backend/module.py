"""Attention as a flax.linen module, a drop-in for xlstm-jax's class of the same name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Float32

from xattn.backend import dispatch
from xattn.backend.activations import QKPreActivation
from xattn.backend.arguments import checked_arrays, checked_spec
from xattn.backend.linear import linear_with_state


@dataclass
class mLSTMBackendAttentionConfig:
    """What :class:`mLSTMBackendAttention` computes, as in :func:`xattn.backend.api.attention`.

    Not frozen: the model sets the context length afterwards.
    """

    context_length: int = -1
    """The n of sigmoid's bias −log n; −1 is unset, and n is then the sequence length of the call."""
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
        q: Float[Array, "B *NH S DHQK"],
        k: Float[Array, "B *NKV S DHQK"],
        v: Float[Array, "B *NKV S DHV"],
        i: Array | None = None,
        f: Array | None = None,
        c_initial: Float[Array, "B *NKV DHQK DHV"] | None = None,
        n_initial: Array | None = None,
        m_initial: Array | None = None,
        return_last_states: bool = False,
    ) -> (
        Float[Array, "B *NH S DHV"]
        | tuple[Float[Array, "B *NH S DHV"], tuple[Float32[Array, "B *NKV DHQK DHV"], None, None]]
    ):
        """Attend causally, by the configured choices; q, k and v have one dtype, and so has the output.

        Without a normaliser (``none``) attention is a recurrence with the state c = Σ_s R(s − S) k_s v_sᵀ / √DHQK over
        the S tokens seen. Pass the state that one call returns to the next, whose positions count from 0 again: two
        halves equal the whole at any cut. Softmax and sigmoid have no such state.

        Args:
            i, f: input and forget gates of an mLSTM; accepted and ignored.
            c_initial: under ``none`` a state, used in float32; else None.
            n_initial, m_initial: must be None: there is no normaliser, and no running maximum.
            return_last_states: under ``none``, return ``(out, (c, None, None))``; else must be False.

        Raises:
            ValueError: a state that the activation does not have, or one of the wrong shape; and whatever
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
