"""Whether a training step fits in memory, before it starts, and what helps if it does not."""

from __future__ import annotations

import math
import os
from pathlib import Path

import jax

from xattn.config import Config
from xattn.errors import BadInput

_CONTAINER = Path("/sys/fs/cgroup")  # version 2 of cgroups shows the container's limits here, if there is one


def available_bytes() -> int:
    """Return the bytes this process may use per device: the device's limit, or its share of the available memory."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    return _machine_bytes() // jax.local_device_count()


def refuse_what_does_not_fit(needed: int, config: Config) -> None:
    """Raise :class:`BadInput` if a step needs more memory than is available, with both numbers and the keys that help.

    needed: bytes of the compiled step on one device.
    """
    available = available_bytes()
    if needed <= available:
        return
    raise BadInput(
        f"trainer.batch_size = {config.trainer.batch_size}, backend.context_length = {config.backend.context_length}: "
        f"a training step needs {needed / 1e9:.2f} GB, but only {available / 1e9:.2f} GB is available\n"
        f"what helps: {what_helps(config, jax.default_backend())}"
    )


def what_helps(config: Config, platform: str) -> str:
    """Return the keys that save memory on the platform and can still be changed, with their cost."""
    helps = []
    if config.trainer.gradient_accumulation < config.trainer.batch_size:
        more = range(config.trainer.gradient_accumulation + 1, config.trainer.batch_size + 1)
        finer = next(n for n in more if config.trainer.batch_size % n == 0)
        but = " except for dropout's draws" if config.model.dropout else ""
        helps.append(f"trainer.gradient_accumulation={finer} (same result{but})")
    if config.model.remat != "full":
        helps.append("model.remat=full (same result, a third more work)")
    if config.model.dtype == "float32" and platform != "cpu":
        helps.append("model.dtype=bfloat16")
    helps.append("a smaller trainer.batch_size, backend.context_length or model")
    return "; ".join(helps)


def _machine_bytes() -> int:
    """Return the machine's available memory, limited to what remains of the container's limit."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        available = int(kilobytes) * 1024
    except (OSError, StopIteration):  # not Linux: take all memory
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(available, _container_bytes()))


def _container_bytes() -> float:
    """Return the unused part of the container's limit; infinite without one. Inactive pages of files do not count as
    used: the kernel frees them when memory is needed."""
    try:
        limit, used = (int((_CONTAINER / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
        lines = (_CONTAINER / "memory.stat").read_text("ascii").splitlines()
        reclaimable = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError, StopIteration):  # no such file, or "max"
        return math.inf
    return max(limit - used + reclaimable, 0)
