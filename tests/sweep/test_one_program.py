"""Runs that differ in numbers alone compile once: counted in what jax itself says that it compiles."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from xattn import run_folder

ROOT = Path(__file__).resolve().parent.parent.parent
GRID = ["backend.activation=softmax,sigmoid,none", "optimizer.learning_rate=1e-3,2e-3,4e-3,8e-3", "seed=0,1"]
# Initialisation, the training step, evaluation, and of sampling the prompt's and each further token's.
PROGRAMS = {"init": 3, "step": 3, "score": 3, "_read": 3, "_decode": 3}


@pytest.mark.slow
def test_24_runs_in_one_command_compile_three_of_each_program(tiny: list[str], tmp_path: Path) -> None:
    """Three activations, four rates, two seeds. Counted are the programs that jax is asked for, also where its cache on
    disk has them; small operations outside of them may not grow with the runs."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *tiny, *GRID],
        cwd=tmp_path,
        env=os.environ | {"JAX_LOG_COMPILES": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = Counter(re.findall(r"Finished XLA compilation of jit\((\w+)\)", done.stderr))
    assert {name: compiled.pop(name, 0) for name in PROGRAMS} == PROGRAMS
    assert compiled.total() < 24, compiled
    summaries = [run_folder.read_summary(run) for run in (tmp_path / "outputs" / "default").iterdir() if run.is_dir()]
    found = [summary for summary in summaries if summary is not None]
    assert [summary["status"] for summary in found] == ["done"] * 24
    assert sum(summary["compile_seconds"] is not None for summary in found) == 3
