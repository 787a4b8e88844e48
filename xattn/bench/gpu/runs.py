"""Debug runs: does training on this device come to what a CPU comes to? Every run is a process of its own.

Without a GPU the run itself is checked, and nothing is compared: both would be the same.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xattn.bench.gpu.checks import Settings
from xattn.bench.gpu.record import Finding
from xattn.errors import XattnError

_XATTN = [sys.executable, "-m", "xattn.cli"]
_DEBUG = ["trainer=debug", "trainer.log_every=1", "evaluation.sequences=16", "tracking.wandb.mode=disabled"]

# How far a loss of 20 steps may be from the CPU's, in nats a token. On a CPU the float32 curves of softmax, sigmoid and
# none move by 0.0009, 0.0012 and 0.0205 where the factors of every projection are rounded to bfloat16; TF32, in which a
# GPU multiplies float32, rounds an eighth as much. The bfloat16 curves move by up to 0.027 if other sums are rounded.
TOLERANCE = {"float32": 1e-2, "bfloat16": 6e-2}

Row = dict[str, Any]


class Run:
    """A training that was started, in a folder of its own."""

    def __init__(self, folder: Path, overrides: Sequence[str], *, on_cpu: bool = False):
        """Start it; ``on_cpu``: whatever devices there are."""
        self.folder, self._log = folder, folder.with_suffix(".log")
        environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if on_cpu else {})
        place = f"hydra.{'sweep' if '-m' in overrides else 'run'}.dir={folder}"
        with self._log.open("ab") as log:
            command = [*_XATTN, "train", *overrides, *_DEBUG, place]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def finish(self) -> Run:
        """Wait for its end. Raises :class:`XattnError` where that is none of a run that is done."""
        code = self.process.wait()
        if code != 0:
            raise XattnError(f"{self.folder.name}: the run exited with {code}: {self.words()}")
        return self

    def words(self) -> str:
        """Return the last words it printed, those of an exhausted memory first."""
        lines = [line.strip() for line in self._log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "RESOURCE_EXHAUSTED" in line]
        return " | ".join([*telling[:1], *lines[-2:]])[-600:]

    def rows(self) -> list[Row]:
        """Return the rows of metrics.jsonl so far; one that is being written is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def summary(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / "summary.json").read_text("utf-8"))
        return loaded


def compare_with_cpu(settings: Settings, overrides: Sequence[str]) -> Iterator[Finding]:
    """A run through ``auto``, and its losses beside those of the same run on a CPU, which trains at the same time."""
    elsewhere = Run(settings.scratch / "cpu", overrides, on_cpu=True) if _is_gpu(settings) else None
    here = Run(settings.scratch / "here", overrides).finish()
    summary, rows = here.summary(), here.rows()
    yield Finding(
        what="attention by",
        value=json.dumps(summary["implementation"]).strip('"'),
        details={"passed_over": summary["passed_over"]},
    )
    yield _falls(rows)
    if elsewhere is not None:
        dtype = "bfloat16" if "model.dtype=bfloat16" in overrides else "float32"
        yield _beside(rows, elsewhere.finish().rows(), TOLERANCE[dtype])


def pack(settings: Settings) -> Iterator[Finding]:
    """Four seeds as one program, beside the same runs one by one on a CPU."""
    command = ["-m", "seed=0,1,2,3", "sweep.workers=1"]
    elsewhere = Run(settings.scratch / "alone", [*command, "sweep.pack=off"], on_cpu=True)
    together = Run(settings.scratch / "pack", [*command, "sweep.pack=4"]).finish()
    packed, alone = _members(together), _members(elsewhere.finish())
    sizes = sorted({member.summary()["packed_with"] for member in packed.values()})
    yield Finding(what="runs in the pack", value=str(sizes), bar="= [4]", holds=sizes == [4])
    yield Finding(what="the same runs", value=len(packed), bar="= 4", holds=packed.keys() == alone.keys())
    for name in sorted(packed.keys() & alone.keys()):
        yield _beside(packed[name].rows(), alone[name].rows(), TOLERANCE["float32"], of=f" of {name}")


