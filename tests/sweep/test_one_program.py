"""Runs that differ only in numbers compile once, by jax's own log of what it compiles."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import jax
import pytest

from xattn.runs import run_folder
from xattn.system.device import compiled_once, keep_compiled_programs

ROOT = Path(__file__).resolve().parent.parent.parent
GRID = ["backend.activation=softmax,sigmoid,none", "optimizer.learning_rate=1e-3,2e-3,4e-3,8e-3", "seed=0,1"]
CACHE_SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
# Initialisation, the training step, evaluation, and for sampling a program for the prompt and one for each next token.
PROGRAMS = {"init": 3, "step": 3, "score": 3, "_read": 3, "_decode": 3}


@pytest.mark.slow
def test_24_runs_in_one_command_compile_three_of_each_program(tiny: list[str], tmp_path: Path) -> None:
    """There are three activations, four rates and two seeds. The programs that jax is asked for are counted, including
    those in its disk cache. The number of small operations outside of them must not grow with the runs."""
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


def test_what_another_compiles_is_waited_for_and_other_programs_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is on a file, so it works between processes as it does here between threads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    kept = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}
    order: list[str] = []

    def compile_it() -> None:
        with compiled_once("a program"):
            order.append("second")

    try:
        keep_compiled_programs()
        other = threading.Thread(target=compile_it)
        with compiled_once("a program"):
            other.start()
            with compiled_once("another program"):
                other.join(timeout=0.3)
            order.append("first")
        other.join(timeout=60)
    finally:
        for name, value in kept.items():
            jax.config.update(name, value)
    assert order == ["first", "second"]
