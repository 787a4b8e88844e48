"""Checks that stand in for others: each ends in a way that a check on a GPU may end. They import no jax."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from xattn.bench.gpu.checks import Settings
from xattn.bench.gpu.record import Finding


def passes(settings: Settings) -> Iterator[Finding]:
    """Keep a bar, and miss one of speed, which fails nothing."""
    yield Finding(what="a number", value=1.0, bar="≤ 1.2", holds=True)
    yield Finding(what="a speed", value=0.5, unit="×", bar="≥ 1", holds=False, required=False)


def misses(settings: Settings) -> Iterator[Finding]:
    """Miss a bar that has to be kept."""
    yield Finding(what="a number", value=1.3, bar="≤ 1.2", holds=False)


def raises(settings: Settings) -> Iterator[Finding]:
    """Find something, then raise an error."""
    yield Finding(what="a number", value=1.0)
    raise RuntimeError("planted\nwith a second line")


def hangs(settings: Settings) -> Iterator[Finding]:
    """Find something, then hang with a process of its own, which both ignore the signal that asks them to end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield Finding(what="process", value=child.pid)
    time.sleep(600)


def crashes(settings: Settings) -> Iterator[Finding]:
    """Find something, then die of an illegal instruction."""
    yield Finding(what="a number", value=1.0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), signal.SIGILL)


def exits(settings: Settings) -> Iterator[Finding]:
    """Leave the process as a library's fatal error does: with a code and without a result."""
    print("a library's last words", flush=True)
    yield from ()
    os._exit(42)


def exhausts(settings: Settings) -> Iterator[Finding]:
    """Ask for more memory than the process may have."""
    yield Finding(what="a number", value=1.0)
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    yield Finding(what="bytes", value=len(bytearray(2**32)))
