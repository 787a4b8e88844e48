"""A study as pandas frames: the same numbers as in the report's files, for odd folders too, and no jax."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xattn
from xattn.errors import BadInput
from xattn.report.answer import Question
from xattn.report.command import texts
from xattn.report.judge import judge
from xattn.report.read import read_study

from .folders import Writer

READS = """
import sys, xattn
study = xattn.load_study(sys.argv[1])
assert len(study.effects) == 2
names = dir(xattn)
loaded = {"jax", "jaxlib", "flax", "optax", "orbax", "hydra", "wandb"} & {name.split(".")[0] for name in sys.modules}
print(sorted(loaded), [name for name in names if not name.startswith("_")])
"""


def is_cell(value: Any, cell: str) -> bool:
    """Return whether a frame's value equals that of the CSV file's cell."""
    if isinstance(value, bool | np.bool_):
        return cell == str(value).lower()
    if isinstance(value, int | float | np.number):
        return cell == "" if np.isnan(value) else float(cell) == value
    return cell == ("" if value is None else value)


def test_the_frames_are_the_reports_files(write_study: Callable[..., Writer]) -> None:
    folder = write_study().folder
    study = xattn.load_study(folder)
    written = texts(judge(read_study(folder), Question()), {}, {}, folder)
    for frame, name in ((study.runs, "results.csv"), (study.effects, "effects.csv")):
        columns, *rows = csv.reader(written[name].splitlines())
        assert list(frame.columns) == columns
        assert len(frame) == len(rows) > 1
        for values, row in zip(frame.itertuples(index=False), rows, strict=True):
            assert all(map(is_cell, values, row)), row
    assert study.effects.set_index("arm").loc["none", "difference"] == pytest.approx(0.2, abs=0.02)
    assert set(study.metrics.columns[:5]) == {"run", "step", "train_loss", "val_loss", "val_bpb"}
    assert len(study.metrics) == 27 * 40
    assert study.metrics["val_loss"].notna().sum() == 27 * 10
    assert len(repr(study).splitlines()) == 4
    assert "27 runs (27 done)" in repr(study)


def test_what_is_missing_or_odd_is_empty(writer: Writer) -> None:
    """There is a run that has not begun, one with damaged rows, and a study with nothing to compare."""
    good = writer.run({"seed": 0}, rows=3)
    begun = writer.run({"seed": 1}, None, status="diverged", summary={"tokens_per_second": None})
    (begun / "metrics.jsonl").unlink()
    rows = [{"step": 2, "train_loss": None}, {"step": 1, "train_loss": 9}, {"step": 1, "train_loss": "x", "own": 1}]
    (good / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3')
    study = xattn.load_study(str(writer.folder))
    assert study.metrics[["run", "step"]].to_numpy().tolist() == [["seed0", 1], ["seed0", 2]]
    assert study.metrics["train_loss"].isna().all()
    assert study.metrics["own"].tolist()[0] == 1
    assert study.metrics.dtypes["train_loss"] == "float64"
    runs = study.runs.set_index("run")
    assert runs["status"].to_dict() == {"seed0": "done", "seed1": "diverged"}
    assert runs["val_loss"].notna().to_dict() == {"seed0": True, "seed1": False}
    assert len(study.effects) == 0
    assert "difference" in study.effects.columns
    (good / "metrics.jsonl").unlink()
    assert list(xattn.load_study(writer.folder).metrics.columns) == ["run", "step"]


def test_what_is_no_study_is_named(writer: Writer) -> None:
    run = writer.run({"seed": 0})
    with pytest.raises(BadInput, match=r"is a run; xattn\.load opens it, and its study is .*study$"):
        xattn.load_study(run)
    with pytest.raises(BadInput, match="no such folder"):
        xattn.load_study(writer.folder / "other")


def test_no_jax_is_imported_and_the_public_names_are_listed(write_study: Callable[..., Writer]) -> None:
    """This needs a new process, since this one has imported jax already."""
    folder = write_study(seeds=2, rows=4).folder
    done = subprocess.run([sys.executable, "-c", READS, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    own = [f"register_{kind}" for kind in ("activation", "optimizer", "output_norm", "probe", "task")]
    public = ["LoadedRun", "LoadedStudy", "backend", "errors", "load", "load_study", "main", *own, "testing", "train"]
    assert done.stdout == f"{[]} {public}\n"
    assert all(hasattr(xattn, name) for name in public)
