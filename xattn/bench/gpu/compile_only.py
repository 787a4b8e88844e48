"""Programs compiled for a GPU that is not here, by JAX's CUDA plugin: what its compiler says of memory and kernels."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from xattn.backend import dispatch
from xattn.bench import ptxas
from xattn.bench.gpu.checks import Settings
from xattn.bench.gpu.record import Finding
from xattn.config import compose, sized
from xattn.model.generation import empty_caches
from xattn.training.programs import uncompiled

H100 = dispatch.Target("cuda", "9.0", "NVIDIA H100 80GB HBM3")

# Library calls and kernels that are not XLA's own, by what their name begins with in the compiled program.
_CALLS = {"cuDNN calls": "__cudnn", "cuBLAS calls": "__cublas", "Mosaic kernels": "mosaic_gpu"}


def program(
    settings: Settings, kind: str, overrides: Sequence[str], vocab_size: int = 256, size: int = 1
) -> Iterator[Finding]:
    """Compile one program of a run: its step, its evaluation, or a step of decoding; size: of its pack."""
    dump = settings.scratch / "dump"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} --xla_dump_hlo_as_text"
    sharding = jax.sharding.SingleDeviceSharding(ptxas.absent_h100())

    def there(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    with dispatch.compiling_for(H100):
        lowered = _lowered(kind, overrides, vocab_size, size, there)
        compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    for what, amount in (
        ("arguments", memory.argument_size_in_bytes),
        ("results", memory.output_size_in_bytes - memory.alias_size_in_bytes),
        ("temporaries", memory.temp_size_in_bytes),
    ):
        yield Finding(what=what, value=amount / 1e6, unit="MB")
    if (largest := largest_temporary(dump)) is not None:
        yield Finding(what="largest temporary", value=largest.bytes / 1e6, unit=f"MB, {largest.shape}")
    text = compiled.as_text()
    for what, beginning in _CALLS.items():
        yield Finding(what=what, value=len(re.findall(f'custom_call_target="{re.escape(beginning)}', text)))
    spilled = spills(dump)
    yield Finding(what="kernels that spill", value=len(spilled), details={"spilled": spilled})


def _lowered(kind: str, overrides: Sequence[str], vocab_size: int, size: int, there: Any) -> Any:
    config = sized(compose([*overrides, "data=python_stdlib"]), vocab_size)  # the data are not read
    one, step, state, batch = uncompiled(config, vocab_size, size=size)
    params, numbers = there(state.params), there(state.hyperparameters.model)
    match kind:
        case "step":
            return jax.jit(step, donate_argnums=0).lower(there(state), there(batch))
        case "evaluation":
            score: Any = one.score
            return score.lower(params, numbers, there(batch))
        case "decode":
            room = config.backend.context_length
            caches = jax.eval_shape(lambda: empty_caches(one.model, _zeros(numbers), batch=1, capacity=room))
            token = jax.ShapeDtypeStruct((1, 1), jnp.int32)

            def decode(params: Any, token: Any, numbers: Any, caches: Any) -> Any:
                return one.model.scanned().apply({"params": params}, token, numbers, caches, method="decode")

            return jax.jit(decode).lower(params, there(token), numbers, there(caches))
    raise AssertionError(kind)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


@dataclass(frozen=True)
class Temporary:
    """A value in the compiler's memory for what no argument or result holds."""

    bytes: int
    shape: str


def largest_temporary(dump: Path) -> Temporary | None:
    """Return the largest value that the buffer assignment of the largest program there gives room of its own."""
    files = sorted(dump.glob("*buffer-assignment.txt"), key=lambda path: path.stat().st_size)
    if not files:
        return None
    found, temporary = [], False
    for line in files[-1].read_text("utf-8", errors="replace").splitlines():
        if line.startswith("allocation "):
            temporary = "preallocated-temp" in line
        elif temporary and (match := re.search(r"\(size=(\d+),offset=\d+\): (\S+)", line)):
            found.append(Temporary(int(match[1]), match[2].partition("{")[0]))
    return max(found, key=lambda each: each.bytes, default=None)


def spills(dump: Path) -> dict[str, int]:
    """Return kernel of XLA's → bytes a thread that the assembler puts into memory, of those that have any."""
    found = {}
    for path in sorted(dump.glob("*.ptx")):
        if not path.stat().st_size:  # a part of the program without a kernel
            continue
        command = ["ptxas", "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if said.returncode != 0:
            raise RuntimeError(f"ptxas: {(said.stderr or said.stdout).strip()[:300]}")
        for report in ptxas.parse(said.stderr + said.stdout):
            if report.spill_stores:
                found[report.kernel] = report.spill_stores
    return found
