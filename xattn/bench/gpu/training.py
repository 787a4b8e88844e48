"""Whole training steps: speed, packs and long contexts, by the benches that measure them, each in one more process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xattn.bench.gpu.checks import Settings
from xattn.bench.gpu.record import Finding
from xattn.errors import XattnError

_GPT2 = ["--models", "gpt2", "--vocab-size", "50304"]
_BY = {"softmax": "cudnn", "sigmoid": "hopper", "none": "linear"}


def speed(settings: Settings, name: str) -> Iterator[Finding]:
    """Tokens a second and utilisation of 124M parameters, 16 × 1024 tokens; nanoGPT beside softmax if it is given."""
    sizes = ["backend.context_length=1024", "trainer.batch_size=16"]
    peer: list[str] = []
    if settings.peer is not None and name == "softmax":
        python = [] if settings.peer_python is None else ["--peer-python", settings.peer_python]
        peer = ["--peer", str(settings.peer), *python]
    yield from _steps(settings, name, [*sizes, *peer])


def context(settings: Settings, name: str) -> Iterator[Finding]:
    """A training step of 124M parameters with a long context, one sequence, everything but its attention recomputed."""
    length = {"none": 65536, "sigmoid": 32768}[name]
    sizes = [f"backend.context_length={length}", "trainer.batch_size=1", "model.remat=dots", "--repeats", "2"]
    yield from _steps(settings, name, sizes)


def _steps(settings: Settings, name: str, arguments: Sequence[str]) -> Iterator[Finding]:
    chosen = [f"backend.implementation={_BY[name]}", "--activations", name, *_GPT2]
    found = _bench(settings, "train", [*chosen, *arguments])
    result, peer = found["results"][0], found["peer"]
    milliseconds = result["median_seconds"] * 1e3
    yield Finding(what=f"a step by {_BY[name]}", value=milliseconds, unit="ms", details=result)
    yield Finding(what="tokens a second", value=result["tokens_per_second"])
    yield Finding(what="model FLOP/s utilisation", value=result["mfu"])
    yield Finding(what="memory", value=result["memory_bytes"] / 1e9, unit="GB")
    if peer:
        yield Finding(what="over nanoGPT", value=result["ratio_to_peer"], unit="×", details=peer)


def packs(settings: Settings) -> Iterator[Finding]:
    """Steps a second of packs of tiny runs, beside one run's."""
    found = _bench(settings, "sweep", ["--packs", "1", "4", "16", "64"], file="packs")
    for row in found["packs"]:
        rate = f"{row['steps_per_second']:,.0f} steps/s, × {row['times_one']:.2f}"
        yield Finding(what=f"{row['runs']} runs", value=rate, details=row)


def _bench(settings: Settings, part: str, arguments: Sequence[str], file: str | None = None) -> dict[str, Any]:
    """Return what a part of ``xattn bench`` measures, as it writes it."""
    command = [sys.executable, "-m", "xattn.cli", "bench", part, *arguments, "--output", str(settings.scratch)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        telling = [line for line in lines if "RESOURCE_EXHAUSTED" in line]
        raise XattnError(f"xattn bench {part} exited with {done.returncode}: {' | '.join([*telling[:1], *lines[-2:]])}")
    loaded: dict[str, Any] = json.loads((settings.scratch / Path(f"{file or part}.json")).read_text("utf-8"))
    return loaded
