"""``xattn bench gpu``: a check that hangs, crashes or exhausts memory costs only itself, and time and file are kept."""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest

from xattn import cli
from xattn.bench.gpu import command
from xattn.bench.gpu.checks import CHECKS, ENVIRONMENT, Check, Settings
from xattn.bench.gpu.record import CheckResult, Device, Finding, GpuBench, Outcome
from xattn.errors import BadInput

DOCS = Path(cli.__file__).resolve().parent.parent / "docs"
SCHEMA = DOCS / "gpu.schema.json"
RENEW = "python -m xattn.bench.gpu.record > docs/gpu.schema.json"
H100 = Device(platform="cuda", kind="NVIDIA H100 80GB HBM3", count=1, compute_capability="9.0")
FINDING = Finding(what="a number", value=2.0, bar="≤ 1.2", holds=False)


def record(folder: Path) -> GpuBench:
    """What is in the file, checked against the published schema."""
    text = (folder / "gpu.json").read_text("utf-8")
    jsonschema.validate(json.loads(text, parse_constant=pytest.fail), json.loads(SCHEMA.read_text("utf-8")))
    return GpuBench.model_validate_json(text)


def stand_in(name: str, **changes: Any) -> Check:
    """A row without a device's need, so that its process imports no jax."""
    return replace(Check(name, "", 20, f"stand_ins.{name}"), **changes)


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> Check:
    """An environment that is not looked at, which takes seconds."""
    check = replace(ENVIRONMENT, function="stand_ins.passes")
    monkeypatch.setattr(command, "ENVIRONMENT", check)
    monkeypatch.setattr(command, "CHECKS", (check, *CHECKS[1:]))
    return check


Answer = Callable[[Check], CheckResult]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Device, Answer], None]:
    """Checks are answered in this process; the environment has that device."""

    def use(device: Device, answer: Answer) -> None:
        def run_check(check: Check, settings: Settings, seconds: float, on_finding: Any) -> CheckResult:
            if check.name == "environment":
                found = Finding(what="device", value=device.kind, details=device.model_dump())
                return ended(check, "passed", found)
            assert settings.device == device
            assert 0 < seconds <= 540
            return answer(check)

        monkeypatch.setattr(command, "run_check", run_check)

    return use


def ended(check: Check, outcome: Outcome, *findings: Finding, reason: str = "") -> CheckResult:
    return CheckResult(
        name=check.name,
        about=check.about,
        outcome=outcome,
        expected=check.expected,
        reason=reason,
        limit_seconds=check.limit,
        seconds=1.0,
        findings=findings,
    )


@pytest.mark.usefixtures("no_device")
def test_each_stand_in_ends_as_it_should_and_the_next_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--only", "stand-in", "--output", str(tmp_path)]) == 0
    found = record(tmp_path)
    results = {result.name.removeprefix("stand-in-"): result for result in found.checks}
    assert (found.status, found.device) == ("done", None)
    ways = {name: (each.outcome, each.reason) for name, each in results.items() if name != "environment"}
    assert ways == {
        "passes": ("passed", ""),
        "misses": ("failed", "a number: 1.3 (bar ≤ 1.2)"),
        "raises": ("failed", "RuntimeError: planted"),
        "hangs": ("hung", "still running after 3 s; killed"),
        "crashes": ("crashed", "killed by signal 4 (SIGILL)"),
        "exits": ("crashed", "exited with code 42 and no result"),
        "exhausts": ("out of memory", "MemoryError"),
    }
    for name in ("raises", "hangs", "crashes", "exhausts"):
        assert len(results[name].findings) == 1, "what was found before the end is kept"
    assert results["exits"].output == ("a library's last words",)
    child = results["hangs"].findings[0].value
    assert isinstance(child, int)
    assert not _runs(child), "what a check has started is killed with it"
    out = capsys.readouterr().out
    assert "hung, as expected" in out
    assert "FAILED" not in out


def _runs(process: int) -> bool:
    """Whether it is there, and not as a zombie that nobody has asked about."""
    status = Path(f"/proc/{process}/stat")
    if status.parent.parent.exists() and Path("/proc/self").exists():
        return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("outcome", get_args(Outcome)[2:])
