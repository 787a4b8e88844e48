"""One check in a process of its own, watched: it is killed with all that it has started when its time is up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from xattn.bench.gpu.checks import Check, Settings
from xattn.bench.gpu.child import task
from xattn.bench.gpu.record import CheckResult, Finding, Outcome

_POLL_SECONDS = 0.2
_LAST_LINES = 12
# For a process that was killed. One that waits for a driver can't end; it is left behind.
_GRACE_SECONDS = 2.0
_SHARING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # else the first would take most of the GPU's memory

_running: set[subprocess.Popen[bytes]] = set()


def run_check(
    check: Check, settings: Settings, seconds: float, on_finding: Callable[[CheckResult], None]
) -> CheckResult:
    """Carry out a check for at most that many seconds and its own limit; ``on_finding`` gets what is known so far."""
    began, limit = time.monotonic(), min(check.limit, seconds)
    result = CheckResult(
        name=check.name, about=check.about, outcome="running", expected=check.expected, limit_seconds=check.limit
    )
    with tempfile.TemporaryDirectory(prefix="xattn-gpu-", ignore_cleanup_errors=True) as folder:
        findings, output, scratch = Path(folder, "findings"), Path(folder, "output"), Path(folder, "scratch")
        scratch.mkdir()
        findings.touch()
        command = [sys.executable, "-m", "xattn.bench.gpu.child", task(check, replace(settings, scratch=scratch))]
        with output.open("wb") as printed:
            process = subprocess.Popen(
                [*command, str(findings)],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | (_SHARING if check.shares else {}),
            )
        _running.add(process)
        known = 0
        try:
            while process.poll() is None and time.monotonic() - began < limit:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
                found, _ = _read(findings)
                if len(found) > known:
                    known = len(found)
                    on_finding(result.model_copy(update={"findings": found}))
            code = process.poll()
            interrupted = process not in _running
        finally:
            _kill(process)
            _running.discard(process)
        found, end = _read(findings)
        if end is None and interrupted:
            end = "cut short", "the command was interrupted"
        outcome, reason = end or _without_end(code, check.limit, cut=limit < check.limit)
        bad = outcome != "passed"
        return result.model_copy(
            update={
                "outcome": outcome,
                "reason": reason,
                "seconds": round(time.monotonic() - began, 2),
                "findings": found,
                "output": tuple(_last_lines(output)) if bad else (),
            }
        )


def end_all() -> None:
    """End every check that runs, whichever thread watches it."""
    for process in tuple(_running):
        _running.discard(process)
        _kill(process)


def _read(path: Path) -> tuple[tuple[Finding, ...], tuple[Outcome, str] | None]:
    """Return the findings, and how the check ended if it got that far; a line that a crash cut off is left out."""
    found, end = [], None
    for line in path.read_text("utf-8").splitlines():
        with contextlib.suppress(ValueError):
            loaded = json.loads(line)
            if "finding" in loaded:
                found.append(Finding.model_validate_json(json.dumps(loaded["finding"])))
            else:
                end = loaded["outcome"], loaded["reason"]
    return tuple(found), end


def _without_end(code: int | None, limit: float, *, cut: bool) -> tuple[Outcome, str]:
    """Say what became of a process that left no result; code is None where it was still running."""
    if code is None:
        if cut:
            return "cut short", "the command's time was up (--minutes)"
        return "hung", f"still running after {limit:g} s; killed"
    if code == -signal.SIGKILL:
        return "out of memory", "killed by signal 9, as the system does where memory runs out"
    if code < 0:
        return "crashed", f"killed by signal {-code} ({signal.Signals(-code).name})"
    return "crashed", f"exited with code {code} and no result"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it has started: they are a session of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_SECONDS)


def _last_lines(path: Path) -> list[str]:
    text = path.read_text("utf-8", errors="replace")
    return [line[:300] for line in text.splitlines() if line.strip()][-_LAST_LINES:]
