"""``xattn bench gpu``: everything that only a GPU can show, in one command and ten minutes, whatever fails on the way.

    xattn bench gpu                                     # all that this machine can, in 9 minutes
    xattn bench gpu --only run accuracy --minutes 4     # the checks whose names begin so
    xattn bench gpu --keep                              # and a record of the kernels that auto may take here
    xattn bench gpu --compile-only h100                 # programs for an H100 that is not here

Each check (xattn/bench/gpu/checks.py) is a process with a time limit of its own, so that a hang, a crash or an illegal
instruction costs that check alone. outputs/bench/gpu.json is replaced whenever something was found. Without a GPU the
debug runs are made on the CPU, and stand-ins show how checks end. This process never looks at a device.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from rich.table import Table

from xattn.bench.gpu.checks import CHECKS, ENVIRONMENT, Check, Settings
from xattn.bench.gpu.child import shown
from xattn.bench.gpu.compiled import DEVICES, checks as compiled_checks
from xattn.bench.gpu.keep import keep
from xattn.bench.gpu.record import CheckResult, Device, GpuBench
from xattn.bench.gpu.supervise import end_all, run_check
from xattn.errors import BadInput
from xattn.runs.provenance import git_state, versions
from xattn.runs.run_folder import to_json, write_atomically
from xattn.system.arguments import Parser, number
from xattn.tracking.display import Screen

# A check is not begun with less time than it takes to import jax and to find out that there is not enough.
_LEAST_SECONDS = 10.0
# Kept back for the end of a killed process and the last writes.
_RESERVE_SECONDS = 3.0
_MINUTES, _MINUTES_TO_COMPILE = 9.0, 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if nothing that ran came to a bad end, else 1."""
    began = time.monotonic()
    options = _parser().parse_args(argv)
    if options.minutes is None:
        options.minutes = _MINUTES if options.compile_only is None else _MINUTES_TO_COMPILE
    chosen = _chosen(options.only, CHECKS if options.compile_only is None else compiled_checks())
    session = Session(options, began, chosen)
    with _signals():
        session.run()
    return 1 if any(result.is_bad for result in session.results.values()) else 0


def _parser() -> Parser:
    parser = Parser(
        prog="xattn bench gpu", description="Check what only a GPU can show, each check in its own process."
    )
    limits = f"in total; default {_MINUTES:g}, and {_MINUTES_TO_COMPILE:g} with --compile-only"
    parser.add_argument("--minutes", type=number(0, above=True), metavar="M", help=limits)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of checks, or their beginnings")
    parser.add_argument("--keep", action="store_true", help="record the proven kernels, so that auto may choose them")
    parser.add_argument(
        "--compile-only", choices=DEVICES, help="only compile for such a device, which need not be present"
    )
    parser.add_argument("--json", action="store_true", help="print the content of gpu.json instead of a table")
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="a checkout of nanoGPT, to compare with")
    parser.add_argument("--peer-python", metavar="PYTHON", help="a Python interpreter with torch")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    return parser


def _chosen(only: Sequence[str] | None, checks: Sequence[Check]) -> list[Check]:
    """Return the checks to make, the environment always first among them. Raises :class:`BadInput`."""
    if only is None:
        return list(checks)
    for name in only:
        if not any(_is_named(check, name) for check in checks):
            groups = sorted({check.name.partition("-")[0] for check in checks})
            raise BadInput(f"--only = {name}: no check's name begins with this; they begin with {', '.join(groups)}")
    return [check for check in checks if check is ENVIRONMENT or any(_is_named(check, name) for name in only)]


def _is_named(check: Check, name: str) -> bool:
    return check.name == name or check.name.startswith(f"{name}-")