def test_every_outcome_of_every_check(
    outcome: Outcome, answers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(H100, lambda check: ended(check, outcome, FINDING, reason="because"))
    code = command.main(["--output", str(tmp_path)])
    bad = outcome in ("failed", "hung", "crashed", "out of memory")
    assert code == (1 if bad else 0)
    found = record(tmp_path)
    assert [result.name for result in found.checks] == [check.name for check in CHECKS]
    by_outcome = {result.name: result.outcome for result in found.checks[1:]}
    assert set(by_outcome.values()) == {outcome, "skipped"}
    assert {name for name, each in by_outcome.items() if each == "skipped"} >= {
        check.name for check in CHECKS if check.needs == "no GPU"
    }
    out = capsys.readouterr().out
    assert f"{outcome}: because" in out
    assert ("FAILED" in out) == bad
    assert ("MISSED" in out) == (outcome != "skipped"), "neighbours that were skipped are one row"


def test_a_stand_in_that_ends_otherwise_is_a_failure(answers: Any, tmp_path: Path) -> None:
    """Then the harness is broken, and no result of it counts."""
    answers(H100.model_copy(update={"platform": "cpu"}), lambda check: ended(check, "passed"))
    assert command.main(["--only", "stand-in-passes", "--output", str(tmp_path)]) == 0
    assert command.main(["--only", "stand-in-hangs", "--output", str(tmp_path)]) == 1


def test_the_commands_time_cuts_a_check_short_and_begins_no_other(
    no_device: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "CHECKS", (no_device, stand_in("hangs", limit=60), stand_in("passes", limit=60)))
    monkeypatch.setattr(command, "_LEAST_SECONDS", 0.3)
    began = time.monotonic()
    assert command.main(["--minutes", "0.1", "--output", str(tmp_path)]) == 0
    assert time.monotonic() - began < 6
    found = record(tmp_path)
    _, cut, left = found.checks
    assert (cut.outcome, left.outcome) == ("cut short", "skipped")
    assert cut.reason == "the command's time was up (--minutes)"
    assert left.reason == "no time left (--minutes)"
    assert found.seconds < 6


def test_checks_that_share_the_machine_run_at_once(
    no_device: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an interrupt ends them all."""
    pair = [replace(stand_in("hangs"), name=name, shares=True) for name in ("one", "other")]
    monkeypatch.setattr(command, "CHECKS", (no_device, *pair))
    monkeypatch.setattr(command, "_workers", lambda: 2)
    seen: list[int] = []
    outcomes: list[str] = []

    def save(self: command.Session, status: str) -> Path:
        found = [each for result in self.results.values() for each in result.findings if each.what == "process"]
        seen[:] = [int(str(each.value)) for each in found]
        outcomes[:] = [result.outcome for result in self.results.values() if result.name != "environment"]
        if len(seen) == 2 and "cut short" not in outcomes and status == "running":
            raise SystemExit(143)
        return tmp_path

    monkeypatch.setattr(command.Session, "_save", save)
    with pytest.raises(SystemExit):
        command.main(["--output", str(tmp_path)])
    assert len(seen) == 2
    assert sorted(outcomes) == ["cut short", "running"], "the one that was told of it, and the one that raised it"
    assert not any(_runs(process) for process in seen)


def test_the_file_has_what_is_found_while_a_check_runs(
    no_device: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run_check(check: Check, settings: Settings, seconds: float, on_finding: Any) -> CheckResult:
        seen.append(record(tmp_path))
        on_finding(ended(check, "running", FINDING))
        seen.append(record(tmp_path))
        raise SystemExit(143)  # as SIGTERM does

    monkeypatch.setattr(command, "run_check", run_check)
    with pytest.raises(SystemExit):
        command.main(["--only", "run", "--output", str(tmp_path)])
    before, during = seen
    assert [result.outcome for result in before.checks[:2]] == ["running", "waiting"]
    assert during.checks[0].findings == (FINDING,)
    assert record(tmp_path).status == "interrupted"


def test_without_a_gpu_each_check_that_needs_one_says_so(answers: Any, tmp_path: Path) -> None:
    cpu = Device(platform="cpu", kind="cpu", count=1)
    made: list[str] = []

    def answer(check: Check) -> CheckResult:
        made.append(check.name)
        return ended(check, check.expected)

    answers(cpu, answer)
    assert command.main(["--output", str(tmp_path)]) == 0
    skipped = {result.name: result.reason for result in record(tmp_path).checks if result.outcome == "skipped"}
    assert {name.partition("-")[0] for name in made} == {"run", "stand"}
    assert skipped["accuracy-sigmoid-128"] == "needs a CUDA device of compute capability 9.0 (H100, H200)"
    assert skipped["packs"] == "needs a CUDA device"
    assert {*made, *skipped, "environment"} == {check.name for check in CHECKS}


def test_json_is_all_that_stdout_gets(answers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers(H100, lambda check: ended(check, "failed", FINDING))
    assert command.main(["--json", "--only", "train", "--output", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert GpuBench.model_validate_json(out) == record(tmp_path)
    assert "train-softmax: failed" in err


def test_only_takes_checks_and_beginnings_and_names_them() -> None:
    chosen = command._chosen(["run-pack", "times-sigmoid"], CHECKS)
    names = [check.name for check in chosen]
    assert names[:2] == ["environment", "run-pack"]
    assert all(name.startswith("times-sigmoid-") for name in names[2:])
    with pytest.raises(BadInput, match=r"--only = rnu: no check's name begins with this; they begin with accuracy, "):
        command._chosen(["run", "rnu"], CHECKS)


def test_every_row_names_a_function_that_takes_its_arguments() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert CHECKS[0] is ENVIRONMENT
    for check in CHECKS:
        inspect.signature(check.load()).bind(Settings(Path(), None), **check.arguments)
        assert 0 < check.limit <= 120


def test_the_published_schema_is_the_models() -> None:
    assert json.loads(SCHEMA.read_text("utf-8")) == GpuBench.model_json_schema(), f"renew it: {RENEW}"


@pytest.mark.slow
def test_a_run_is_made_and_looked_at_where_there_is_no_gpu(tmp_path: Path) -> None:
    """Whatever the machine has: from the command to the loss curve, in processes."""
    assert command.main(["--only", "run-sigmoid-float32", "--output", str(tmp_path)]) == 0
    environment, run = record(tmp_path).checks
    assert environment.findings[0].what == "device"
    loss = next(finding for finding in run.findings if finding.what == "loss")
    assert loss.holds
    assert len(loss.details["train_loss"]) == 20