def _members(sweep: Run) -> dict[str, Run]:
    """Return the runs of a sweep that is done, by their folders' names."""
    found = {}
    for path in sorted(sweep.folder.glob("*/summary.json")):
        member = Run.__new__(Run)
        member.folder = path.parent
        found[path.parent.name] = member
    return found


def generation(settings: Settings) -> Iterator[Finding]:
    """Text from the model of a run, drawn twice with one seed."""
    run = Run(settings.scratch / "run", []).finish()
    command = [*_XATTN, "sample", str(run.folder), "--prompt", "def ", "--max-tokens", "64"]
    texts = []
    for _ in range(2):
        asked = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if asked.returncode != 0:
            raise XattnError(f"xattn sample exited with {asked.returncode}: {asked.stderr[-500:]}")
        texts.append(asked.stdout)
    yield Finding(what="bytes of text", value=len(texts[0].encode()), bar="> 1", holds=len(texts[0].encode()) > 1)
    yield Finding(what="the same twice", value=texts[0] == texts[1], bar="True", holds=texts[0] == texts[1])
    yield Finding(what="speed", value=asked.stderr.strip().splitlines()[-1])


def deterministic(settings: Settings) -> Iterator[Finding]:
    """Two runs that are to come to the same bits."""
    runs = [Run(settings.scratch / name, ["trainer.deterministic=true"]).finish() for name in ("first", "second")]
    yield _same_bits(*runs)


def kill_and_resume(settings: Settings) -> Iterator[Finding]:
    """A run that is killed with signal 9 after a save and started again, beside one that is left alone."""
    overrides = ["trainer.deterministic=true", "trainer.checkpoint_every=10", "trainer.steps=40"]
    whole = Run(settings.scratch / "whole", overrides).finish()
    killed = Run(settings.scratch / "killed", overrides)
    while killed.process.poll() is None and not _has_saved(killed.folder):
        time.sleep(0.02)
    killed.process.send_signal(signal.SIGKILL)
    ended = killed.process.wait() == -signal.SIGKILL
    yield Finding(what="killed at step", value=len(killed.rows()), bar="< 40", holds=ended)
    again = Run(settings.scratch / "killed", overrides).finish()
    yield Finding(what="rows", value=len(again.rows()), bar="= 40", holds=len(again.rows()) == 40)
    yield _same_bits(whole, again)


def _has_saved(folder: Path) -> bool:
    try:
        committed = json.loads((folder / "summary.json").read_text("utf-8"))["committed_step"]
    except (OSError, ValueError):
        return False
    return bool(committed)


def _is_gpu(settings: Settings) -> bool:
    return settings.device is not None and settings.device.platform != "cpu"


def _falls(rows: Sequence[Row]) -> Finding:
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    finite = all(loss is not None for loss in losses)
    curve = {"train_loss": losses}
    if not finite or len(losses) < 2:
        return Finding(what="loss", value=None, bar="finite", holds=False, details=curve)
    value = f"{losses[0]:.3f} → {losses[-1]:.3f}"
    return Finding(what="loss", value=value, bar="falls", holds=losses[-1] < losses[0], details=curve)


def _beside(rows: Sequence[Row], others: Sequence[Row], allowed: float, *, of: str = "") -> Finding:
    """The largest difference of two runs' losses."""
    here, there = _losses(rows), _losses(others)
    pairs = [(here[key], there[key]) for key in here.keys() & there.keys()]
    whole = here.keys() == there.keys() and all(None not in pair for pair in pairs) and bool(pairs)
    off = max(abs(a - b) for a, b in pairs) if whole else None
    holds = off is not None and off <= allowed
    return Finding(what=f"losses off the CPU's{of}", value=off, unit="nats", bar=f"≤ {allowed:g}", holds=holds)


def _losses(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], Any]:
    return {(row["step"], key): row[key] for row in rows for key in ("train_loss", "val_loss") if key in row}


def _same_bits(one: Run, other: Run) -> Finding:
    hashes = [run.summary()["state_sha256"][:16] for run in (one, other)]
    return Finding(what="the same bits", value=" ".join(dict.fromkeys(hashes)), bar="one", holds=len({*hashes}) == 1)
