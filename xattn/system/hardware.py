"""What devices can do, according to their makers' data sheets: for utilisation and for plans.

Peaks are dense, without sparsity. float32 on an NVIDIA card is TF32, in which XLA multiplies float32 by default.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Hardware:
    """One device."""

    kind: str
    """jax's name for it: the beginning of device_kind"""
    bfloat16: float
    float32: float
    """most operations per second of a matrix product, as for bfloat16"""
    memory: float
    """bytes"""
    bandwidth: float
    """of that memory, bytes per second"""
    link: float
    """bytes per second, in one direction, to the other devices of its machine"""
    per_machine: int
    platform: str
    compute_capability: str | None = None
    """of a CUDA device; None means that of the device here"""

    def peak(self, dtype: str) -> float:
        """Return the operations per second of a product in this dtype."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32


# Between machines, which data sheets do not cover: 400 Gbit/s per device, the usual network of a cluster.
NETWORK = 50e9

# A kind that begins with another one comes before it: the first that matches is taken.
HARDWARE = {
    "a100": Hardware("NVIDIA A100", 312e12, 156e12, 80e9, 2.0e12, 300e9, 8, "cuda", "8.0"),
    "h100": Hardware("NVIDIA H100", 989e12, 494e12, 80e9, 3.35e12, 450e9, 8, "cuda", "9.0"),
    "h200": Hardware("NVIDIA H200", 989e12, 494e12, 141e9, 4.8e12, 450e9, 8, "cuda", "9.0"),
    "b200": Hardware("NVIDIA B200", 2250e12, 1125e12, 180e9, 8.0e12, 900e9, 8, "cuda", "10.0"),
    "rtx4090": Hardware("NVIDIA GeForce RTX 4090", 165e12, 83e12, 24e9, 1.0e12, 32e9, 8, "cuda", "8.9"),
    "tpu-v4": Hardware("TPU v4", 275e12, 275e12, 32e9, 1.2e12, 300e9, 4, "tpu"),
    "tpu-v5e": Hardware("TPU v5 lite", 197e12, 197e12, 16e9, 0.82e12, 200e9, 8, "tpu"),
    "tpu-v5p": Hardware("TPU v5", 459e12, 459e12, 95e9, 2.77e12, 600e9, 4, "tpu"),
}


def hardware_of(device_kind: str) -> Hardware | None:
    """Return the device that jax gives this name, or None if the table does not have it."""
    return next((each for each in HARDWARE.values() if device_kind.startswith(each.kind)), None)


def measured_peak(dtype: str) -> float:
    """Return the operations per second that a large matrix product in this dtype, summed in float32, reaches here."""
    size = 1024
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32)).lower(x).compile()
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)
