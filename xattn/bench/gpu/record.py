"""What ``xattn bench gpu`` writes: outputs/bench/gpu.json, and its schema.

:class:`GpuBench` is the schema. docs/gpu.schema.json is the same as JSON Schema; it is renewed by
``python -m xattn.bench.gpu.record > docs/gpu.schema.json``. This module imports no jax.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from xattn.backend.proven import Evidence

Outcome = Literal["waiting", "running", "passed", "failed", "hung", "crashed", "out of memory", "cut short", "skipped"]
"""What became of a check.

failed: something measured missed a bar that it must hold, or the check raised an error. hung: it outlasted its own
limit. crashed: its process ended without a result. cut short: the command's time was up before the check's own limit.
"""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Finding(_Strict):
    """One thing that a check found."""

    what: str
    value: float | int | bool | str | None
    """A number that is not finite is null."""
    unit: str = ""
    bar: str = ""
    """What the value should be, such as ``≥ 1.15``; empty where there is no bar."""
    holds: bool | None = None
    """Whether the value is what it should be; null where there is no bar."""
    required: bool = True
    """Whether the check fails where the bar is missed. A missed bar of speed is a result, not an error."""
    details: dict[str, Any] = Field(default_factory=dict)
    evidence: Evidence | None = None
    """What a record of proven kernels is made of (``--keep``)."""


class CheckResult(_Strict):
    """One check and what became of it."""

    name: str
    about: str
    outcome: Outcome
    expected: Outcome = "passed"
    """Not ``passed`` for the stand-ins, which show that a check may hang or crash and cost only itself."""
    reason: str = ""
    """Why it did not pass, in a line."""
    limit_seconds: float
    seconds: float = 0.0
    findings: tuple[Finding, ...] = ()
    output: tuple[str, ...] = ()
    """The last lines that its process printed; empty where it passed."""

    @property
    def is_bad(self) -> bool:
        """Whether it ran and came to something else than it should have."""
        return self.has_run and self.outcome != self.expected

    @property
    def has_run(self) -> bool:
        return self.outcome not in ("waiting", "running", "cut short", "skipped")


class Device(_Strict):
    """The first device, as the check ``environment`` found it."""

    platform: str
    """cpu, cuda, rocm or tpu."""
    kind: str
    """jax's name of it, such as NVIDIA H100 80GB HBM3."""
    count: int
    compute_capability: str | None = None

    @property
    def is_cuda(self) -> bool:
        return self.platform == "cuda"

    @property
    def is_hopper(self) -> bool:
        return self.is_cuda and self.compute_capability == "9.0"


class GpuBench(_Strict):
    """One call of ``xattn bench gpu``. The file is replaced whenever something was found."""

    schema_version: Literal[2] = 2
    status: Literal["running", "done", "interrupted"]
    started_at: str
    seconds: float
    minutes: float
    """The limit that was asked for."""
    only: tuple[str, ...] = ()
    compiled_for: str | None = None
    """The device of ``--compile-only``; null where checks run on the one here."""
    git_commit: str | None
    git_dirty: bool | None
    versions: dict[str, str]
    cores: int
    device: Device | None = None
    """Null until the check ``environment`` has found it, or where that check did not pass."""
    checks: tuple[CheckResult, ...]
    kept: str | None = None
    """The file of the record that ``--keep`` wrote."""


if __name__ == "__main__":
    print(json.dumps(GpuBench.model_json_schema(), indent=2, ensure_ascii=False))
