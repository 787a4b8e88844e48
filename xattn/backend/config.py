"""What a person chooses about attention. Importing this module imports no jax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, PositiveFloat, PositiveInt, field_validator
from pydantic_core import PydanticCustomError

from xattn.backend import activations, dispatch
from xattn.section import Section

QKPreActivation = Literal["none", "swish"]


def _one_of(names: Callable[[], tuple[str, ...]]) -> PlainValidator:
    """As a Literal of the names that there are when a value is judged: a user's own file may add some."""

    def checked(value: Any) -> Any:
        if value in names():
            return value
        *others, last = (repr(name) for name in names())
        raise PydanticCustomError(
            "literal_error", "Input should be {expected}", {"expected": f"{', '.join(others)} or {last}"}
        )

    return PlainValidator(checked)


class LayerConfig(Section):
    """The keys of ``backend`` that a kind of layer has of its own."""

    activation: Annotated[str, _one_of(activations.names)]
    """Function from attention logits to weights."""
    qk_pre_activation: QKPreActivation
    """Function applied to queries and keys before RoPE; ``silu`` is another name of ``swish``."""
    theta: PositiveFloat
    """RoPE's wavelength base; angle = position · theta^(−2i/DHQK)."""
    sigmoid_bias: Literal["auto", "learned"] | float
    """``auto`` is −log(context_length); a number is itself; ``learned`` is a scalar a head, from −log n."""
    window: PositiveInt | None
    """A token attends to itself and to the window − 1 tokens before it; null means to all before it."""
    implementation: Annotated[str, _one_of(dispatch.names)]
    """A row of the dispatch table (xattn/backend/dispatch.py), or ``auto``."""

    @field_validator("qk_pre_activation", mode="before")
    @classmethod
    def _silu_is_swish(cls, value: Any) -> Any:
        return "swish" if value == "silu" else value


class AttentionConfig(LayerConfig):
    """All that a layer's attention is made from."""

    context_length: PositiveInt
    """Sequence length of training, in tokens; also the n of pointwise activations, as in sigmoid's bias −log n."""
