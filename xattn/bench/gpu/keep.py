"""``--keep``: what was measured of the kernels becomes the record that lets ``auto`` take them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from xattn.backend import proven
from xattn.backend.proven import Evidence, Record


def keep(device_kind: str, evidence: Iterable[Evidence], *, made_at: str) -> Path:
    """Write the record of this device kind, jax and source, in place of an earlier one, and return its file.

    It holds figures, failures too, and no verdict: that is drawn from them whenever ``auto`` asks.
    """
    of = proven.identity(device_kind)
    record = Record(
        device_kind=of.device_kind,
        jax=of.jax,
        jaxlib=of.jaxlib,
        source_sha256=of.source_sha256,
        made_at=made_at,
        evidence=tuple(evidence),
    )
    return proven.write(record, of)
