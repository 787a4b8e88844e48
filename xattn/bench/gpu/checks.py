"""The checks of ``xattn bench gpu``, in the order of their value. A new check is a function and a row here.

Each row names its function, which runs in a process of its own, and so may hang, crash or leave the device unusable. A
function takes the command's :class:`Settings` and the row's arguments, and yields findings as they come: what it had
found before it was killed is kept. This module imports no jax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, Literal

from xattn.bench.gpu.record import Device, Finding, Outcome

Needs = Literal["nothing", "no GPU", "cuda", "hopper"]


@dataclass(frozen=True)
class Settings:
    """What the command hands to the process of a check."""

    scratch: Path
    """A folder of this check's own, deleted afterwards."""
    device: Device | None
    """None where it is not known: while the environment is looked at, or where that went wrong."""
    peer: Path | None = None
    """A checkout of nanoGPT."""
    peer_python: str | None = None
    """An interpreter with torch."""


@dataclass(frozen=True)
class Check:
    """A row of the table."""

    name: str
    about: str
    limit: float
    """Seconds, after which its process is killed."""
    function: str
    """``module.function``, in this package."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: Needs = "nothing"
    expected: Outcome = "passed"
    shares: bool = False
    """Whether it may run beside others on a machine with enough cores: it measures no times and is small."""

    def load(self) -> Callable[..., Iterator[Finding]]:
        """Returns the function: (settings, **arguments) → findings."""
        module, _, name = self.function.rpartition(".")
        found: Callable[..., Iterator[Finding]] = getattr(import_module(f"xattn.bench.gpu.{module}"), name)
        return found

    def why_not(self, device: Device | None) -> str | None:
        """Return why it can't run on that device, or None."""
        match self.needs:
            case "cuda" if device is None or not device.is_cuda:
                return "needs a CUDA device"
            case "hopper" if device is None or not device.is_hopper:
                return "needs a CUDA device of compute capability 9.0 (H100, H200)"
            case "no GPU" if device is not None and device.is_cuda:
                return "shows how checks end where there is no GPU to check; name it to run it"
        return None


ENVIRONMENT = Check("environment", "device, driver, versions, free memory", 90, "environment.look")

ACTIVATIONS, POINTWISE = ("softmax", "sigmoid", "none"), ("sigmoid", "none")
_KINDS = ["backend.activation=none", "backend.every=2", "backend.then={activation: softmax}"]

_RUNS = (
    *(
        Check(
            f"run-{name}-{dtype}",
            "a debug run through auto; its loss curve against the CPU's",
            90,
            "runs.compare_with_cpu",
            {"overrides": [f"backend.activation={name}", f"model.dtype={dtype}"]},
            shares=True,
        )
        for dtype, name in product(("float32", "bfloat16"), ACTIVATIONS)
    ),
    Check("run-pack", "a pack of 4 against the same runs alone on a CPU", 120, "runs.pack", shares=True),
    Check("run-kinds", "two kinds of layers", 90, "runs.compare_with_cpu", {"overrides": _KINDS}, shares=True),
    Check("run-decay", "input decay", 90, "runs.compare_with_cpu", {"overrides": ["backend.decay=input"]}, shares=True),
    Check("run-generation", "text from a run's model, twice the same", 90, "runs.generation", shares=True),
    Check("run-deterministic", "deterministic=true, twice to the same bits", 90, "runs.deterministic", shares=True),
    Check(
        "run-resume", "kill −9 and resume, to the bits of a run left alone", 120, "runs.kill_and_resume", shares=True
    ),
)

_KERNELS = (
    *(
        Check(
            f"accuracy-{name}-{length}",
            "the hopper kernels against float64: out, dq, dk, dv",
            90,
            "kernels.accuracy",
            {"activation": name, "length": length},
            "hopper",
        )
        for length, name in product((128, 1000, 1024, 4096, 32768), POINTWISE)
    ),
    *(
        Check(
            f"times-{name}-{width}-{length}",
            "the hopper kernels beside cuDNN's softmax and what auto would take",
            60,
            "kernels.times",
            {"activation": name, "width": width, "length": length},
            "hopper",
        )
        for name, lengths in (("sigmoid", (1024, 4096, 16384)), ("none", (2048, 8192, 32768)))
        for length, width in product(lengths, (64, 128))
    ),
    *(
        Check(
            f"tiles-{name}-{width}",
            "other tiles, the most promising first, each against the best so far",
            120,
            "kernels.tiles",
            {"activation": name, "width": width},
            "hopper",
        )
        for name, width in product(POINTWISE, (64, 128))
    ),
)

_TRAINING = (
    Check("train-softmax", "tokens/s and MFU of 124M parameters", 120, "training.speed", {"name": "softmax"}, "cuda"),
    Check("train-sigmoid", "the same by the hopper kernels", 120, "training.speed", {"name": "sigmoid"}, "hopper"),
    Check("packs", "packs of 1, 4, 16, 64 tiny runs", 120, "training.packs", {}, "cuda"),
    Check("context-none", "a context of 65,536", 120, "training.context", {"name": "none"}, "cuda"),
    Check("context-sigmoid", "a context of 32,768", 120, "training.context", {"name": "sigmoid"}, "hopper"),
)

_STAND_INS: tuple[tuple[str, str, float, Outcome], ...] = (
    ("passes", "keeps its bar", 20, "passed"),
    ("misses", "misses a bar that it must keep", 20, "failed"),
    ("raises", "raises an error", 20, "failed"),
    ("hangs", "never ends, and neither does the process that it started", 3, "hung"),
    ("crashes", "runs an instruction that there is not", 20, "crashed"),
    ("exits", "leaves without a result", 20, "crashed"),
    ("exhausts", "asks for more memory than there is", 20, "out of memory"),
)

CHECKS: tuple[Check, ...] = (
    ENVIRONMENT,
    *_RUNS,
    *_KERNELS,
    *_TRAINING,
    *(
        Check(f"stand-in-{name}", about, limit, f"stand_ins.{name}", {}, "no GPU", outcome, shares=True)
        for name, about, limit, outcome in _STAND_INS
    ),
)


def named(name: str) -> Check:
    """Return the check of that name."""
    return next(check for check in CHECKS if check.name == name)
