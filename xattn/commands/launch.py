"""``xattn launch --processes N -- train.py OVERRIDES…``: one run over several processes of this machine.

Environment variables (:mod:`xattn.system.hosts`) give each process its place. The processes live and die together.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from xattn.errors import BadInput
from xattn.system.arguments import Parser, whole
from xattn.system.hosts import COORDINATOR, COUNT, INDEX
from xattn.system.signals import DEMANDS, WARNINGS

# With these exit codes all processes of a run leave by themselves; any other means that one died and the rest are lost.
_TOGETHER = {0, 2, 3, 4, 5, 6, 75}
_SECONDS_TO_LEAVE = 30.0


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="xattn launch",
        description="Start a Python program as several processes of one run on this machine. Process i gets GPU i.",
        epilog="xattn launch --processes 2 -- train.py parallel=data",
    )
    parser.add_argument("--processes", type=whole(1), required=True, metavar="N")
    parser.add_argument(
        "--port", type=whole(1, 65536), help="where process 0 listens for the others; default: a free one"
    )
    parser.add_argument("command", nargs="+", metavar="-- PROGRAM ARGUMENTS", help="a Python file and its arguments")
    arguments = parser.parse_args(argv)
    if not Path(arguments.command[0]).is_file():
        raise BadInput(f"{arguments.command[0]}: no such file; give a Python program")
    return _run_together(arguments.command, arguments.processes, arguments.port or _free_port())


def _run_together(command: Sequence[str], count: int, port: int) -> int:
    """Start the processes, wait for all, passing signals on, and return the exit code of the first failure, else 0.

    If one has died, the rest are killed; if one has failed, they are killed unless they leave in time. Code 0 sets no
    deadline for the rest: process 0 may still be flushing wandb.
    """
    received: deque[int] = deque()
    for number in (*DEMANDS, *WARNINGS):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: received.append(number))
    shared = {COORDINATOR: f"localhost:{port}", COUNT: str(count)}
    # Each has its own session: a terminal's Ctrl-C reaches only this process, which passes it on once.
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            env={"JAX_LOCAL_DEVICE_IDS": str(index)} | os.environ | shared | {INDEX: str(index)},
            stdout=None if index == 0 else subprocess.DEVNULL,
            start_new_session=True,
        )
        for index in range(count)
    ]
    first_failure, deadline = 0, float("inf")
    while running:
        while received:
            passed_on = received.popleft()
            for process in running:
                process.send_signal(passed_on)
        for process in list(running):
            if (code := process.poll()) is None:
                continue
            running.remove(process)
            code = code if code >= 0 else 128 - code
            first_failure = first_failure or code
            patience = _SECONDS_TO_LEAVE if code in _TOGETHER else 0.0
            if code:
                deadline = min(deadline, time.monotonic() + patience)
        if time.monotonic() >= deadline:
            for process in running:
                process.kill()
        time.sleep(0.05)
    return first_failure


def _free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])
