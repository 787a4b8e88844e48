"""metrics.jsonl: each step once, also across crashes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from xattn.tracking.tracker import MetricsFile


def read(path: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_row_is_a_line_that_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, after=0)
    rows = [{"step": 1, "train_loss": 5.25}, {"step": 2, "train_loss": math.nan, "val_loss": math.inf}]
    for row in rows:
        metrics.log(row)
        assert read(path)[-1]["step"] == row["step"]
    metrics.close()
    assert read(path) == [{"step": 1, "train_loss": 5.25}, {"step": 2, "train_loss": None, "val_loss": None}]
    assert "NaN" not in path.read_text()


@pytest.mark.parametrize(("after", "kept"), [(0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3])])
@pytest.mark.parametrize("torn", ["", '{"step": 4', '{"step": 4, "a": "', '{"step": 4}'])
def test_rows_beyond_the_step_that_a_run_goes_on_from_are_dropped(
    after: int, kept: list[int], torn: str, tmp_path: Path
) -> None:
    """And so is a last line that was cut short, even where it looks whole."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)) + torn)
    metrics = MetricsFile(path, after=after)
    metrics.log({"step": after + 1})
    metrics.close()
    assert [row["step"] for row in read(path)] == [*kept, after + 1]


def test_rewinding_drops_rows_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, after=0)
    for step in (1, 2, 3):
        metrics.log({"step": step, "try": 1})
    metrics.rewind(1)
    metrics.log({"step": 2, "try": 2})
    metrics.close()
    assert read(path) == [{"step": 1, "try": 1}, {"step": 2, "try": 2}]
