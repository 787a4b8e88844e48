"""The process of one check: ``python -m xattn.bench.gpu.child``, which ``xattn bench gpu`` starts.

Each finding is a line of JSON in a file as soon as it is there; the last line says how the check ended. Where that line
is missing, the process was killed or crashed.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

from xattn.bench.gpu.checks import Check, Settings
from xattn.bench.gpu.record import Device
from xattn.errors import first_line
from xattn.runs.run_folder import to_json

OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")


def task(check: Check, settings: Settings) -> str:
    """Return what the process reads: the check and its settings as JSON."""
    return json.dumps(
        {
            "name": check.name,
            "function": check.function,
            "arguments": dict(check.arguments),
            "scratch": str(settings.scratch),
            "device": None if settings.device is None else settings.device.model_dump(),
            "peer": None if settings.peer is None else str(settings.peer),
            "peer_python": settings.peer_python,
        }
    )


def main(task: str, findings: Path) -> None:
    """Carry out the check; its findings and its end go into the file."""
    given: dict[str, Any] = json.loads(task)
    device = None if given["device"] is None else Device(**given["device"])
    peer = None if given["peer"] is None else Path(given["peer"])
    settings = Settings(Path(given["scratch"]), device, peer, given["peer_python"])
    check = Check(given["name"], "", 0, given["function"], given["arguments"])
    with findings.open("a", encoding="utf-8") as file:
        outcome, reason = _run(check, settings, file)
        _write(file, {"outcome": outcome, "reason": reason})


def _run(check: Check, settings: Settings, file: TextIO) -> tuple[str, str]:
    missed = []
    try:
        for finding in check.load()(settings, **check.arguments):
            _write(file, {"finding": finding.model_dump(mode="json")})
            if finding.required and finding.holds is False:
                missed.append(f"{finding.what}: {shown(finding.value)} (bar {finding.bar})")
    except MemoryError as error:
        traceback.print_exc()
        return "out of memory", first_line(error)
    except Exception as error:  # the rim of the check: whatever a compiler or a driver says
        traceback.print_exc()
        outcome = "out of memory" if any(words in str(error) for words in OUT_OF_MEMORY) else "failed"
        return outcome, f"{type(error).__name__}: {first_line(error)[:300]}"
    return ("failed", "; ".join(missed)) if missed else ("passed", "")


def shown(value: Any) -> str:
    """Return a value as a table shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(file: TextIO, line: dict[str, Any]) -> None:
    file.write(to_json(line) + "\n")
    file.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
