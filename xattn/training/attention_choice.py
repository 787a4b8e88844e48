"""The attention implementation of each kind of layer: asks the dispatch table about a config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xattn.backend.activations import activation
from xattn.backend.dispatch import Call, Choice, choose
from xattn.config import Config
from xattn.data.config import has_segments
from xattn.errors import BadInput
from xattn.model.config import group_of

if TYPE_CHECKING:
    from xattn.system.hardware import Hardware


def choose_attention(
    config: Config, *, context: int, devices: int = 1, hardware: Hardware | None = None
) -> dict[str, Choice]:
    """Return the dispatch table's choice for each kind of layer, with the sequence split over ``context`` devices.

    The call is one training batch. devices: all of the mesh. hardware: what they are; None takes those of this machine.
    Raises :class:`BadInput`.
    """
    model = config.model
    where: dict[str, Any] = {}
    if hardware is not None:
        where = {"platform": hardware.platform, "compute_capability": hardware.compute_capability}
    found = {}
    for kind, backend in config.backend.kinds.items():
        call = Call(
            activation=activation(backend.activation),
            dtype=model.dtype,
            batch=config.trainer.batch_size,
            num_heads=model.num_heads,
            num_kv_heads=model.kv_heads,
            sequence=backend.context_length,
            head_dim_qk=model.head_dim,
            head_dim_v=model.head_dim,
            window=backend.window,
            has_segment_ids=has_segments(config.data),
            has_decay=backend.decay != "none",
            has_input_gate=backend.input_gate != "none",
            has_sink=backend.sink != "none",
            context=context,
            devices=devices,
            **where,
        )
        try:
            found[kind] = choose(call, backend.implementation)
        except ValueError as error:
            raise BadInput(f"{group_of(kind)}.implementation: {error}") from error
    return found
