"""What a person chooses about attention. Importing this module imports no jax."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt, field_validator

from xattn.section import Section

Activation = Literal["softmax", "sigmoid", "none"]
QKPreActivation = Literal["none", "swish"]


class BackendConfig(Section):
    """The group ``backend``.

    activation: function from attention logits to weights.
    qk_pre_activation: function applied to queries and keys before RoPE; ``silu`` is another name of ``swish``.
    theta: RoPE's wavelength base; angle = position · theta^(−2i/DHQK).
    context_length: sequence length of training, in tokens; also the n of sigmoid's bias −log n.
    sigmoid_bias: ``auto`` is −log(context_length); a number is itself; ``learned`` is a scalar a head, from −log n.
    window: a token attends to itself and to the window − 1 tokens before it; null means to all before it.
    implementation: a row of the dispatch table (xattn/backend/dispatch.py), or ``auto``.
    """

    activation: Activation
    qk_pre_activation: QKPreActivation
    theta: PositiveFloat
    context_length: PositiveInt
    sigmoid_bias: Literal["auto", "learned"] | float
    window: PositiveInt | None
    implementation: str

    @field_validator("qk_pre_activation", mode="before")
    @classmethod
    def _silu_is_swish(cls, value: Any) -> Any:
        return "swish" if value == "silu" else value
