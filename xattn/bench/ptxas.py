"""What NVIDIA's assembler reports about the Mosaic kernels in a program, with or without a GPU."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

# What XLA must know about an H100 to compile for an absent one: its GpuTargetConfigProto.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Report:
    """The report on one kernel."""

    kernel: str
    registers: int
    """Per thread, at entry; setmaxnreg moves them from the warpgroup that copies to those that compute."""
    spill_stores: int
    spill_loads: int
    """Bytes per thread, counted once in the code; in a loop they run more often."""
    warnings: tuple[str, ...]


def absent_h100() -> Any:
    """Return a device to compile for, not to run on. It needs jax's CUDA plugin (extra ``cuda``) and ptxas, but no GPU.

    Raises:
        NotImplementedError: there is no CUDA plugin.
    """
    from jax.experimental import topologies

    return topologies.get_topology_desc("h100", platform="cuda", target_config=H100, topology="1x1x1").devices[0]


def compile_and_report(function: Callable[..., Any], arguments: tuple[Any, ...], scratch: Path) -> list[Report]:
    """Compile function for the arguments' device and return the assembler's report on each Mosaic kernel.

    A kernel that this process has compiled before may be missing, because Mosaic caches kernels.
    """
    path = scratch / "ptxas.txt"
    before = os.environ.get("MOSAIC_GPU_DUMP_PTXAS")
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    try:
        with _stdout_in(path):
            jax.jit(function).lower(*arguments).compile()
    finally:
        del os.environ["MOSAIC_GPU_DUMP_PTXAS"]
        if before is not None:
            os.environ["MOSAIC_GPU_DUMP_PTXAS"] = before
    return parse(path.read_text(encoding="utf-8", errors="replace"))


def parse(text: str) -> list[Report]:
    """Return the reports in the assembler's verbose output. A warning precedes the function that it is about."""
    reports, warnings, name, spills = [], [], "", (0, 0)
    for line in text.splitlines():
        if match := re.search(r"ptxas warning\s*: (.*)", line):
            if not match[1].startswith("Registers are spilled"):  # the numbers show it
                warnings.append(match[1].strip())
        elif match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1].removesuffix("_mosaic_gpu_kernel")
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(match[1]), int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            reports.append(Report(name, int(match[1]), *spills, tuple(warnings)))
            warnings, spills = [], (0, 0)
    return reports


@contextmanager
def _stdout_in(path: Path) -> Iterator[None]:
    """Redirect the process's standard output, including the compiler's, to a file."""
    sys.stdout.flush()
    screen = os.dup(1)
    file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    try:
        os.dup2(file, 1)
        yield
    finally:
        os.dup2(screen, 1)
        os.close(file)
        os.close(screen)
