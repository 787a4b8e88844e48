"""What the fault tests and the soak share: training processes, an untouched reference, and the check against it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.processes import ROOT, Process

from . import victim

STEPS = 24
# A run of 24 steps with a row every second, an evaluation every sixth, a checkpoint every fourth.
TINY = [
    "trainer=debug",
    f"trainer.steps={STEPS}",
    "trainer.log_every=2",
    "trainer.eval_every=6",
    "trainer.checkpoint_every=4",
    "trainer.checkpoint_minutes=null",
    "tracking.wandb.mode=disabled",
    "model.embedding_dim=32",
    "model.num_layers=1",
    "model.mlp_dim=32",
    "model.dropout=0.1",
    "backend.context_length=16",
    "evaluation.sequences=8",
]
DOCUMENTED = {0, 1, 2, 3, 4, 5, 6, 75}
WALL_CLOCK = "tokens_per_second"
PATIENCE = 120.0  # seconds until a process that should have ended is a failure


class Training(Process):
    """``python train.py OVERRIDES…`` with faults planted at the points."""

    def __init__(self, *overrides: str, cwd: Path, points: Sequence[str] = (), env: Mapping[str, str] | None = None):
        environment = os.environ | dict(env or {})
        super().__init__(
            str(ROOT / "train.py"), *overrides, cwd=cwd, env=environment, before=partial(victim.plant, tuple(points))
        )


def train(*overrides: str, cwd: Path, points: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Training:
    """A :class:`Training` that has ended; its exit code is ``.wait()``."""
    training = Training(*overrides, cwd=cwd, points=points, env=env)
    training.wait()
    return training


def real(*overrides: str, cwd: Path, env: Mapping[str, str | None] | None = None) -> tuple[int, str, str]:
    """``python train.py OVERRIDES…`` as a person starts it: exit code, standard output, standard error."""
    with start(*overrides, cwd=cwd, env=env) as process:
        out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def start(
    *overrides: str,
    cwd: Path,
    env: Mapping[str, str | None] | None = None,
    points: Sequence[str] = (),
    program: Sequence[str] = (str(ROOT / "train.py"),),
) -> subprocess.Popen[str]:
    """That process, running; with points it is the victim's. A variable that is None is taken away."""
    changed = dict(env or {})
    environment = {name: value for name, value in os.environ.items() if name not in changed}
    environment |= {name: value for name, value in changed.items() if value is not None}
    if points:
        program = [str(ROOT / "tests" / "faults" / "victim.py"), *points, "--"]
    return subprocess.Popen(
        [sys.executable, *program, *overrides],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )


# ---- run folders -----------------------------------------------------------------------------------------------------


def runs(cwd: Path, study: str = "default") -> list[Path]:
    folder = cwd / "outputs" / study
    return sorted(run for run in folder.iterdir() if run.is_dir() and run.name[0] != ".") if folder.is_dir() else []


def the_run(cwd: Path, study: str = "default") -> Path:
    (run,) = runs(cwd, study)
    return run


def summary(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "summary.json").read_text("utf-8"))
    return loaded


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without their wall-clock keys; the last line counts only where it is whole."""
    file = run / "metrics.jsonl"
    lines = file.read_text("utf-8").split("\n")[:-1] if file.exists() else []
    return [
        {key: value for key, value in json.loads(line).items() if key != WALL_CLOCK and not key.endswith("_seconds")}
        for line in lines
    ]


def last_step(run: Path) -> int:
    """Of the last row, 0 where there is none."""
    return max((row["step"] for row in rows(run)), default=0)


def steps(run: Path) -> list[int]:
    """Those with a checkpoint."""
    folder = run / "checkpoints"
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.is_dir() else []


def unsound(checkpoint: Path) -> str | None:
    """What is wrong with a committed checkpoint: judged by its files alone, without the product's code."""
    try:
        text, seal = (checkpoint / "manifest.json").read_bytes(), (checkpoint / "manifest.sha256").read_bytes()
        if sha256(text).hexdigest().encode() != seal:
            return "manifest.json is not what its seal says"
        manifest = json.loads(text)
        if manifest["step"] != int(checkpoint.name):
            return f"is for step {manifest['step']}"
        for name, digest in manifest["files"].items():
            if sha256((checkpoint / name).read_bytes()).hexdigest() != digest:
                return f"{name} is not what the manifest says"
    except OSError as error:
        return str(error)
    there = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()}
    beside = there - {"manifest.json", "manifest.sha256"} - set(manifest["files"])
    return f"holds files that no manifest names: {sorted(beside)}" if beside else None


@dataclass(frozen=True)
class Reference:
    """What a run came to that nobody touched."""

    state_sha256: str
    rows: list[dict[str, Any]]
    summary: dict[str, Any]

    @classmethod
    def of(cls, run: Path) -> Reference:
        found = summary(run)
        assert found["status"] == "done"
        return cls(found["state_sha256"], rows(run), found)


def committed_and_unsound(run: Path) -> list[str]:
    """Committed checkpoints that fail verification, each with the reason."""
    found = [(step, unsound(run / "checkpoints" / str(step))) for step in steps(run)]
    return [f"checkpoint {step}: {reason}" for step, reason in found if reason is not None]


def differences(run: Path, reference: Reference) -> list[str]:
    """In what a finished run differs from the reference: nothing, if FAULTS.md's promise was kept."""
    found = summary(run)
    wrong = committed_and_unsound(run)
    if found["status"] != "done":
        wrong.append(f"status {found['status']}")
    if found.get("state_sha256") != reference.state_sha256:
        wrong.append("other bits")
    counted = [row["step"] for row in rows(run)]
    if sorted(set(counted)) != counted:
        wrong.append(f"steps not once and in order: {counted}")
    if rows(run) != reference.rows:
        odd = [a["step"] for a, b in zip(rows(run), reference.rows, strict=False) if a != b]
        wrong.append(f"other metrics: {len(rows(run))} rows for {len(reference.rows)}, different at {odd}")
    same = ("val_loss", "val_bpb", "best_val_loss", "train_loss", "step", "committed_step", "num_params")
    wrong += [f"summary's {key}" for key in same if found.get(key) != reference.summary.get(key)]
    left = [str(file.relative_to(run)) for file in run.rglob("*") if file.name.startswith((".tmp-", ".deleting-"))]
    return wrong + [f"left behind: {name}" for name in left]


def until(condition: Callable[[], bool], training: Training | None = None, seconds: float = PATIENCE) -> None:
    """Waits for the condition; an error where the process ends first, or it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if training is not None and not training.running and not condition():
            raise AssertionError(f"ended first, with {training.wait()}: {training.out}{training.err}")
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def processes_with(variable: str, value: str) -> list[int]:
    """Living processes that were started with that environment variable, of Linux's /proc."""
    wanted, found = f"{variable}={value}".encode(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found
