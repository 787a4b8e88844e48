"""The check ``environment``: what a result depends on, and what every later check needs to know."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from xattn.bench.gpu.checks import Settings
from xattn.bench.gpu.record import Device, Finding

_LIBRARIES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")


def look(settings: Settings) -> Iterator[Finding]:
    """Find the device, the driver and the libraries, and multiply two matrices there."""
    import jax
    import jax.numpy as jnp

    from xattn.backend import dispatch

    first, target = jax.local_devices()[0], dispatch.target()
    device = Device(
        platform=target.platform,
        kind=first.device_kind,
        count=jax.device_count(),
        compute_capability=target.compute_capability if target.platform == "cuda" else None,
    )
    yield Finding(what="device", value=device.kind, details=device.model_dump())
    for library in _LIBRARIES:
        try:
            yield Finding(what=library, value=version(library))
        except PackageNotFoundError:
            continue
    if device.is_cuda:
        yield Finding(what="driver", value=_driver())
        yield Finding(what="CUDA", value=first.client.platform_version.replace("\n", " "))
    memory: dict[str, Any] = first.memory_stats() or {}
    if "bytes_limit" in memory:
        free = (memory["bytes_limit"] - memory.get("bytes_in_use", 0)) / 1e9
        yield Finding(what="memory that jax may take", value=free, unit="GB")
    x = jnp.ones((256, 256), jnp.float32)
    total = float(jnp.sum(x @ x))
    yield Finding(what="sum of a product", value=total, bar=f"= {256**3}", holds=total == 256**3)


def _driver() -> str:
    """Return the driver's version and the card's free memory, or why they are not known."""
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.free,memory.total", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not known: {error}"
    return asked.stdout.strip() or f"not known: {asked.stderr.strip()[:200]}"