@dataclass
class Session:
    """One call of the command: what is asked, and what is known so far."""

    options: Any
    began: float
    chosen: list[Check]
    device: Device | None = None
    results: dict[str, CheckResult] = field(default_factory=dict)
    kept: str | None = None
    started_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._screen = Screen(stderr=self.options.json)
        self._facts = {"versions": versions(), **dict(zip(("git_commit", "git_dirty"), git_state(), strict=True))}
        self.results = {check.name: _not_yet(check) for check in self.chosen}

    def run(self) -> None:
        """Make the checks, keep the record where that is asked for, and print what was found."""
        status = "interrupted"
        try:
            for shares, checks in itertools.groupby(self.chosen, key=lambda check: check.shares):
                self._make_all(list(checks), at_once=_workers() if shares else 1)
            if self.options.keep:
                self._keep()
            status = "done"
        finally:
            path = self._save(status)
        if self.options.json:
            print(path.read_text("utf-8"), end="")
            return
        self._screen.print_table(_table(self.results.values()))
        self._screen.say(f"written: {path}" + (f"\nrecord: {self.kept}" if self.kept else ""))

    def _make_all(self, checks: Sequence[Check], *, at_once: int) -> None:
        pool = ThreadPoolExecutor(at_once)
        try:
            made = [pool.submit(self._make, check) for check in checks]
            wait(made, return_when=FIRST_EXCEPTION)
            for each in made:
                if each.done():
                    each.result()
        except BaseException:  # an interrupt too: nothing that was started may outlive the command
            pool.shutdown(wait=False, cancel_futures=True)
            end_all()
            raise
        finally:
            pool.shutdown()

    def _make(self, check: Check) -> None:
        left = self.options.minutes * 60 - (time.monotonic() - self.began) - _RESERVE_SECONDS
        asked = self.options.only or ()
        wanted_anyway = check.needs == "no GPU" and any(_is_named(check, name) for name in asked)
        reason = None if wanted_anyway else check.why_not(self.device)
        if reason is None and left < min(_LEAST_SECONDS, check.limit):
            reason = "no time left (--minutes)"
        if reason is not None:
            self._note(self.results[check.name].model_copy(update={"outcome": "skipped", "reason": reason}))
            return
        self._note(self.results[check.name].model_copy(update={"outcome": "running"}))
        settings = Settings(Path(), self.device, self.options.peer, self.options.peer_python)
        result = run_check(check, settings, left, self._note)
        if check is ENVIRONMENT:
            self.device = next((Device(**each.details) for each in result.findings if each.what == "device"), None)
        self._note(result)
        self._screen.say(f"{result.name}: {_ending(result)}  {result.seconds:.1f} s")

    def _keep(self) -> None:
        evidence = [each.evidence for result in self.results.values() for each in result.findings if each.evidence]
        if self.device is None or not self.device.is_hopper or not evidence:
            self._screen.say("--keep: nothing was measured for a record; that needs an H100 or H200")
            return
        self.kept = str(keep(self.device.kind, evidence, made_at=self.started_at))

    def _note(self, result: CheckResult) -> None:
        with self._lock:
            self.results[result.name] = result
            self._save("running")

    def _save(self, status: Any) -> Path:
        record = GpuBench(
            status=status,
            started_at=self.started_at,
            seconds=round(time.monotonic() - self.began, 1),
            minutes=self.options.minutes,
            compiled_for=self.options.compile_only,
            only=tuple(self.options.only or ()),
            cores=os.cpu_count() or 1,
            device=self.device,
            checks=tuple(self.results.values()),
            kept=self.kept,
            **self._facts,
        )
        self.options.output.mkdir(parents=True, exist_ok=True)
        target = self.options.compile_only
        path: Path = self.options.output / ("gpu.json" if target is None else f"gpu-{target}.json")
        write_atomically(path, to_json(record.model_dump(), indent=1) + "\n")
        return path


def _workers() -> int:
    """Return how many checks may share the machine: a run, and the same on a CPU, are given four cores."""
    return max(1, (os.cpu_count() or 1) // 4)


def _not_yet(check: Check) -> CheckResult:
    return CheckResult(
        name=check.name,
        about=check.about,
        outcome="waiting",
        expected=check.expected,
        limit_seconds=check.limit,
    )


def _ending(result: CheckResult) -> str:
    """Return how a check ended, in words."""
    as_it_should = result.has_run and result.outcome == result.expected != "passed"
    words = f"{result.outcome}, as expected" if as_it_should else result.outcome
    return f"{words}: {result.reason}" if result.reason and not as_it_should else words


def _table(results: Iterable[CheckResult]) -> Table:
    """Return every finding with its bar; neighbours that were skipped for one reason are one row."""
    table = Table("check", "found", "value", "bar", "", box=None, pad_edge=False)
    for skipped, alike in itertools.groupby(results, key=lambda each: each.outcome == "skipped" and each.reason):
        of_row = list(alike)
        if skipped and len(of_row) > 1:
            table.add_row(f"{len(of_row)} checks", _ending(of_row[0]), f"{of_row[0].name} to {of_row[-1].name}")
            continue
        for result in of_row:
            _add(table, result)
    return table


def _add(table: Table, result: CheckResult) -> None:
    table.add_row(result.name, _ending(result), "", "", "FAILED" if result.is_bad else "")
    for each in result.findings if result.expected == "passed" else ():
        verdict = "" if each.holds is not False else ("MISSED" if each.required else "missed")
        table.add_row("", f"  {each.what}", f"{shown(each.value)} {each.unit}".strip(), each.bar, verdict)


@contextmanager
def _signals() -> Iterator[None]:
    """Leave on SIGTERM as on an interrupt: the process of the check that runs is ended first."""

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
