"""Attention as a flax.linen module, a drop-in for xlstm-jax's class of the same name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from xattn.backend import dispatch
from xattn.backend.activations import QKPreActivation
from xattn.backend.arguments import checked_arrays, checked_spec
from xattn.backend.linear import linear_with_state

Gate = Float[Array, "B *NKV S"] | Float[Array, "B *NKV S 1"]


@dataclass
class mLSTMBackendAttentionConfig:
    """What :class:`mLSTMBackendAttention` computes, as in :func:`xattn.backend.api.attention`.

    Not frozen: the model sets the context length afterwards.
    """

    context_length: int = -1
    """The n of sigmoid's bias −log n; −1 means unset: n is then the sequence length of the call."""
    activation_function: str = "softmax"
    qk_pre_activation_function: QKPreActivation = "none"
    theta: float = 10000.0
    gates: Literal["none", "sigmoid"] = "none"
    """``none`` ignores the gates of an mLSTM. ``sigmoid`` applies f as a decay and i as an input gate."""
    rotary_fraction: float = 1.0
    """RoPE rotates this share of a head's channels, counted from the first. An mLSTM has 0."""

    def assign_model_config_params(self, model_config: Any) -> None:
        """Take the context length from the model's config."""
        self.context_length = model_config.context_length


class mLSTMBackendAttention(nn.Module):
    """Causal attention behind the interface of an mLSTM backend. It has no parameters."""

    config: mLSTMBackendAttentionConfig
    config_class = mLSTMBackendAttentionConfig

    @property
    def can_vmap_over_heads(self) -> bool:
        """True: heads are independent, and (B, S, D) is accepted as well as (B, NH, S, D)."""
        return True

    def __call__(
        self,
        q: Float[Array, "B *NH S DHQK"],
        k: Float[Array, "B *NKV S DHQK"],
        v: Float[Array, "B *NKV S DHV"],
        i: Gate | None = None,
        f: Gate | None = None,
        c_initial: Float[Array, "B *NKV DHQK DHV"] | None = None,
        n_initial: Array | None = None,
        m_initial: Array | None = None,
        return_last_states: bool = False,
    ) -> (
        Float[Array, "B *NH S DHV"]
        | tuple[Float[Array, "B *NH S DHV"], tuple[Float32[Array, "B *NKV DHQK DHV"], None, None]]
    ):
        """Attend causally, as configured. q, k, v and the output share one dtype.

        Without a normaliser (``none``) attention is a recurrence with the state c = Σ_s R(s − S) k_s v_sᵀ / √DHQK over
        the S tokens seen. Pass the state returned by one call to the next, whose positions start from 0 again.
        Splitting a sequence at any point gives the same result. Softmax and sigmoid have no such state.

        With ``gates="sigmoid"`` this is the mLSTM with sigmoid gates (arXiv 2503.14376) without its normaliser::

            C_t = σ(f_t) C_{t−1} + σ(i_t) k_t v_tᵀ / √DHQK,   out_t = q_t · C_t

        Under softmax and sigmoid the logs of the gates are added to the logits, like log_decay and log_input_gate in
        :func:`xattn.backend.api.attention`.

        Args:
            i, f: input and forget gates before their sigmoid, float, one per key/value head and token: (B, NH, S) or
                (B, NH, S, 1); (B, S) or (B, S, 1) if q has three axes. Ignored with gates="none".
            c_initial: a state under ``none``, used in float32; otherwise None.
            n_initial, m_initial: must be None, as there is no normaliser and no running maximum.
            return_last_states: whether to return ``(out, (c, None, None))`` under ``none``; otherwise must be False.

        Raises:
            ValueError: the activation has no such state, or it has the wrong shape; with gates="sigmoid" a gate is None
                or has the wrong shape; the choice of gates is unknown; or :func:`xattn.backend.api.attention` raises.
        """
        for name, state in (("n_initial", n_initial), ("m_initial", m_initial)):
            if state is not None:
                raise ValueError(f"attention has no state {name}: it must be None, got shape {state.shape}")
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
            batch=q.shape[0],
            num_kv_heads=k.shape[1],
            rotary_fraction=config.rotary_fraction,
            log_decay=self._log_sigmoid("f", f, k, one_head),
            log_input_gate=self._log_sigmoid("i", i, k, one_head),
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

    def _log_sigmoid(
        self, name: str, gate: Gate | None, k: Float[Array, "B NKV S DHQK"], one_head: bool
    ) -> Float32[Array, "B NKV S"] | None:
        """Return log σ of a gate's pre-activation; None if gates are not applied."""
        if self.config.gates == "none":
            return None
        if self.config.gates != "sigmoid":
            raise ValueError(f"unknown gates {self.config.gates!r}; choices: none, sigmoid")
        batch, heads, length, _ = k.shape
        axes, shape = ("(B, S)", (batch, length)) if one_head else ("(B, NH, S)", (batch, heads, length))
        if gate is None or gate.shape not in (shape, (*shape, 1)):
            got = "None" if gate is None else f"shape {gate.shape}"
            raise ValueError(
                f"gates='sigmoid' needs the gate {name} of shape {axes} = {shape}, or {(*shape, 1)}; got {got}"
            )
        return jax.nn.log_sigmoid(gate.reshape(batch, heads, length).astype(jnp.float32))
